// NEON: products of float32.
#define LOCALLLM_ISA train_neon
#include "simd/vec_neon.h"

namespace localllm::train_neon {
namespace {

constexpr int kRows = 6;  // rows and
constexpr int kVecs = 1;  // sixteens of columns of a tile

}  // namespace
}  // namespace localllm::train_neon

#include "train/elements_float.h"
#include "train/table.h"

namespace localllm::train {
extern const Kernels kNeon;
const Kernels kNeon = train_neon::make_train_table("neon");
}  // namespace localllm::train
