// Packed weights by name.
#pragma once

#include <map>
#include <memory>
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
  // Of one weight; 0 when there is none of that name.
  size_t bytes_of(const std::string& name) const;

  // The packed form as a file, to be opened by `open`. Throws std::runtime_error with the system's
  // reason when it cannot be written.
  void save(const std::string& path) const;
  // Throws std::runtime_error when the file is missing, cut short, or of another layout.
  static std::shared_ptr<WeightStore> open(const std::string& path);

 private:
  struct Vector {
    const float* data;
    int size;
  };
  Arena arena_;
  Region file_;  // what `open` opened
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, Vector> vectors_;
  size_t bytes_ = 0;
};

}  // namespace localllm
