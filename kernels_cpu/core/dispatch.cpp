#include "core/dispatch.h"

#include <algorithm>

#include "core/cpu_features.h"

namespace localllm {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kNeonI8mmKernels;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  std::vector<std::string> needs;
};

// Slowest first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {
      {&kScalarKernels, {}},
#if defined(__x86_64__)
      {&kAvx2Kernels, {"avx2", "fma", "f16c"}},
#elif defined(__aarch64__)
      {&kNeonKernels, {"neon", "dotprod"}},
      {&kNeonI8mmKernels, {"neon", "dotprod", "i8mm"}},
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

}  // namespace localllm
