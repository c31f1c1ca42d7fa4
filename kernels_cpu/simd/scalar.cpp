// Plain C++: runs everywhere, and is the definition the other instruction sets are tested against.
#include "simd/vec_scalar.h"

namespace localllm::scalar {
namespace {

constexpr int kStreamRows = 2;
constexpr int kTileRows = 2;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 2;
constexpr int kAttentionRows = 3;
constexpr int kByteShift = 0;

// Code block layout, see pack.cpp: low nibbles, then the high bits of 5- and 6-bit codes.
template <int BITS>
inline int code_at(const uint8_t* block, int v, int byte) {
  if (BITS == 8) return static_cast<int8_t>(block[v * 64 + byte]);
  const int pair = block[v / 2 * 64 + byte];
  int code = v & 1 ? pair >> 4 : pair & 15;
  if (BITS == 5) code |= ((block[256 + byte] >> v) & 1) << 4;
  if (BITS == 6) code |= ((block[256 + v / 4 * 64 + byte] >> (2 * (v % 4))) & 3) << 4;
  return code;
}

template <int BITS>
void unpack(const uint8_t* block, uint8_t* out) {
  for (int v = 0; v < 8; ++v)
    for (int i = 0; i < 64; ++i) out[v * 64 + i] = static_cast<uint8_t>(code_at<BITS>(block, v, i));
}

template <int FIRST, int LAST, int ROWS, class Code>
void dot_rows(Code code, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  for (int m = 0; m < ROWS; ++m) dot[m] = {};
  for (int v = FIRST; v < LAST; ++v)
    for (int i = 0; i < 64; ++i)
      for (int m = 0; m < ROWS; ++m) dot[m].v[i / 4] += code(v, i) * x[m * stride + 4 * v + i % 4];
}

template <int BITS, int FIRST, int LAST, int ROWS>
void dot_packed(const uint8_t* block, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>([&](int v, int i) { return code_at<BITS>(block, v, i); }, x, stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
void dot_panel(const uint8_t* codes, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  dot_rows<FIRST, LAST>([&](int v, int i) { return static_cast<int8_t>(codes[v * 64 + i]); }, x,
                        stride, dot);
}

}  // namespace
}  // namespace localllm::scalar

#include "simd/table.h"

namespace localllm {
extern const Kernels kScalarKernels;
const Kernels kScalarKernels = scalar::make_table("scalar");
}  // namespace localllm
