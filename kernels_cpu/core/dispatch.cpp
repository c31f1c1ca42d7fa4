#include "core/dispatch.h"

#include "core/candidates.h"

namespace localllm {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;
#ifdef LOCALLLM_AVXVNNI
extern const Kernels kAvxVnniKernels;
#endif
#ifdef LOCALLLM_AMX
extern const decltype(Kernels::matmul) kAmxMatmul;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kNeonI8mmKernels;
#endif

namespace {

#if defined(__x86_64__)
const Features kAvx2{"avx2", "fma", "f16c"};
const Features kAvx512 =
    with(kAvx2, {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"});

#ifdef LOCALLLM_AMX
// AMX multiplies many rows; AVX-512 does everything else.
const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = kAvx512VnniKernels;
    k.name = "amx_int8";
    k.matmul = kAmxMatmul;
    return k;
  }();
  return kernels;
}
#endif

#ifdef LOCALLLM_EMULATE  // what this machine lacks is emulated, with AVX-512's help
const Features kAvxVnni = kAvx512, kAmx = kAvx512;
#else
const Features kAvxVnni = with(kAvx2, {"avx_vnni"}), kAmx = with(kAvx512, {"amx_int8"});
#endif
#endif

const Candidates<Kernels>& candidates() {
  static const Candidates<Kernels> all({
      {&kScalarKernels, {}},
#if defined(__x86_64__)
      {&kAvx2Kernels, kAvx2},
#ifdef LOCALLLM_AVXVNNI
      {&kAvxVnniKernels, kAvxVnni},
#endif
      {&kAvx512VnniKernels, kAvx512},
#ifdef LOCALLLM_AMX
      {&amx_kernels(), kAmx},
#endif
#elif defined(__aarch64__)
      {&kNeonKernels, {"neon", "dotprod"}},
      {&kNeonI8mmKernels, {"neon", "dotprod", "i8mm"}},
#endif
  });
  return all;
}

}  // namespace

std::vector<std::string> usable_kernels() { return candidates().names(); }

const Kernels* find_kernels(const std::string& name) { return candidates().find(name); }

}  // namespace localllm
