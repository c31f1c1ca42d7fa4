// Sixteen float lanes as one AVX-512 register (AVX512 F, DQ, BW, VL).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#ifndef LOCALLLM_ISA
#define LOCALLLM_ISA avx512vnni
#endif

namespace localllm::LOCALLLM_ISA {
namespace {

using Vec = __m512;
struct IVec {
  __m512i v;
};
using Mask = __mmask16;

inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline Vec load(const uint16_t* p) { return _mm512_cvtph_ps(load256(p)); }  // float16
inline void store_half(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_bfloat(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
}

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float sqrt1(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_nan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline Mask lanes(int first, int last) {
  const int from = first < 0 ? 0 : first > 16 ? 16 : first;
  const int to = last < from ? from : last > 16 ? 16 : last;
  return static_cast<Mask>((1u << to) - (1u << from));
}
inline Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }

inline IVec bits(Vec a) { return {_mm512_castps_si512(a)}; }
inline Vec from_bits(IVec a) { return _mm512_castsi512_ps(a.v); }
inline IVec set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline IVec load(const int32_t* p) { return {load512(p)}; }
inline IVec add(IVec a, IVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline IVec bit_and(IVec a, IVec b) { return {_mm512_and_si512(a.v, b.v)}; }
inline IVec max(IVec a, IVec b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int N>
inline IVec shift_left(IVec a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
inline IVec shift_right(IVec a) {
  return {_mm512_srai_epi32(a.v, N)};
}
inline Vec to_float(IVec a) { return _mm512_cvtepi32_ps(a.v); }
inline IVec to_int(Vec a) { return {_mm512_cvtps_epi32(a)}; }
inline void store_int8(int8_t* p, IVec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}
inline IVec widen_bytes(__m128i bytes) { return {_mm512_cvtepi8_epi32(bytes)}; }
inline IVec load_int8(const int8_t* p) { return widen_bytes(load128(p)); }
// levels[] of the low and of the high nibbles of 16 bytes.
inline IVec pick_low(const int8_t* levels, const uint8_t* p) {
  const __m128i codes = _mm_and_si128(load128(p), _mm_set1_epi8(15));
  return widen_bytes(_mm_shuffle_epi8(load128(levels), codes));
}
inline IVec pick_high(const int8_t* levels, const uint8_t* p) {
  const __m128i codes = _mm_and_si128(_mm_srli_epi16(load128(p), 4), _mm_set1_epi8(15));
  return widen_bytes(_mm_shuffle_epi8(load128(levels), codes));
}
inline IVec load_uint8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(load128(p))}; }

// The trees are spelled out: their order is part of the arithmetic.
inline float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t reduce_add(IVec a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t reduce_max(IVec a) { return _mm512_reduce_max_epi32(a.v); }

// Into the second level: the first can wait for too few lines at once.
inline __attribute__((always_inline)) void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
