// AVX2, FMA and F16C. Byte products go through maddubs, whose pair sums must stay inside int16:
// unsigned 4-, 5- and 6-bit codes do; signed 8-bit codes do as |code| times sign-adjusted x.
#include "simd/vec_avx2.h"

namespace localllm::avx2 {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 6;
constexpr int kAttentionRows = 3;
constexpr int kByteShift = 0;

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Vectors that may be summed in int16 before widening: 127 * largest code * 2 * count < 2^15.
template <int BITS>
constexpr int sums16() {
  return BITS == 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
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

// 16 pair sums in int16.
template <int BITS>
inline __m256i products(__m256i codes, __m256i x) {
  if (BITS == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
  return _mm256_maddubs_epi16(codes, x);
}

inline __m256i widen(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

template <int BITS>
void unpack(const uint8_t* block, uint8_t* out) {
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * 64 + half * 32),
                          codes_of<BITS>(block, v, half));
}

// Keeps a sum where it is: without this GCC rewrites the chain as a tree and spills its leaves.
inline void pin(__m256i& sum) { __asm__("" : "+x"(sum)); }

// Sums ROWS x 16 dot products; code(v, half) yields the codes, row m's inputs lie at x + m *
// stride.
template <int BITS, int FIRST, int LAST, int ROWS, class Code>
inline __attribute__((always_inline)) void dot_rows(Code code, const int8_t* x, ptrdiff_t stride,
                                                    IVec (&dot)[ROWS]) {
  constexpr int run = sums16<BITS>() < LAST - FIRST ? sums16<BITS>() : LAST - FIRST;
#pragma GCC unroll 8
  for (int first = FIRST; first < LAST; first += run) {
    __m256i lo[ROWS], hi[ROWS];
#pragma GCC unroll 8
    for (int v = first; v < first + run; ++v) {
      const __m256i a = code(v, 0), b = code(v, 1);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const __m256i inputs = broadcast4(x + m * stride + 4 * v);
        const __m256i pa = products<BITS>(a, inputs), pb = products<BITS>(b, inputs);
        lo[m] = v == first ? pa : _mm256_add_epi16(lo[m], pa);
        hi[m] = v == first ? pb : _mm256_add_epi16(hi[m], pb);
        pin(lo[m]);
        pin(hi[m]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const IVec wide = {widen(lo[m]), widen(hi[m])};
      dot[m] = first == FIRST ? wide : add(dot[m], wide);
    }
  }
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_packed(const uint8_t* block, const int8_t* x,
                                                      ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<BITS, FIRST, LAST, ROWS>([&](int v, int half) { return codes_of<BITS>(block, v, half); },
                                    x, stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_panel(const uint8_t* codes, const int8_t* x,
                                                     ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<BITS, FIRST, LAST, ROWS>(
      [&](int v, int half) { return load256(codes + v * 64 + half * 32); }, x, stride, dot);
}

}  // namespace
}  // namespace localllm::avx2

#include "simd/table.h"

namespace localllm {
extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = avx2::make_table("avx2");
}  // namespace localllm
