// Products of bfloat16 pairs, summed in float32 (AVX512-BF16). With LOCALLLM_EMULATE the same is
// plain C++, for tests on machines without it.
#pragma once

#include <cstring>

namespace localllm::LOCALLLM_ISA {
namespace {

using Elem = uint16_t;
constexpr int kPair = 2;

inline Vec load_elem(const Elem* p) { return load_bfloat(p); }
inline float to_float(Elem x) {
  const uint32_t u = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline Elem to_elem(float x) {  // nearest even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<Elem>((u >> 16) | 0x40);
  return static_cast<Elem>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#ifdef LOCALLLM_EMULATE

inline void store_elem(Elem* p, const Vec& a) {
  float lanes16[16];
  store(lanes16, a);
  for (int i = 0; i < 16; ++i) p[i] = to_elem(lanes16[i]);
}
struct Operand {
  Vec even, odd;
};
inline Operand load_operand(const Elem* p) {
  float even[16], odd[16];
  for (int i = 0; i < 16; ++i) even[i] = to_float(p[2 * i]), odd[i] = to_float(p[2 * i + 1]);
  return {load(even), load(odd)};
}
inline Operand broadcast(const Elem* p) { return {set1(to_float(p[0])), set1(to_float(p[1]))}; }
inline Vec multiply_add(const Operand& a, const Operand& b, const Vec& c) {
  return fma(a.even, b.even, fma(a.odd, b.odd, c));
}
inline void store_steps(Elem* p, ptrdiff_t, const Vec& even, const Vec& odd) {
  float first[16], second[16];
  store(first, even), store(second, odd);
  for (int i = 0; i < 16; ++i) p[2 * i] = to_elem(first[i]), p[2 * i + 1] = to_elem(second[i]);
}

#else

inline void store_elem(Elem* p, const Vec& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
}
using Operand = __m512i;
inline Operand load_operand(const Elem* p) { return _mm512_loadu_si512(p); }
inline Operand broadcast(const Elem* p) {
  int pair;
  std::memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}
inline Vec multiply_add(Operand a, Operand b, Vec c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
inline void store_steps(Elem* p, ptrdiff_t, const Vec& even, const Vec& odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // evens, then odds
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
}

#endif

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
