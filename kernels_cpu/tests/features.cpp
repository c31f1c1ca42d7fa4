// What counts as usable for made-up processors: nothing that XCR0 does not allow.
#include <algorithm>
#include <cstdio>

#include "core/cpu_features.h"

#if defined(__x86_64__)

using namespace localllm;

namespace {

int failures = 0;

void expect(const char* what, uint64_t xcr0, bool amx_granted, const char* feature, bool wanted) {
  X86Cpu cpu;  // one that has everything
  cpu.basic_ecx = cpu.seven_ebx = cpu.seven_ecx = cpu.seven_edx = cpu.seven_one_eax = ~0u;
  cpu.xcr0 = xcr0;
  const auto names =
      amx_granted ? features_of(cpu, [] { return true; }) : features_of(cpu, [] { return false; });
  if ((std::find(names.begin(), names.end(), feature) != names.end()) == wanted) return;
  std::fprintf(stderr, "%s: %s is %s\n", what, feature, wanted ? "missing" : "claimed");
  ++failures;
}

}  // namespace

int main() {
  constexpr uint64_t x87 = 1, sse = 2, ymm = 4, opmask = 0x20, zmm = 0xc0, tiles = 0x60000;
  constexpr uint64_t avx = x87 | sse | ymm, avx512 = avx | opmask | zmm;
  for (const char* feature : {"avx", "avx2", "fma", "f16c", "avx_vnni"}) {
    expect("no vector state", x87, true, feature, false);
    expect("128 bits only", x87 | sse, true, feature, false);
    expect("without SSE's state", x87 | ymm, true, feature, false);
    expect("256 bits", avx, true, feature, true);
  }
  for (const char* feature : {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}) {
    expect("256 bits", avx, true, feature, false);
    expect("512 bits without masks", avx | zmm, true, feature, false);
    expect("masks without upper halves", avx | opmask | 0x80, true, feature, false);
    expect("512 bits", avx512, true, feature, true);
  }
  for (const char* feature : {"amx_int8", "amx_bf16"}) {
    expect("no tiles", avx512, true, feature, false);
    expect("tile shapes only", avx512 | 0x20000, true, feature, false);
    expect("tiles that the system refuses", avx512 | tiles, false, feature, false);
    expect("tiles", avx512 | tiles, true, feature, true);
  }
  return failures != 0;
}

#else

int main() {}

#endif
