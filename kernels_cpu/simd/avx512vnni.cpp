// AVX-512 with VNNI (Ice Lake, Zen 4 and newer).
#include "simd/vnni512.h"

namespace localllm::avx512vnni {
namespace {

constexpr int kStreamRows = 8;
constexpr int kTileRows = 8;
constexpr int kBiasRows = 8;
constexpr int kDenseRows = 8;
constexpr int kAttentionRows = 8;

}  // namespace
}  // namespace localllm::avx512vnni

#include "simd/table.h"

namespace localllm {
extern const Kernels kAvx512VnniKernels;
const Kernels kAvx512VnniKernels = avx512vnni::make_table("avx512_vnni");
}  // namespace localllm
