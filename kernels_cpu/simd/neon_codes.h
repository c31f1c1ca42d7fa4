// What the ARM instruction sets share: codes out of their blocks, and dot products by SDOT
// (Armv8.2 FEAT_DotProd).
#pragma once

#include "simd/vec_neon.h"

namespace localllm::LOCALLLM_ISA {
namespace {

// Quarter (0-3: rows 4q .. 4q+3) of vector v of a packed block. Codes below 64 are also signed.
template <int BITS>
inline int8x16_t codes_of(const uint8_t* block, int v, int quarter) {
  const int at = quarter * 16;
  if (BITS == 8) return vreinterpretq_s8_u8(vld1q_u8(block + v * 64 + at));
  const uint8x16_t pair = vld1q_u8(block + v / 2 * 64 + at);
  uint8x16_t code = v & 1 ? vshrq_n_u8(pair, 4) : vandq_u8(pair, vdupq_n_u8(15));
  if (BITS == 5 || BITS == 6) {
    const int from = BITS == 5 ? v : 2 * (v % 4);
    const uint8_t* high = block + 256 + (BITS == 5 ? 0 : v / 4 * 64) + at;
    const uint8x16_t moved = vshlq_u8(vld1q_u8(high), vdupq_n_s8(static_cast<int8_t>(4 - from)));
    code = vorrq_u8(code, vandq_u8(moved, vdupq_n_u8(BITS == 5 ? 0x10 : 0x30)));
  }
  return vreinterpretq_s8_u8(code);
}

// The same of an unpacked block.
inline int8x16_t bytes_of(const uint8_t* codes, int v, int quarter) {
  return vreinterpretq_s8_u8(vld1q_u8(codes + v * 64 + quarter * 16));
}

template <int BITS>
void unpack(const uint8_t* block, uint8_t* out) {
  for (int v = 0; v < 8; ++v)
    for (int quarter = 0; quarter < 4; ++quarter)
      vst1q_u8(out + v * 64 + quarter * 16, vreinterpretq_u8_s8(codes_of<BITS>(block, v, quarter)));
}

// f(quarter) for each quarter of the panel. With more than two rows in order, one at a time: else
// the compiler works at all four at once and spills their sums.
template <int ROWS, class F>
inline __attribute__((always_inline)) void each_quarter(F f) {
  if constexpr (ROWS <= 2) {
    f(0), f(1), f(2), f(3);
  } else {
#pragma GCC unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) f(quarter);
  }
}

// Sums ROWS x 16 dot products over vectors FIRST .. LAST-1 (multiples of 4); code(v, quarter)
// yields the codes, row m's inputs lie at x + m * stride.
template <int FIRST, int LAST, int ROWS, class Code>
inline __attribute__((always_inline)) void dot_rows(Code code, const int8_t* x, ptrdiff_t stride,
                                                    IVec* dot) {
  constexpr int kWords = (LAST - FIRST) / 4;  // of 16 inputs, whose fours are an operand's lanes
  int8x16_t inputs[ROWS][kWords];
  for (int m = 0; m < ROWS; ++m)
    for (int w = 0; w < kWords; ++w) inputs[m][w] = vld1q_s8(x + m * stride + 4 * FIRST + 16 * w);
  each_quarter<ROWS>([&](int quarter) __attribute__((always_inline)) {
    int32x4_t sum[ROWS];
    for (int m = 0; m < ROWS; ++m) sum[m] = vdupq_n_s32(0);
#pragma GCC unroll 4
    for (int w = 0; w < kWords; ++w) {
      const int v = FIRST + 4 * w;
      const int8x16_t a = code(v, quarter), b = code(v + 1, quarter);
      const int8x16_t c = code(v + 2, quarter), d = code(v + 3, quarter);
      for (int m = 0; m < ROWS; ++m) {
        sum[m] = vdotq_laneq_s32(sum[m], a, inputs[m][w], 0);
        sum[m] = vdotq_laneq_s32(sum[m], b, inputs[m][w], 1);
        sum[m] = vdotq_laneq_s32(sum[m], c, inputs[m][w], 2);
        sum[m] = vdotq_laneq_s32(sum[m], d, inputs[m][w], 3);
      }
    }
    for (int m = 0; m < ROWS; ++m) dot[m].q[quarter] = sum[m];
  });
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
