#include "train/store.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace localllm::train {

void Store::add(const std::string& name, int rows, int cols, Codes codes, int group) {
  Matrix m;
  m.rows = rows;
  m.cols = cols;
  m.codes = codes;
  m.group = group;
  const size_t count = static_cast<size_t>(blocks(rows)) * static_cast<size_t>(m.col_blocks());
  m.data = arena_.allocate(count * block_bytes(codes));
  if (group > 0)
    m.groups = reinterpret_cast<const float*>(arena_.allocate(
        static_cast<size_t>(blocks(rows)) * static_cast<size_t>(m.row_groups()) * 32 * 4));
  if (!matrices_.emplace(name, m).second) throw std::invalid_argument(name + ": given twice");
}

const Matrix& Store::at(const std::string& name) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument(name + ": no such weight");
  return found->second;
}

void Store::fill_codes(const std::string& name, int row, int count, const uint8_t* codes,
                       const float* scales, const float* biases) {
  const Matrix& m = at(name);
  const int bits = m.codes == Codes::kBits4 ? 4 : 8, per_word = 32 / bits;
  const int groups = (m.cols + m.group - 1) / m.group;
  for (int i = 0; i < count; ++i) {
    const int r = row + i, lane = r % kBlock;
    for (int c = 0; c < m.cols; c += per_word) {
      uint32_t word = 0;
      for (int k = 0; k < per_word && c + k < m.cols; ++k)
        word |= static_cast<uint32_t>(codes[static_cast<size_t>(i) * static_cast<size_t>(m.cols) +
                                            static_cast<size_t>(c + k)])
                << (bits * k);
      const size_t block = static_cast<size_t>(r / kBlock) * static_cast<size_t>(m.col_blocks()) +
                           static_cast<size_t>(c / kBlock);
      uint8_t* to = const_cast<uint8_t*>(m.data) + block * block_bytes(m.codes) +
                    (c % kBlock / per_word * kBlock + lane) * 4;
      std::memcpy(to, &word, 4);
    }
    float* to = const_cast<float*>(m.groups) +
                static_cast<size_t>(r / kBlock) * static_cast<size_t>(m.row_groups()) * 32;
    for (int g = 0; g < groups; ++g) {
      to[g * 32 + lane] =
          scales[static_cast<size_t>(i) * static_cast<size_t>(groups) + static_cast<size_t>(g)];
      to[g * 32 + 16 + lane] =
          biases[static_cast<size_t>(i) * static_cast<size_t>(groups) + static_cast<size_t>(g)];
    }
  }
}

void Store::fill_dense(const std::string& name, int row, int count, const void* values) {
  const Matrix& m = at(name);
  const size_t size = m.codes == Codes::kFloat32 ? 4 : 2;
  const auto* from = static_cast<const uint8_t*>(values);
  for (int i = 0; i < count; ++i) {
    const int r = row + i;
    for (int c = 0; c < m.cols; ++c, from += size) {
      const size_t block = static_cast<size_t>(r / kBlock) * static_cast<size_t>(m.col_blocks()) +
                           static_cast<size_t>(c / kBlock);
      std::memcpy(const_cast<uint8_t*>(m.data) + block * block_bytes(m.codes) +
                      static_cast<size_t>(c % kBlock * kBlock + r % kBlock) * size,
                  from, size);
    }
  }
}

void Store::add_vector(const std::string& name, const float* values, int n) {
  auto* to = reinterpret_cast<float*>(arena_.allocate(static_cast<size_t>(n) * 4 + 64));
  std::copy_n(values, n, to);
  if (!vectors_.emplace(name, std::make_pair(to, n)).second)
    throw std::invalid_argument(name + ": given twice");
}

void Store::place(const std::string& name, int64_t at, int64_t count) {
  if (at < 0) throw std::invalid_argument(name + ": outside the parameters");
  places_.emplace(name, at);
  trained_end_ = std::max(trained_end_, at + count);
}

void Store::add_trained(const std::string& name, int rows, int cols, int64_t at) {
  place(name, at, static_cast<int64_t>(rows) * cols);
  Matrix m;
  m.rows = rows;
  m.cols = cols;
  m.codes = Codes::kRowMajor;
  if (!matrices_.emplace(name, m).second) throw std::invalid_argument(name + ": given twice");
}

void Store::add_trained_vector(const std::string& name, int n, int64_t at, float offset) {
  place(name, at, n);
  auto* to = reinterpret_cast<float*>(arena_.allocate(static_cast<size_t>(n) * 4 + 64));
  trained_vectors_.push_back({to, n, at, offset});
  if (!vectors_.emplace(name, std::make_pair(to, n)).second)
    throw std::invalid_argument(name + ": given twice");
}

void Store::use(const float* parameters) {
  for (auto& [name, matrix] : matrices_) {
    const int64_t at = place(name);
    if (at >= 0) matrix.data = reinterpret_cast<const uint8_t*>(parameters + at);
  }
  for (const TrainedVector& v : trained_vectors_)
    for (int i = 0; i < v.n; ++i) v.to[i] = parameters[v.at + i] + v.offset;
}

int64_t Store::place(const std::string& name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? -1 : found->second;
}

const Matrix* Store::matrix(const std::string& name, int rows, int cols) const {
  const Matrix& m = at(name);
  if (m.rows != rows || m.cols != cols) throw std::invalid_argument(name + ": of another shape");
  return &m;
}

const float* Store::vector(const std::string& name, int n) const {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) throw std::invalid_argument(name + ": no such weight");
  if (found->second.second != n) throw std::invalid_argument(name + ": of another shape");
  return found->second.first;
}

}  // namespace localllm::train
