// Sixteen float lanes as four NEON registers (AArch64). Included once in each file that is compiled
// for an ARM instruction set, under the namespace that file names.
#pragma once

#include <arm_neon.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifndef LOCALLLM_ISA
#define LOCALLLM_ISA neon
#endif

namespace localllm::LOCALLLM_ISA {
namespace {

struct Vec {
  float32x4_t q[4];
};
struct IVec {
  int32x4_t q[4];
};
struct Mask {
  uint32x4_t q[4];
};

template <class F>
inline Vec map(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class F>
inline IVec imap(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <class F>
inline Mask mmap(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Vec set1(float x) {
  return map([&](int) { return vdupq_n_f32(x); });
}
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* p) {
  return map([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
inline Vec load(const uint16_t* p) {  // float16
  return map([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store_half(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.q[i])));
}
inline Vec load_bfloat(const uint16_t* p) {
  return map([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}

inline Vec add(Vec a, Vec b) {
  return map([&](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
inline Vec sub(Vec a, Vec b) {
  return map([&](int i) { return vsubq_f32(a.q[i], b.q[i]); });
}
inline Vec mul(Vec a, Vec b) {
  return map([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
inline Vec div(Vec a, Vec b) {
  return map([&](int i) { return vdivq_f32(a.q[i], b.q[i]); });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
inline Vec max(Vec a, Vec b) {  // b where either is NaN, unlike vmaxq
  return map([&](int i) { return vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); });
}
inline Vec min(Vec a, Vec b) {
  return map([&](int i) { return vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); });
}
inline float sqrt1(float x) { return vgetq_lane_f32(vsqrtq_f32(vdupq_n_f32(x)), 0); }

inline Mask less(Vec a, Vec b) {
  return mmap([&](int i) { return vcltq_f32(a.q[i], b.q[i]); });
}
inline Mask is_nan(Vec a) {
  return mmap([&](int i) { return vmvnq_u32(vceqq_f32(a.q[i], a.q[i])); });
}
inline Mask lanes(int first, int last) {
  const int32_t steps[4] = {0, 1, 2, 3};
  const int32x4_t step = vld1q_s32(steps);
  return mmap([&](int i) {
    const int32x4_t lane = vaddq_s32(step, vdupq_n_s32(4 * i));
    return vandq_u32(vcgeq_s32(lane, vdupq_n_s32(first)), vcltq_s32(lane, vdupq_n_s32(last)));
  });
}
inline Vec select(Mask m, Vec a, Vec b) {
  return map([&](int i) { return vbslq_f32(m.q[i], a.q[i], b.q[i]); });
}

inline IVec bits(Vec a) {
  return imap([&](int i) { return vreinterpretq_s32_f32(a.q[i]); });
}
inline Vec from_bits(IVec a) {
  return map([&](int i) { return vreinterpretq_f32_s32(a.q[i]); });
}
inline IVec set1(int32_t x) {
  return imap([&](int) { return vdupq_n_s32(x); });
}
inline IVec load(const int32_t* p) {
  return imap([&](int i) { return vld1q_s32(p + 4 * i); });
}
inline IVec add(IVec a, IVec b) {
  return imap([&](int i) { return vaddq_s32(a.q[i], b.q[i]); });
}
inline IVec bit_and(IVec a, IVec b) {
  return imap([&](int i) { return vandq_s32(a.q[i], b.q[i]); });
}
inline IVec max(IVec a, IVec b) {
  return imap([&](int i) { return vmaxq_s32(a.q[i], b.q[i]); });
}
template <int N>
inline IVec shift_left(IVec a) {
  return imap([&](int i) { return vshlq_n_s32(a.q[i], N); });
}
template <int N>
inline IVec shift_right(IVec a) {
  if constexpr (N == 0) return a;
  return imap([&](int i) { return vshlq_s32(a.q[i], vdupq_n_s32(-N)); });
}
inline Vec to_float(IVec a) {
  return map([&](int i) { return vcvtq_f32_s32(a.q[i]); });
}
inline IVec to_int(Vec a) {
  return imap([&](int i) { return vcvtnq_s32_f32(a.q[i]); });
}
inline void store_int8(int8_t* p, IVec a) {
  const int16x8_t lo = vcombine_s16(vmovn_s32(a.q[0]), vmovn_s32(a.q[1]));
  const int16x8_t hi = vcombine_s16(vmovn_s32(a.q[2]), vmovn_s32(a.q[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}
inline IVec widen_bytes(int8x16_t bytes) {
  const int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_s8(vget_high_s8(bytes));
  return {{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)), vmovl_s16(vget_low_s16(hi)),
           vmovl_s16(vget_high_s16(hi))}};
}
inline IVec load_int8(const int8_t* p) { return widen_bytes(vld1q_s8(p)); }
// levels[] of the low and of the high nibbles of 16 bytes.
inline IVec pick_low(const int8_t* levels, const uint8_t* p) {
  return widen_bytes(vqtbl1q_s8(vld1q_s8(levels), vandq_u8(vld1q_u8(p), vdupq_n_u8(15))));
}
inline IVec pick_high(const int8_t* levels, const uint8_t* p) {
  return widen_bytes(vqtbl1q_s8(vld1q_s8(levels), vshrq_n_u8(vld1q_u8(p), 4)));
}
inline IVec load_uint8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t lo = vmovl_u8(vget_low_u8(bytes)), hi = vmovl_u8(vget_high_u8(bytes));
  const auto wide = [](uint16x4_t half) { return vreinterpretq_s32_u32(vmovl_u16(half)); };
  return {{wide(vget_low_u16(lo)), wide(vget_high_u16(lo)), wide(vget_low_u16(hi)),
           wide(vget_high_u16(hi))}};
}

inline float reduce_add(Vec a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float reduce_max(Vec a) {
  const auto greater = [](float32x4_t x, float32x4_t y) {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
  };
  const float32x4_t four = greater(greater(a.q[0], a.q[2]), greater(a.q[1], a.q[3]));
  const float32x2_t low = vget_low_f32(four), high = vget_high_f32(four);
  const float32x2_t two = vbsl_f32(vcgt_f32(low, high), low, high);
  const float x = vget_lane_f32(two, 0), y = vget_lane_f32(two, 1);
  return x > y ? x : y;
}
inline int32_t reduce_add(IVec a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.q[0], a.q[1]), vaddq_s32(a.q[2], a.q[3])));
}
inline int32_t reduce_max(IVec a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[1]), vmaxq_s32(a.q[2], a.q[3])));
}

inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
