// What clang calls for half and bfloat where the CPU has no instruction; some libgccs lack them.
#pragma once
#include "abi.h"

#define MSL_EXPORT extern "C" __attribute__((visibility("default"), weak))

static inline u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }

static u16 float_to_bfloat(float x) { // to nearest, ties to even
  u32 b = bits_of(x);
  if ((b & 0x7fffffff) > 0x7f800000) return (b >> 16) | 0x40;
  return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}

static float half_to_float(u16 h) {
  u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | fraction << 13);
  if (exponent) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = (float)fraction * 0x1p-24f;
  return sign ? -tiny : tiny;
}

static u16 float_to_half(float x) { // to nearest, ties to even
  u32 b = bits_of(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and up
  if (magnitude < 0x38800000) {                      // below the normal numbers
    float shifted = __builtin_bit_cast(float, magnitude) + 0.5f; // its last bit is 2^-24
    return sign | (bits_of(shifted) - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

MSL_EXPORT __bf16 __truncsfbf2(float x) { return __builtin_bit_cast(__bf16, float_to_bfloat(x)); }
MSL_EXPORT _Float16 __truncsfhf2(float x) {
  return __builtin_bit_cast(_Float16, float_to_half(x));
}
MSL_EXPORT float __extendhfsf2(_Float16 x) { return half_to_float(__builtin_bit_cast(u16, x)); }
MSL_EXPORT _Float16 __truncdfhf2(double x) {
  float near = (float)x; // rounded to odd, so that the second rounding cannot err
  if ((double)near != x && near == near && !(bits_of(near) & 1)) {
    bool away = __builtin_fabs((double)near) > __builtin_fabs(x);
    near = __builtin_bit_cast(float, away ? bits_of(near) - 1 : bits_of(near) + 1);
  }
  return __builtin_bit_cast(_Float16, float_to_half(near));
}
