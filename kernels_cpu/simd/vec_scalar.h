// Sixteen float lanes in plain C++: the definition that every instruction set must reproduce.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define LOCALLLM_ISA scalar

namespace localllm::scalar {
namespace {

struct Vec {
  float v[16];
};
struct IVec {
  int32_t v[16];
};
struct Mask {
  bool v[16];
};

#define LOCALLLM_LANES(expression) \
  do {                             \
    for (int i = 0; i < 16; ++i) { \
      expression;                  \
    }                              \
  } while (0)

inline Vec set1(float x) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = x);
  return r;
}
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* p) {
  Vec r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline void store(float* p, const Vec& a) { std::memcpy(p, a.v, sizeof(a.v)); }

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return bits_to_float(float_to_bits(tiny) | sign);
}

// Round to nearest even; overflow goes to infinity, NaN stays NaN.
inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((a >> 13) & 0x3ff));
  if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (a >= 0x38800000) {  // normal half
    const uint32_t odd = (a >> 13) & 1;
    return static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xfff + odd) >> 13));
  }
  // Adding 0.5 leaves the halves' denormal grid (2^-24) as the float's last place.
  const uint32_t tiny = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000;
  return static_cast<uint16_t>(sign | tiny);
}

inline Vec load(const uint16_t* p) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = half_to_float(p[i]));
  return r;
}
inline void store_half(uint16_t* p, const Vec& a) { LOCALLLM_LANES(p[i] = float_to_half(a.v[i])); }
inline Vec load_bfloat(const uint16_t* p) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = bits_to_float(static_cast<uint32_t>(p[i]) << 16));
  return r;
}

inline Vec add(const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] + b.v[i]);
  return r;
}
inline Vec sub(const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] - b.v[i]);
  return r;
}
inline Vec mul(const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] * b.v[i]);
  return r;
}
inline Vec div(const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] / b.v[i]);
  return r;
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = std::fma(a.v[i], b.v[i], c.v[i]));
  return r;
}
// a > b ? a : b, so b where either is NaN. The order of operands is part of the arithmetic.
inline Vec max(const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
  return r;
}
inline Vec min(const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
  return r;
}
inline float sqrt1(float x) { return std::sqrt(x); }

inline Mask less(const Vec& a, const Vec& b) {
  Mask r;
  LOCALLLM_LANES(r.v[i] = a.v[i] < b.v[i]);
  return r;
}
inline Mask is_nan(const Vec& a) {
  Mask r;
  LOCALLLM_LANES(r.v[i] = a.v[i] != a.v[i]);
  return r;
}
// Lanes first <= i < last.
inline Mask lanes(int first, int last) {
  Mask r;
  LOCALLLM_LANES(r.v[i] = i >= first && i < last);
  return r;
}
inline Vec select(const Mask& m, const Vec& a, const Vec& b) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = m.v[i] ? a.v[i] : b.v[i]);
  return r;
}

inline IVec bits(const Vec& a) {
  IVec r;
  std::memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
inline Vec from_bits(const IVec& a) {
  Vec r;
  std::memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
inline IVec set1(int32_t x) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = x);
  return r;
}
inline IVec load(const int32_t* p) {
  IVec r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline IVec add(const IVec& a, const IVec& b) {
  IVec r;
  LOCALLLM_LANES(
      r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])));
  return r;
}
inline IVec bit_and(const IVec& a, const IVec& b) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] & b.v[i]);
  return r;
}
inline IVec max(const IVec& a, const IVec& b) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
  return r;
}
template <int N>
inline IVec shift_left(const IVec& a) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N));
  return r;
}
template <int N>
inline IVec shift_right(const IVec& a) {  // arithmetic
  IVec r;
  LOCALLLM_LANES(r.v[i] = a.v[i] >> N);
  return r;
}
inline Vec to_float(const IVec& a) {
  Vec r;
  LOCALLLM_LANES(r.v[i] = static_cast<float>(a.v[i]));
  return r;
}
// Nearest even, for |a| < 2^22. Adding 1.5 * 2^23 leaves the integer in the low bits.
inline IVec to_int(const Vec& a) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = static_cast<int32_t>(float_to_bits(a.v[i] + 12582912.0f) - 0x4b400000u));
  return r;
}
inline void store_int8(int8_t* p, const IVec& a) {
  LOCALLLM_LANES(p[i] = static_cast<int8_t>(a.v[i]));
}
inline IVec load_int8(const int8_t* p) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = p[i]);
  return r;
}
// levels[] of the low and of the high nibbles of 16 bytes.
inline IVec pick_low(const int8_t* levels, const uint8_t* p) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = levels[p[i] & 15]);
  return r;
}
inline IVec pick_high(const int8_t* levels, const uint8_t* p) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = levels[p[i] >> 4]);
  return r;
}
inline IVec load_uint8(const uint8_t* p) {
  IVec r;
  LOCALLLM_LANES(r.v[i] = p[i]);
  return r;
}

// The one reduction tree: lane i meets lane i+8, then i+4, i+2, i+1.
inline float reduce_add(Vec a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  return a.v[0];
}
inline float reduce_max(Vec a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
inline int32_t reduce_add(const IVec& a) {
  int32_t sum = 0;
  LOCALLLM_LANES(sum += a.v[i]);
  return sum;
}
inline int32_t reduce_max(const IVec& a) {
  int32_t best = a.v[0];
  LOCALLLM_LANES(best = a.v[i] > best ? a.v[i] : best);
  return best;
}

inline void prefetch(const void*) {}

#undef LOCALLLM_LANES

}  // namespace
}  // namespace localllm::scalar
