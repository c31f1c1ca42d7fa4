#include "core/store.h"

#include <cstring>
#include <stdexcept>

namespace localllm {

void WeightStore::add_affine(const std::string& name, const AffineSource& source) {
  matrices_[name] = pack_affine(source, arena_);
  bytes_ = arena_.used();
}

void WeightStore::add_dense(const std::string& name, const void* values, WeightKind kind, int rows,
                            int cols) {
  matrices_[name] = pack_dense(values, kind, rows, cols, arena_);
  bytes_ = arena_.used();
}

void WeightStore::add_vector(const std::string& name, const float* values, int n) {
  const size_t bytes = static_cast<size_t>(n) * sizeof(float);
  uint8_t* data = arena_.allocate(bytes);
  std::memcpy(data, values, bytes);
  vectors_[name] = {reinterpret_cast<const float*>(data), n};
  bytes_ = arena_.used();
}

bool WeightStore::has(const std::string& name) const {
  return matrices_.count(name) || vectors_.count(name);
}

size_t WeightStore::bytes_of(const std::string& name) const {
  if (const auto m = matrices_.find(name); m != matrices_.end())
    return m->second.panel_bytes * static_cast<size_t>(m->second.panels());
  const auto v = vectors_.find(name);
  return v == vectors_.end() ? 0 : static_cast<size_t>(v->second.size) * sizeof(float);
}

const Matrix& WeightStore::matrix(const std::string& name, int rows, int cols) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument("weight missing: " + name);
  const Matrix& w = found->second;
  if (w.rows != rows || w.cols != cols)
    throw std::invalid_argument(name + " has shape [" + std::to_string(w.rows) + ", " +
                                std::to_string(w.cols) + "], the model needs [" +
                                std::to_string(rows) + ", " + std::to_string(cols) + "]");
  return w;
}

const float* WeightStore::vector(const std::string& name, int n) const {
  const float* data = optional_vector(name, n);
  if (!data) throw std::invalid_argument("weight missing: " + name);
  return data;
}

const float* WeightStore::optional_vector(const std::string& name, int n) const {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) return nullptr;
  if (found->second.size != n)
    throw std::invalid_argument(name + " has " + std::to_string(found->second.size) +
                                " entries, the model needs " + std::to_string(n));
  return found->second.data;
}

}  // namespace localllm
