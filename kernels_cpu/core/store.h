// Packed weights by name.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/pack.h"

namespace localllm {

// Where the bytes of a weight lie in a file.
struct FilePiece {
  uint64_t at = 0, bytes = 0, checksum = 0;
};

// Any single changed word changes it.
uint64_t content_checksum(const void* data, uint64_t bytes, uint64_t seed = 0);

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
  // leave_experts: the matrices of a mixture's experts are described, but stay in the file.
  // Throws std::runtime_error when the file is missing, cut short, or of another layout.
  static std::shared_ptr<WeightStore> open(const std::string& path, bool leave_experts = false);

  // Whether some were left in the file, which then is `path()`.
  bool leaves_experts() const { return !left_.empty(); }
  const std::string& path() const { return path_; }
  // Of a matrix of this store that was left in the file.
  const FilePiece& left(const Matrix& matrix) const { return left_.at(&matrix); }

 private:
  struct Vector {
    const float* data;
    int size;
  };
  Arena arena_;
  Region file_;  // what `open` opened
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, Vector> vectors_;
  std::map<const Matrix*, FilePiece> left_;
  std::string path_;
  size_t bytes_ = 0;
};

// Packs weights straight into a file, one at a time, for models that memory does not hold. What it
// writes is what `WeightStore::save` writes of the same weights.
class PackedWriter {
 public:
  // weights: how many will be added.
  PackedWriter(const std::string& path, size_t weights);
  ~PackedWriter();
  PackedWriter(const PackedWriter&) = delete;
  PackedWriter& operator=(const PackedWriter&) = delete;

  // Throw std::runtime_error with the system's reason when writing fails.
  void add_affine(const std::string& name, const AffineSource& source);
  void add_dense(const std::string& name, const void* values, WeightKind kind, int rows, int cols);
  void add_vector(const std::string& name, const float* values, int n);
  void add_packed(const std::string& name, const Matrix& matrix);
  // After the last one.
  void finish();

 private:
  struct Content;
  void add(const std::string& name, const void* data, uint64_t bytes, int64_t vector_size,
           const Matrix* matrix);
  std::unique_ptr<Content> content_;
};

}  // namespace localllm
