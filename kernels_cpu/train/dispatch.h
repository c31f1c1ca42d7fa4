// The training kernels that run on this machine.
#pragma once

#include <string>
#include <vector>

#include "train/kernels.h"

namespace localllm::train {

std::vector<std::string> usable_kernels();             // slowest first
const Kernels* find_kernels(const std::string& name);  // null where they cannot run

}  // namespace localllm::train
