#include "train/dispatch.h"

#include "core/candidates.h"

namespace localllm::train {

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#ifdef LOCALLLM_AVX512BF16
extern const Kernels kAvx512Bf16;
#endif
#ifdef LOCALLLM_AMX
extern const Kernels kAmxBf16;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

namespace {

#if defined(__x86_64__)
const Features kAvx2Needs{"avx2", "fma", "f16c"};
const Features kAvx512Needs = with(kAvx2Needs, {"avx512f", "avx512dq", "avx512bw", "avx512vl"});
#ifdef LOCALLLM_EMULATE  // what this machine lacks is emulated, with AVX2's help
const Features kBf16Needs = kAvx2Needs, kAmxNeeds = kAvx2Needs;
#else
const Features kBf16Needs = with(kAvx512Needs, {"avx512_bf16"});
const Features kAmxNeeds = with(kBf16Needs, {"amx_bf16"});
#endif
#endif

const Candidates<Kernels>& candidates() {
  static const Candidates<Kernels> all({
      {&kScalar, {}},
#if defined(__x86_64__)
      {&kAvx2, kAvx2Needs},
      {&kAvx512, kAvx512Needs},
#ifdef LOCALLLM_AVX512BF16
      {&kAvx512Bf16, kBf16Needs},
#endif
#ifdef LOCALLLM_AMX
      {&kAmxBf16, kAmxNeeds},
#endif
#elif defined(__aarch64__)
      {&kNeon, {"neon"}},
#endif
  });
  return all;
}

}  // namespace

std::vector<std::string> usable_kernels() { return candidates().names(); }

const Kernels* find_kernels(const std::string& name) { return candidates().find(name); }

}  // namespace localllm::train
