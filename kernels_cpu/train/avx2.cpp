// AVX2 and FMA: products of float32.
#define LOCALLLM_ISA train_avx2
#include "simd/vec_avx2.h"

namespace localllm::train_avx2 {
namespace {

constexpr int kRows = 6;  // rows and
constexpr int kVecs = 1;  // sixteens of columns of a tile

}  // namespace
}  // namespace localllm::train_avx2

#include "train/elements_float.h"
#include "train/table.h"

namespace localllm::train {
extern const Kernels kAvx2;
const Kernels kAvx2 = train_avx2::make_train_table("avx2");
}  // namespace localllm::train
