// Which instruction sets may be executed here: what the CPU has and the kernel saves.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace localllm {

#if defined(__x86_64__)
// What an x86-64 CPU says of itself, and XCR0: the registers its operating system saves.
struct X86Cpu {
  unsigned basic_ecx = 0;                                // leaf 1
  unsigned seven_ebx = 0, seven_ecx = 0, seven_edx = 0;  // leaf 7
  unsigned seven_one_eax = 0;                            // leaf 7, subleaf 1
  uint64_t xcr0 = 0;
};

// The features that `cpu` has and XCR0 allows. AMX counts only where `request_amx`, which is asked
// last, is granted.
std::vector<std::string> features_of(const X86Cpu& cpu, bool (*request_amx)());
#endif

// Names such as "avx2", "fma", "avx512_vnni", "amx_int8", "neon", "dotprod", "i8mm".
std::vector<std::string> usable_cpu_features();

}  // namespace localllm
