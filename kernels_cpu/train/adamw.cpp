#include "train/adamw.h"

#include <cmath>

namespace localllm::train {

void adamw(const AdamW& s, float* __restrict p, const float* __restrict g, float* __restrict m,
           float* __restrict v, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    m[i] = s.beta1 * m[i] + s.rest1 * g[i];
    v[i] = s.beta2 * v[i] + s.rest2 * (g[i] * g[i]);
    if (s.keep != 1.0f) p[i] = p[i] * s.keep;
    p[i] = p[i] - s.rate * (m[i] / (std::sqrt(v[i] * s.correction2) + s.eps));
  }
}

}  // namespace localllm::train
