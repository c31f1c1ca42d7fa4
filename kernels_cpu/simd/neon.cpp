// AArch64 NEON with the dot product extension (Armv8.2 FEAT_DotProd).
#include "simd/vec_neon.h"

namespace localllm::neon {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 4;
constexpr int kAttentionRows = 3;
constexpr int kByteShift = 0;

// Quarter (0-3: rows 4q .. 4q+3) of vector v of a packed block. Codes below 64 are also signed.
template <int BITS>
inline int8x16_t codes_of(const uint8_t* block, int v, int quarter) {
  const int at = quarter * 16;
  if (BITS == 8) return vreinterpretq_s8_u8(vld1q_u8(block + v * 64 + at));
  const uint8x16_t pair = vld1q_u8(block + v / 2 * 64 + at);
  uint8x16_t code = v & 1 ? vshrq_n_u8(pair, 4) : vandq_u8(pair, vdupq_n_u8(15));
  if (BITS == 5 || BITS == 6) {
    const int from = BITS == 5 ? v : 2 * (v % 4);
    const uint8_t* high = block + 256 + (BITS == 5 ? 0 : v / 4 * 64) + at;
    const uint8x16_t moved = vshlq_u8(vld1q_u8(high), vdupq_n_s8(static_cast<int8_t>(4 - from)));
    code = vorrq_u8(code, vandq_u8(moved, vdupq_n_u8(BITS == 5 ? 0x10 : 0x30)));
  }
  return vreinterpretq_s8_u8(code);
}

template <int BITS>
void unpack(const uint8_t* block, uint8_t* out) {
  for (int v = 0; v < 8; ++v)
    for (int quarter = 0; quarter < 4; ++quarter)
      vst1q_u8(out + v * 64 + quarter * 16, vreinterpretq_u8_s8(codes_of<BITS>(block, v, quarter)));
}

inline int8x16_t broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <int FIRST, int LAST, int ROWS, class Code>
inline void dot_rows(Code code, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  for (int m = 0; m < ROWS; ++m) dot[m] = set1(int32_t{0});
  for (int v = FIRST; v < LAST; ++v)
    for (int i = 0; i < 4; ++i) {
      const int8x16_t codes = code(v, i);
      for (int m = 0; m < ROWS; ++m)
        dot[m].q[i] = vdotq_s32(dot[m].q[i], codes, broadcast4(x + m * stride + 4 * v));
    }
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline void dot_packed(const uint8_t* block, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>([&](int v, int i) { return codes_of<BITS>(block, v, i); }, x, stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline void dot_panel(const uint8_t* codes, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>(
      [&](int v, int i) { return vreinterpretq_s8_u8(vld1q_u8(codes + v * 64 + i * 16)); }, x,
      stride, dot);
}

}  // namespace
}  // namespace localllm::neon

#include "simd/table.h"

namespace localllm {
extern const Kernels kNeonKernels;
const Kernels kNeonKernels = neon::make_table("neon");
}  // namespace localllm
