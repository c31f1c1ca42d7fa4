// AVX2 with AVX-VNNI (Alder Lake, Zen 5 and newer): byte dot products on 256-bit vectors.
#define LOCALLLM_ISA avxvnni
#include "simd/codes256.h"

namespace localllm::avxvnni {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 6;
constexpr int kAttentionRows = 3;
// 8-bit codes are stored signed and enter as code + 128, since one side must be unsigned.
constexpr int kByteShift = 128;

inline __m256i multiply_add(__m256i sum, __m256i codes, __m256i x) {
#ifdef LOCALLLM_EMULATE
  return _mm256_dpbusd_epi32(sum, codes, x);  // the same instruction in AVX-512's encoding
#else
  return _mm256_dpbusd_avx_epi32(sum, codes, x);
#endif
}

template <int FIRST, int LAST, int ROWS, class Code>
inline __attribute__((always_inline)) void dot_rows(Code code, const int8_t* x, ptrdiff_t stride,
                                                    IVec (&dot)[ROWS]) {
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) dot[m] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
  for (int v = FIRST; v < LAST; ++v) {
    const __m256i lo = code(v, 0), hi = code(v, 1);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const __m256i inputs = broadcast4(x + m * stride + 4 * v);
      dot[m].lo = multiply_add(dot[m].lo, lo, inputs);
      dot[m].hi = multiply_add(dot[m].hi, hi, inputs);
    }
  }
}

template <int BITS>
inline __m256i unsigned_codes(__m256i codes) {
  return BITS == 8 ? _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80))) : codes;
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_packed(const uint8_t* block, const int8_t* x,
                                                      ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>(
      [&](int v, int half) { return unsigned_codes<BITS>(codes_of<BITS>(block, v, half)); }, x,
      stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_panel(const uint8_t* codes, const int8_t* x,
                                                     ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>(
      [&](int v, int half) { return unsigned_codes<BITS>(load256(codes + v * 64 + half * 32)); }, x,
      stride, dot);
}

}  // namespace
}  // namespace localllm::avxvnni

#include "simd/table.h"

namespace localllm {
extern const Kernels kAvxVnniKernels;
const Kernels kAvxVnniKernels = avxvnni::make_table("avx_vnni");
}  // namespace localllm
