// AArch64 NEON with the dot product extension (Armv8.2 FEAT_DotProd).
#include "simd/neon_codes.h"

namespace localllm::neon {
namespace {

constexpr int kStreamRows = 4;
constexpr int kTileRows = 4;
constexpr int kBiasRows = 1;
constexpr int kDenseRows = 4;
constexpr int kAttentionRows = 3;
constexpr int kByteShift = 0;

template <int BITS, int FIRST, int LAST, int ROWS>
inline void dot_packed(const uint8_t* block, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  const auto code = [&](int v, int quarter) { return codes_of<BITS>(block, v, quarter); };
  dot_rows<FIRST, LAST, ROWS>(code, x, stride, dot);
}

template <int BITS, int FIRST, int LAST, int ROWS>
inline void dot_panel(const uint8_t* codes, const int8_t* x, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  const auto code = [&](int v, int quarter) { return bytes_of(codes, v, quarter); };
  dot_rows<FIRST, LAST, ROWS>(code, x, stride, dot);
}

}  // namespace
}  // namespace localllm::neon

#include "simd/table.h"

namespace localllm {
extern const Kernels kNeonKernels;
const Kernels kNeonKernels = neon::make_table("neon");
}  // namespace localllm
