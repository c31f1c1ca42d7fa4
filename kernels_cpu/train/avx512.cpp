// AVX-512: products of float32.
#define LOCALLLM_ISA train_avx512
#include "simd/vec_avx512.h"

namespace localllm::train_avx512 {
namespace {

constexpr int kRows = 8;  // rows and
constexpr int kVecs = 3;  // sixteens of columns of a tile

}  // namespace
}  // namespace localllm::train_avx512

#include "train/elements_float.h"
#include "train/table.h"

namespace localllm::train {
extern const Kernels kAvx512;
const Kernels kAvx512 = train_avx512::make_train_table("avx512");
}  // namespace localllm::train
