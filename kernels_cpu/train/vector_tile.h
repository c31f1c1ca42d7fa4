// The one product everything is made of, on vectors: kRows packed rows times a part of a panel.
#pragma once

#include <cstddef>

namespace localllm::LOCALLLM_ISA {
namespace {

constexpr int kStep = kRows * kPair;  // elements of one step of packed rows
constexpr int kStepUnit = 1;
constexpr bool kRowMajor = false;  // packed rows lie step after step
constexpr int kUnit = 1;

// Where a block of packed rows holds the first element of a row's step, of `steps`.
inline ptrdiff_t packed_at(int row, int step, int) {
  return static_cast<ptrdiff_t>(step) * kStep + row * kPair;
}

// Alive while `tile` is used.
struct Tiles {
  Tiles() {}
};

template <int NV>
inline __attribute__((always_inline)) void run_steps(const Elem* a, const Elem* b, int steps,
                                                     Vec (&sum)[kRows][NV]) {
  for (int s = 0; s < steps; ++s) {
    Operand right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = load_operand(b + v * 16 * kPair);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Operand left = broadcast(a + r * kPair);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = multiply_add(left, right[v], sum[r][v]);
    }
    a += kStep;
    b += NV * 16 * kPair;
  }
}

// c [kRows, NV * 16] = a b + a2 b2, each of its own steps.
template <int NV>
inline void tile(const Elem* a, const Elem* b, int steps, const Elem* a2, const Elem* b2,
                 int steps2, float* c) {
  Vec sum[kRows][NV];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = zero();
  run_steps<NV>(a, b, steps, sum);
  run_steps<NV>(a2, b2, steps2, sum);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + (r * NV + v) * 16, sum[r][v]);
}

inline void tile(int vecs, const Elem* a, const Elem* b, int steps, const Elem* a2, const Elem* b2,
                 int steps2, float* c) {
  if constexpr (kVecs >= 3) {
    if (vecs == 3) return tile<3>(a, b, steps, a2, b2, steps2, c);
    if (vecs == 2) return tile<2>(a, b, steps, a2, b2, steps2, c);
  }
  tile<1>(a, b, steps, a2, b2, steps2, c);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
