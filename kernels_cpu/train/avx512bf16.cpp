// AVX-512 with BF16 (Zen 4, Cooper Lake and newer): products of bfloat16.
#define LOCALLLM_ISA train_avx512bf16
#include "train/vec_bfloat.h"

namespace localllm::train_avx512bf16 {
namespace {

constexpr int kRows = 8;  // rows and
constexpr int kVecs = 3;  // sixteens of columns of a tile

}  // namespace
}  // namespace localllm::train_avx512bf16

#include "train/elements_bfloat.h"
#include "train/table.h"

namespace localllm::train {
extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = train_avx512bf16::make_train_table("avx512_bf16");
}  // namespace localllm::train
