// Which tables of kernels this machine can run.
#pragma once

#include <string>
#include <vector>

#include "simd/kernels.h"

namespace localllm {

// Names of the tables usable here, slowest first; always holds "scalar".
std::vector<std::string> usable_kernels();

// The named table, or null when it is unknown or this machine cannot run it.
const Kernels* find_kernels(const std::string& name);

}  // namespace localllm
