// AdamW with the roundings of its NumPy formula: every operation in float32, none fused.
#pragma once

#include <cstddef>

namespace localllm::train {

struct AdamW {
  float beta1, rest1, beta2, rest2;  // rest: 1 - beta
  float keep;                        // 1 - learning rate * decay
  float rate, correction2, eps;      // rate: learning rate * c1
};

void adamw(const AdamW& s, float* parameters, const float* gradient, float* m, float* v, size_t n);

}  // namespace localllm::train
