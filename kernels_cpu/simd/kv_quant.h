// Quantizing 32 entries of a key or value, and the rotation that makes them alike first.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

// float16 with finite values held inside its range; NaN and infinity: NaN stays, infinity is held.
inline Vec hold_half(const Vec& x) { return min(set1(65504.0f), max(set1(-65504.0f), x)); }

// Codes of up to 32 entries, |code| <= limit, and their float16 scale. A group that is not finite
// gets scale NaN.
inline uint16_t quantize_entries(const float* x, int n, int limit, int8_t* codes) {
  const int low = n < 16 ? n : 16, high = n - low;
  const Vec a = load(x, low), b = load(x + low, high);
  const IVec no_sign = set1(int32_t{0x7fffffff});
  const int32_t largest = reduce_max(max(bit_and(bits(a), no_sign), bit_and(bits(b), no_sign)));
  uint16_t half[16];
  if (largest >= 0x7f800000) {
    for (int i = 0; i < 32; ++i) codes[i] = 0;
    return 0x7e00;
  }
  const Vec amax = from_bits(set1(largest));
  store_half(half, hold_half(div(amax, set1(static_cast<float>(limit)))));
  float scale[16];
  store(scale, load(half));  // codes are chosen for the rounded scale
  const float inverse = scale[0] > 0.0f ? 1.0f / scale[0] : 0.0f;
  const Vec top = set1(static_cast<float>(limit)), bottom = set1(static_cast<float>(-limit));
  const auto round = [&](const Vec& v) {
    return to_int(min(top, max(bottom, mul(v, set1(inverse)))));
  };
  store_int8(codes, round(a));
  store_int8(codes + 16, round(b));
  return half[0];
}

// Its own inverse. Plain loops: sums of two floats round alike however they are vectorized.
void rotate(float* x, int n) {
  const int run = n & -n;
  const Vec norm = set1(1.0f / sqrt1(static_cast<float>(run)));
  for (int at = 0; at < n; at += run)
    for (int half = 1; half < run; half *= 2)
      for (int i = at; i < at + run; i += 2 * half)
        for (int k = i; k < i + half; ++k) {
          const float a = x[k], b = x[k + half];
          x[k] = a + b;
          x[k + half] = a - b;
        }
  each_vec(n, [&](int i, auto part) { store(x + i, mul(load(x + i, part), norm), part); });
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
