// What the sampler does with a whole row of logits: block maxima, sums of exponentials, noise.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

float block_max(const float* x, int n, float* out) {
  const Vec lowest = set1(-__builtin_inff());
  const IVec no_sign = set1(int32_t{0x7fffffff});
  Vec all = lowest;
  IVec largest = set1(int32_t{0});
  for (int first = 0; first < n; first += kSampleBlock) {
    const int count = n - first < kSampleBlock ? n - first : kSampleBlock;
    Vec top = lowest;
    each_vec(count, [&](int i, auto part) {
      const Vec v = select(valid(part), load(x + first + i, part), lowest);
      top = max(top, v);
      largest = max(largest, bit_and(bits(v), no_sign));
    });
    out[first / kSampleBlock] = reduce_max(top);
    all = max(all, top);
  }
  // Compared as integers, a NaN is larger than infinity.
  return reduce_max(largest) > 0x7f800000 ? __builtin_nanf("") : reduce_max(all);
}

double exp_sum_below(const float* x, int n, float below, float from, float factor) {
  const Vec limit = set1(below), center = set1(from), f = set1(factor);
  double sum = 0.0;
  for (int first = 0; first < n; first += 1024) {
    Vec part_sum = zero();
    each_vec(n - first < 1024 ? n - first : 1024, [&](int i, auto part) {
      const Vec v = load(x + first + i, part);
      const Vec e = exp2(mul(sub(v, center), f));
      part_sum = add(part_sum, select(valid(part), select(less(v, limit), e, zero()), zero()));
    });
    sum += static_cast<double>(reduce_add(part_sum));
  }
  return sum;
}

// Words of 32 bits in lanes of 64, whose upper halves may hold anything.
#if defined(__AVX512F__)
using Words = __m512i;
inline Words words_of(uint32_t x) { return _mm512_set1_epi64(x); }
inline Words counted(uint32_t x) {
  return _mm512_add_epi64(words_of(x), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
inline Words multiply(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
inline Words lower(Words a) { return _mm512_and_si512(a, words_of(0xffffffffu)); }
inline void store(uint64_t* p, Words a) { _mm512_storeu_si512(p, a); }
inline Words larger(Words a, Words b) { return _mm512_max_epu64(a, b); }
#elif defined(__AVX2__)
using Words = __m256i;
inline Words words_of(uint32_t x) { return _mm256_set1_epi64x(x); }
inline Words counted(uint32_t x) {
  return _mm256_add_epi64(words_of(x), _mm256_set_epi64x(3, 2, 1, 0));
}
inline Words multiply(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) {
  return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
}
inline Words lower(Words a) { return _mm256_and_si256(a, words_of(0xffffffffu)); }
inline void store(uint64_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline Words larger(Words a, Words b) { return _mm256_max_epu32(a, b); }  // upper halves are 0
#else
using Words = uint64_t;
inline Words words_of(uint32_t x) { return x; }
inline Words counted(uint32_t x) { return x; }
inline Words multiply(Words a, Words b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
inline Words upper(Words a) { return a >> 32; }
inline Words exclusive(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words lower(Words a) { return a & 0xffffffffu; }
inline void store(uint64_t* p, Words a) { *p = a; }
inline Words larger(Words a, Words b) { return a > b ? a : b; }
#endif

uint64_t noise_words(uint32_t first, uint32_t position, uint64_t seed, uint64_t* words) {
  constexpr int lanes = static_cast<int>(sizeof(Words) / sizeof(uint64_t));
  constexpr int together = lanes == 1 ? 1 : 2;
  const Words m0 = words_of(0xD2511F53u), m1 = words_of(0xCD9E8D57u);
  Words largest = words_of(0);
  for (int at = 0; at < kSampleBlock / 4; at += lanes * together) {
    Words c0[together], c1[together], c2[together], c3[together];
    for (int i = 0; i < together; ++i) {
      c0[i] = counted(first + static_cast<uint32_t>(at + i * lanes));
      c1[i] = words_of(position);
      c2[i] = c3[i] = words_of(0);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Words key0 = words_of(k0), key1 = words_of(k1);
      for (int i = 0; i < together; ++i) {
        const Words p0 = multiply(c0[i], m0), p1 = multiply(c2[i], m1);
        c0[i] = exclusive(upper(p1), c1[i], key0);
        c2[i] = exclusive(upper(p0), c3[i], key1);
        c1[i] = p1;
        c3[i] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < together; ++i) {
      const Words w[4] = {lower(c0[i]), lower(c1[i]), lower(c2[i]), lower(c3[i])};
      for (int word = 0; word < 4; ++word) {
        store(words + word * (kSampleBlock / 4) + at + i * lanes, w[word]);
        largest = larger(largest, w[word]);
      }
    }
  }
  uint64_t each[lanes], result = 0;
  store(each, largest);
  for (int i = 0; i < lanes; ++i) result = each[i] > result ? each[i] : result;
  return result;
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
