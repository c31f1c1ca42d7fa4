// Which instruction sets may be executed here: what the CPU has and the kernel saves.
#pragma once

#include <string>
#include <vector>

namespace localllm {

// Names such as "avx2", "fma", "avx512_vnni", "amx_int8", "neon", "dotprod", "i8mm".
std::vector<std::string> usable_cpu_features();

}  // namespace localllm
