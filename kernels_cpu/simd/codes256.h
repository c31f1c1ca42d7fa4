// Packed codes as 256-bit vectors of bytes.
#pragma once

#include "simd/kernels.h"
#include "simd/vec_avx2.h"

namespace localllm::LOCALLLM_ISA {
namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Half (0 or 1: rows 0-7 or 8-15) of vector v of a packed block.
template <int BITS>
inline __m256i codes_of(const uint8_t* block, int v, int half) {
  const int at = half * 32;
  if (BITS == 8) return load256(block + v * 64 + at);
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i pair = load256(block + v / 2 * 64 + at);
  const __m256i low = _mm256_and_si256(v & 1 ? _mm256_srli_epi16(pair, 4) : pair, nibble);
  if (BITS == 4) return low;
  const auto to_bit4 = [](__m256i bits, int from, int mask) {
    const __m256i moved =
        from < 4 ? _mm256_slli_epi16(bits, 4 - from) : _mm256_srli_epi16(bits, from - 4);
    return _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
  };
  if (BITS == 5) return _mm256_or_si256(low, to_bit4(load256(block + 256 + at), v, 0x10));
  const __m256i twos = load256(block + 256 + v / 4 * 64 + at);
  return _mm256_or_si256(low, to_bit4(twos, 2 * (v % 4), 0x30));
}

template <int BITS>
void unpack(const uint8_t* block, uint8_t* out) {
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * 64 + half * 32),
                          codes_of<BITS>(block, v, half));
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
