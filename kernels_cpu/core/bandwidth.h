// How fast this machine reads memory: the roof over every decode step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/threads.h"

namespace localllm {

// Bytes per second that `threads` threads together read from a buffer of `bytes` in huge pages;
// the best of several passes. Throws std::bad_alloc.
double read_bandwidth(size_t bytes, int threads);
// The same of memory that is there, a megabyte at least.
double read_bandwidth(const uint8_t* data, size_t bytes, ThreadPool* pool);

}  // namespace localllm
