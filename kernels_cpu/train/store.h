// Frozen weights by name, in the blocks that training's kernels read.
#pragma once

#include <cstdint>
#include <map>
#include <string>

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

  // Throws std::invalid_argument naming what is missing or of another shape.
  const Matrix* matrix(const std::string& name, int rows, int cols) const;
  const float* vector(const std::string& name, int n) const;
  size_t bytes() const { return arena_.used(); }
  const Matrix& at(const std::string& name) const;
  bool has_vector(const std::string& name) const { return vectors_.count(name) > 0; }

 private:
  Arena arena_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, std::pair<const float*, int>> vectors_;
};

}  // namespace localllm::train
