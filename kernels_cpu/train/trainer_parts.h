// What the parts of the trainer share beside its face.
#pragma once

#include <algorithm>

#include "train/trainer.h"

namespace localllm::train {

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

// The number that a target's masks begin with in a step.
inline uint32_t target_seed(uint64_t seed, uint32_t target) {
  return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) ^ target));
}

// That of a matrix [rank, in], row after row at `out`: x [m, in] enters it, and `transposed` are
// its results' gradients as packed rows of their transpose.
inline Gradient gradient_of(const void* transposed, int rank, int m, const void* x, int in,
                            float* out) {
  Gradient j;
  j.transposed = transposed;
  j.rank = rank;
  j.m = m;
  j.x = x;
  j.ld = j.columns = in;
  j.out = out;
  j.out_r = in;
  j.out_c = 1;
  return j;
}

struct Trainer::Group {
  int first = 0, rows = 0, padded = 0, longest = 0;
  bool keep = false;
  std::vector<Sequence> sequences;  // `first` within the group
  uint32_t first_row = 0;           // of the step
  uint64_t seed = 0;
  double dropout = 0.0;
};

// A linear as used on rows: where its result goes, or where its gradient comes from.
struct Trainer::Use {
  const Linear* linear = nullptr;
  void* inner = nullptr;  // u^T of the saved values
  void* out = nullptr;    // forward: results; backward: the gradient at them, elements
  bool out_elements = true;
  float alpha = 1.0f;
  const float* add = nullptr;
};

// A block's part of the sums of a norm's gradients, zeroed: gains, then biases.
inline NormSums cleared_sums(const NormSpec& norm, int block, float* sums) {
  float* at = sums + static_cast<ptrdiff_t>(block) * 2 * norm.n;
  std::fill_n(at, 2 * norm.n, 0.0f);
  return {at, norm.bias ? at + norm.n : nullptr};
}

// f(row0, row1, block0, block1, thread) over blocks of packed rows.
template <class F>
void Trainer::rows(int m, const F& f) {
  pool_.parallel(k_.row_blocks(m), 1, [&](int first, int last, int thread) {
    f(first * k_.tile_rows, std::min(m, last * k_.tile_rows), first, last, thread);
  });
}

}  // namespace localllm::train
