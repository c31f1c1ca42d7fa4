// Weights by name: frozen ones in the blocks that training's kernels read, trained ones where the
// parameters hold them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "train/kernels.h"

namespace localllm::train {

class Store {
 public:
  Store() = default;
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // A matrix of zeros, filled by runs of rows that begin at multiples of 16.
  void add(const std::string& name, int rows, int cols, Codes codes, int group);
  // codes [count, cols], each below 16 for 4 bits; scales, biases [count, groups]:
  // w = scale * code + bias.
  void fill_codes(const std::string& name, int row, int count, const uint8_t* codes,
                  const float* scales, const float* biases);
  // values [count, cols] of the matrix's own type.
  void fill_dense(const std::string& name, int row, int count, const void* values);
  void add_vector(const std::string& name, const float* values, int n);
  // Weights that are parameters from place `at` on, row after row; `use` tells where these lie.
  void add_trained(const std::string& name, int rows, int cols, int64_t at);
  // offset: what a norm adds to its weight to make its gain.
  void add_trained_vector(const std::string& name, int n, int64_t at, float offset);
  void use(const float* parameters);

  // Throws std::invalid_argument naming what is missing or of another shape.
  const Matrix* matrix(const std::string& name, int rows, int cols) const;
  const float* vector(const std::string& name, int n) const;
  size_t bytes() const { return arena_.used(); }
  const Matrix& at(const std::string& name) const;
  bool has_vector(const std::string& name) const { return vectors_.count(name) > 0; }
  // The place of a weight among the parameters, -1 where it is frozen or absent.
  int64_t place(const std::string& name) const;
  bool trains() const { return !places_.empty(); }
  int64_t trained_end() const { return trained_end_; }  // behind the last parameter used

 private:
  struct TrainedVector {
    float* to;
    int n;
    int64_t at;
    float offset;
  };

  void place(const std::string& name, int64_t at, int64_t count);

  Arena arena_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, std::pair<const float*, int>> vectors_;
  std::map<std::string, int64_t> places_;
  std::vector<TrainedVector> trained_vectors_;
  int64_t trained_end_ = 0;
};

}  // namespace localllm::train
