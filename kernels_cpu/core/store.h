// Packed weights by name.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/pack.h"

namespace localllm {

class WeightStore {
 public:
  WeightStore() = default;
  WeightStore(const WeightStore&) = delete;
  WeightStore& operator=(const WeightStore&) = delete;

  void add_affine(const std::string& name, const AffineSource& source);
  void add_dense(const std::string& name, const void* values, WeightKind kind, int rows, int cols);
  void add_vector(const std::string& name, const float* values, int n);

  bool has(const std::string& name) const;
  // [rows, cols]; throws std::invalid_argument when missing or of another shape.
  const Matrix& matrix(const std::string& name, int rows, int cols) const;
  const float* vector(const std::string& name, int n) const;
  // Null when there is none of that name.
  const float* optional_vector(const std::string& name, int n) const;

  size_t bytes() const { return bytes_; }

 private:
  struct Vector {
    const float* data;
    int size;
  };
  Arena arena_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, Vector> vectors_;
  size_t bytes_ = 0;
};

}  // namespace localllm
