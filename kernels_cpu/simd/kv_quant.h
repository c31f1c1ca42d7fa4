// Quantizing 32 entries of a key or value, and the rotation that makes them alike first.
#pragma once

#include "simd/kv_codes.h"

namespace localllm::LOCALLLM_ISA {
namespace {

// float16 with finite values held inside its range; NaN and infinity: NaN stays, infinity is held.
inline Vec hold_half(const Vec& x) { return min(set1(65504.0f), max(set1(-65504.0f), x)); }

// 8 bits: codes round(x / scale), scale the largest magnitude / 127.
inline void choose_bytes(const Vec (&x)[2], float largest, uint16_t* half, int8_t* codes) {
  uint16_t halves[16];
  store_half(halves, hold_half(set1(largest / 127.0f)));
  *half = halves[0];
  float scale[16];
  store(scale, load(halves));  // codes are chosen for the rounded scale
  const Vec inverse = set1(scale[0] > 0.0f ? 1.0f / scale[0] : 0.0f);
  for (int i = 0; i < 2; ++i)
    store_int8(codes + 16 * i, to_int(min(set1(127.0f), max(set1(-127.0f), mul(x[i], inverse)))));
}

// 4 bits: the nearest levels, at the best of some scales.
inline void choose_levels(const Vec (&x)[2], float largest, uint16_t* half, int8_t* codes) {
  float least = 0.0f;
  for (int attempt = 0; attempt < 4; ++attempt) {
    uint16_t halves[16];
    const float shrink = 1.0f - 0.1f * static_cast<float>(attempt);
    store_half(halves, hold_half(set1(largest / 127.0f * shrink)));
    float scales[16];
    store(scales, load(halves));
    const Vec scale = set1(scales[0]);
    const Vec inverse = set1(scales[0] > 0.0f ? 1.0f / scales[0] : 0.0f);
    Vec code[2], error = zero();
    for (int i = 0; i < 2; ++i) {
      const Vec u = mul(x[i], inverse), magnitude = max(u, sub(zero(), u));
      Vec index = set1(8.0f), level = set1(static_cast<float>(kLevels[8]));
      for (int k = 9; k < 16; ++k) {
        const float middle = 0.5f * static_cast<float>(kLevels[k - 1] + kLevels[k]);
        const Mask above = less(set1(middle), magnitude);
        index = select(above, set1(static_cast<float>(k)), index);
        level = select(above, set1(static_cast<float>(kLevels[k])), level);
      }
      const Mask negative = less(u, zero());
      code[i] = select(negative, sub(set1(15.0f), index), index);
      level = select(negative, sub(zero(), level), level);
      const Vec off = sub(mul(level, scale), x[i]);
      error = fma(off, off, error);
    }
    const float sum = reduce_add(error);
    if (attempt > 0 && !(sum < least)) continue;
    least = sum;
    *half = halves[0];
    for (int i = 0; i < 2; ++i) store_int8(codes + 16 * i, to_int(code[i]));
  }
}

// Codes of up to 32 entries and their float16 scale. A group that is not finite gets scale NaN.
inline uint16_t quantize_entries(const float* x, int n, bool nibbles, int8_t* codes) {
  const int low = n < 16 ? n : 16, high = n - low;
  const Vec both[2] = {load(x, low), load(x + low, high)};
  const IVec no_sign = set1(int32_t{0x7fffffff});
  const int32_t largest =
      reduce_max(max(bit_and(bits(both[0]), no_sign), bit_and(bits(both[1]), no_sign)));
  if (largest >= 0x7f800000) {
    for (int i = 0; i < kGroup; ++i) codes[i] = 0;
    return 0x7e00;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, sizeof(magnitude));
  uint16_t half = 0;
  if (nibbles)
    choose_levels(both, magnitude, &half, codes);
  else
    choose_bytes(both, magnitude, &half, codes);
  return half;
}

// Its own inverse. Every stage pairs entry i with i + run / 2 and lays sum and difference side by
// side, which vectorizes alike for all. Plain loops: each sum is of two floats, however it is done.
void rotate(float* x, int n) {
  constexpr int kLongest = 256;
  const int power = n & -n, run = power < kLongest ? power : kLongest, half = run / 2;
  const float norm = 1.0f / sqrt1(static_cast<float>(run));
  for (float* at = x; at < x + n; at += run) {
    float spare[kLongest];
    float *from = at, *to = spare;
    for (int stage = 1; stage < run; stage *= 2) {
      for (int i = 0; i < half; ++i) {
        const float a = from[i], b = from[i + half];
        to[2 * i] = a + b;
        to[2 * i + 1] = a - b;
      }
      float* const last = from;
      from = to;
      to = last;
    }
    for (int i = 0; i < run; ++i) at[i] = from[i] * norm;
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
