// AArch64 NEON with the dot product and int8 matrix extensions (FEAT_DotProd, FEAT_I8MM). One SMMLA
// multiplies 2 activation rows x 8 inputs with 2 weight rows x 8 inputs: two SDOT's work.
#define LOCALLLM_ISA neon_i8mm
#include "simd/neon_codes.h"

namespace localllm::neon_i8mm {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 4;
constexpr int kAttentionRows = 3;
constexpr int kByteShift = 0;

// Inputs at .. at + 7 of two rows.
inline int8x16_t two_rows(const int8_t* x, ptrdiff_t stride, int at) {
  return vcombine_s8(vld1_s8(x + at), vld1_s8(x + stride + at));
}

// As dot_rows, two rows at a time from four rows on: for a single pair the zips cost as many
// instructions as SMMLA saves.
template <int FIRST, int LAST, int ROWS, class Code>
inline __attribute__((always_inline)) void dot_row_pairs(Code code, const int8_t* x,
                                                         ptrdiff_t stride, IVec (&dot)[ROWS]) {
  constexpr int kPairs = ROWS < 4 ? 0 : ROWS / 2, kSteps = (LAST - FIRST) / 2;
  if constexpr (kPairs > 0) {
    int8x16_t inputs[kPairs][kSteps];
    for (int p = 0; p < kPairs; ++p)
      for (int s = 0; s < kSteps; ++s)
        inputs[p][s] = two_rows(x + 2 * p * stride, stride, 4 * FIRST + 8 * s);
    each_quarter<ROWS>([&](int quarter) __attribute__((always_inline)) {
      int32x4_t low[kPairs], high[kPairs];
      for (int p = 0; p < kPairs; ++p) low[p] = high[p] = vdupq_n_s32(0);
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) {
        // Four inputs of each of four weight rows, twice: zipped, eight of two rows.
        const int32x4_t even = vreinterpretq_s32_s8(code(FIRST + 2 * s, quarter));
        const int32x4_t odd = vreinterpretq_s32_s8(code(FIRST + 2 * s + 1, quarter));
        const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(even, odd));
        const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(even, odd));
        for (int p = 0; p < kPairs; ++p) {
          low[p] = vmmlaq_s32(low[p], inputs[p][s], first);
          high[p] = vmmlaq_s32(high[p], inputs[p][s], second);
        }
      }
      for (int p = 0; p < kPairs; ++p) {  // [row 2p | row 2p + 1] back to rows
        const int64x2_t a = vreinterpretq_s64_s32(low[p]), b = vreinterpretq_s64_s32(high[p]);
        dot[2 * p].q[quarter] = vreinterpretq_s32_s64(vzip1q_s64(a, b));
        dot[2 * p + 1].q[quarter] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
      }
    });
  }
  constexpr int kLeft = ROWS - 2 * kPairs;
  if constexpr (kLeft > 0)
    dot_rows<FIRST, LAST, kLeft>(code, x + 2 * kPairs * stride, stride, dot + 2 * kPairs);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_packed(const uint8_t* block, const int8_t* x,
                                                      ptrdiff_t stride, IVec (&dot)[ROWS]) {
  const auto code = [&](int v, int quarter) { return codes_of<BITS>(block, v, quarter); };
  dot_row_pairs<FIRST, LAST>(code, x, stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dot_panel(const uint8_t* codes, const int8_t* x,
                                                     ptrdiff_t stride, IVec (&dot)[ROWS]) {
  const auto code = [&](int v, int quarter) { return bytes_of(codes, v, quarter); };
  dot_row_pairs<FIRST, LAST>(code, x, stride, dot);
}

}  // namespace
}  // namespace localllm::neon_i8mm

#include "simd/table.h"

namespace localllm {
extern const Kernels kNeonI8mmKernels;
const Kernels kNeonI8mmKernels = neon_i8mm::make_table("neon_i8mm");
}  // namespace localllm
