// AMX with BF16 (Sapphire Rapids and newer): products of bfloat16 in tiles, the rest on AVX-512.
#define LOCALLLM_ISA train_amxbf16
#define LOCALLLM_AMX_TILES
#include "train/vec_bfloat.h"

namespace localllm::train_amxbf16 {
namespace {

constexpr int kRows = 16;  // rows and
constexpr int kVecs = 3;   // sixteens of columns of a tile

}  // namespace
}  // namespace localllm::train_amxbf16

#include "train/elements_bfloat.h"
#include "train/table.h"

namespace localllm::train {
extern const Kernels kAmxBf16;
const Kernels kAmxBf16 = train_amxbf16::make_train_table("amx_bf16");
}  // namespace localllm::train
