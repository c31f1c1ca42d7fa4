// AVX2, FMA and F16C. Byte products go through maddubs, whose pair sums must stay inside int16:
// unsigned 4-, 5- and 6-bit codes do; signed 8-bit codes do as |code| times sign-adjusted x.
#include "simd/codes256.h"

namespace localllm::avx2 {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 6;
constexpr int kAttentionRows = 3;
constexpr int kByteShift = 0;

// Vectors that may be summed in int16 before widening: 127 * largest code * 2 * count < 2^15.
template <int BITS>
constexpr int sums16() {
  return BITS == 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
}

// 16 pair sums in int16.
template <int BITS>
inline __m256i products(__m256i codes, __m256i x) {
  if (BITS == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
  return _mm256_maddubs_epi16(codes, x);
}

inline __m256i widen(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

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
