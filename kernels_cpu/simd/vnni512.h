// Exact byte dot products with AVX512-VNNI: u8 codes times s8 activations, summed in int32.
#pragma once

#include "simd/vec_avx512.h"

namespace localllm::LOCALLLM_ISA {
namespace {

// 8-bit codes are stored signed and enter as code + 128, since one side must be unsigned.
constexpr int kByteShift = 128;

// Vector v of a packed block: the codes of inputs 4v .. 4v+3 of 16 rows.
template <int BITS>
inline __m512i codes_of(const uint8_t* block, int v) {
  if constexpr (BITS == 8) {
    return _mm512_xor_si512(load512(block + v * 64), _mm512_set1_epi8(static_cast<char>(0x80)));
  } else {
    const __m512i pair = load512(block + v / 2 * 64);
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_and_si512(v & 1 ? _mm512_srli_epi16(pair, 4) : pair, nibble);
    if constexpr (BITS == 4) return low;
    constexpr int high_bits = BITS - 4;
    const int from = BITS == 5 ? v : 2 * (v % 4);
    const __m512i high = load512(block + 256 + (BITS == 5 ? 0 : v / 4 * 64));
    const __m512i moved = from < 4 ? _mm512_slli_epi16(high, static_cast<unsigned>(4 - from))
                                   : _mm512_srli_epi16(high, static_cast<unsigned>(from - 4));
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << high_bits) - 1) << 4));
    return _mm512_or_si512(low, _mm512_and_si512(moved, mask));
  }
}

template <int BITS>
void unpack(const uint8_t* block, uint8_t* out) {
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) {
    const __m512i codes = BITS == 8 ? load512(block + v * 64) : codes_of<BITS>(block, v);
    _mm512_storeu_si512(out + v * 64, codes);
  }
}

inline __m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

template <int FIRST, int LAST, int ROWS, class Code>
inline __attribute__((always_inline)) void dot_rows(Code code, const int8_t* x, ptrdiff_t stride,
                                                    IVec (&dot)[ROWS]) {
  // One row has one chain a block: two sums hide its latency.
  constexpr int kSums = ROWS == 1 ? 2 : 1;
  __m512i sum[ROWS][kSums];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
    for (int i = 0; i < kSums; ++i) sum[m][i] = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int v = FIRST; v < LAST; ++v) {
    const __m512i codes = code(v);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
      sum[m][v % kSums] =
          _mm512_dpbusd_epi32(sum[m][v % kSums], codes, broadcast4(x + m * stride + 4 * v));
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
    dot[m].v = kSums == 1 ? sum[m][0] : _mm512_add_epi32(sum[m][0], sum[m][kSums - 1]);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_packed(const uint8_t* block, const int8_t* x,
                                                      ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>([&](int v) { return codes_of<BITS>(block, v); }, x, stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_panel(const uint8_t* codes, const int8_t* x,
                                                     ptrdiff_t stride, IVec (&dot)[ROWS]) {
  const auto code = [&](int v) {
    return BITS == 8 ? codes_of<8>(codes, v) : load512(codes + v * 64);
  };
  dot_rows<FIRST, LAST>(code, x, stride, dot);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
