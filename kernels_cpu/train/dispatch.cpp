#include "train/dispatch.h"

#include <algorithm>

#include "core/cpu_features.h"

namespace localllm::train {

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#ifdef LOCALLLM_AVX512BF16
extern const Kernels kAvx512Bf16;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  std::vector<std::string> needs;
};

// Slowest first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {
      {&kScalar, {}},
#if defined(__x86_64__)
      {&kAvx2, {"avx2", "fma", "f16c"}},
      {&kAvx512, {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"}},
#ifdef LOCALLLM_AVX512BF16
      {&kAvx512Bf16,
       {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16"}},
#endif
#elif defined(__aarch64__)
      {&kNeon, {"neon"}},
#endif
  };
  return all;
}

bool usable(const Candidate& c) {
  static const std::vector<std::string> features = usable_cpu_features();
  return std::all_of(c.needs.begin(), c.needs.end(), [](const std::string& need) {
    return std::find(features.begin(), features.end(), need) != features.end();
  });
}

}  // namespace

std::vector<std::string> usable_kernels() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (usable(c)) names.push_back(c.kernels->name);
  return names;
}

const Kernels* find_kernels(const std::string& name) {
  for (const Candidate& c : candidates())
    if (c.kernels->name == name && usable(c)) return c.kernels;
  return nullptr;
}

}  // namespace localllm::train
