// Plain C++.
#define LOCALLLM_SLOW_FMA  // fma() is a call to the library here
#include "simd/vec_scalar.h"

namespace localllm::scalar {
namespace {

constexpr int kRows = 4;  // rows and
constexpr int kVecs = 1;  // sixteens of columns of a tile

}  // namespace
}  // namespace localllm::scalar

#include "train/elements_float.h"
#include "train/table.h"

namespace localllm::train {
extern const Kernels kScalar;
const Kernels kScalar = scalar::make_train_table("scalar");
}  // namespace localllm::train
