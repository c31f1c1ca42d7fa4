#include "core/cpu_features.h"

#include <cstdint>
#include <cstdlib>

#include "simd/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace localllm {

#if defined(__x86_64__)

namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// Register state the operating system saves on a context switch.
uint64_t read_xcr0() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the AMX tile state only to a process that asks.
bool request_amx() {
#if defined(__linux__)
  constexpr int arch_req_xcomp_perm = 0x1023;
  constexpr int xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

constexpr int kOsxsave = 27, kAvx = 28;  // of leaf 1's ecx

bool bit(unsigned word, int n) { return (word >> n) & 1u; }

bool is_intel() {
  const Registers vendor = cpuid(0, 0);
  return vendor.ebx == 0x756e6547 && vendor.edx == 0x49656e69 && vendor.ecx == 0x6c65746e;
}

}  // namespace

std::vector<std::string> features_of(const X86Cpu& cpu, bool (*request_amx)()) {
  std::vector<std::string> names;
  const bool ymm = (cpu.xcr0 & 0x6) == 0x6;
  const bool zmm = (cpu.xcr0 & 0xe6) == 0xe6;
  const bool tiles = (cpu.xcr0 & 0x60000) == 0x60000;
  if (!ymm || !bit(cpu.basic_ecx, kAvx)) return names;
  names.push_back("avx");
  if (bit(cpu.basic_ecx, 12)) names.push_back("fma");
  if (bit(cpu.basic_ecx, 29)) names.push_back("f16c");
  if (bit(cpu.seven_ebx, 5)) names.push_back("avx2");
  if (bit(cpu.seven_one_eax, 4)) names.push_back("avx_vnni");
  if (zmm) {
    if (bit(cpu.seven_ebx, 16)) names.push_back("avx512f");
    if (bit(cpu.seven_ebx, 17)) names.push_back("avx512dq");
    if (bit(cpu.seven_ebx, 30)) names.push_back("avx512bw");
    if (bit(cpu.seven_ebx, 31)) names.push_back("avx512vl");
    if (bit(cpu.seven_ecx, 11)) names.push_back("avx512_vnni");
    if (bit(cpu.seven_one_eax, 5)) names.push_back("avx512_bf16");
  }
  if (tiles && bit(cpu.seven_edx, 24) && request_amx()) {
    if (bit(cpu.seven_edx, 25)) names.push_back("amx_int8");
    if (bit(cpu.seven_edx, 22)) names.push_back("amx_bf16");
  }
  return names;
}

std::vector<std::string> usable_cpu_features() {
  X86Cpu cpu;
  cpu.basic_ecx = cpuid(1, 0).ecx;
  // Without OSXSAVE nothing is saved, and reading XCR0 is an illegal instruction.
  if (!bit(cpu.basic_ecx, kOsxsave)) return {};
  cpu.xcr0 = read_xcr0();
  const Registers seven = cpuid(7, 0);
  cpu.seven_ebx = seven.ebx, cpu.seven_ecx = seven.ecx, cpu.seven_edx = seven.edx;
  if (seven.eax >= 1) cpu.seven_one_eax = cpuid(7, 1).eax;
  return features_of(cpu, request_amx);
}

#elif defined(__aarch64__)

std::vector<std::string> usable_cpu_features() {
  std::vector<std::string> names{"neon"};
#if defined(__linux__)
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);
  if (hwcap & (1ul << 20)) names.push_back("dotprod");  // HWCAP_ASIMDDP
  if (hwcap & (1ul << 10)) names.push_back("fp16");     // HWCAP_ASIMDHP
  if (hwcap2 & (1ul << 13)) names.push_back("i8mm");    // HWCAP2_I8MM
#elif defined(__APPLE__)
  const auto has = [](const char* key) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  if (has("hw.optional.arm.FEAT_DotProd")) names.push_back("dotprod");
  if (has("hw.optional.arm.FEAT_FP16")) names.push_back("fp16");
  if (has("hw.optional.arm.FEAT_I8MM")) names.push_back("i8mm");
#endif
  return names;
}

#else

std::vector<std::string> usable_cpu_features() { return {}; }

#endif

namespace {

// Intel's prefetcher loses itself between a panel's codes and tables: 1.4 to 1.7 x as fast with
// this. AMD's does not, and is held up by being asked (docs/native-notes.md).
ptrdiff_t usual_ahead() {
#if defined(__x86_64__)
  if (is_intel()) return 4096;
#endif
  return 0;
}

}  // namespace

ptrdiff_t stream_ahead() {
  static const ptrdiff_t distance = [] {
    const char* wish = std::getenv("LOCALLLM_STREAM_AHEAD");
    return wish ? ptrdiff_t{std::atoi(wish)} : usual_ahead();
  }();
  return distance;
}

}  // namespace localllm
