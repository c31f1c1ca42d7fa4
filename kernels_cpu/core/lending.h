// A core for whoever needs one at once, as an interface does that draws while a model generates.
//
// If it takes one unasked, it pushes a thread of ours off in the middle of a chunk, and all others
// wait until that thread runs again: the engine stands still for as long. If it says so first, the
// pools do without one thread meanwhile and go on.
#pragma once

#include <cstdint>

namespace localllm {

// From now on the `count` bytes are looked at, which must live as long as the process and which
// others may write at any time: each that is not 0 borrows a core. processors: what this process
// may use at once; while a pool has fewer threads, the rest is lent first.
void lend_cores(const uint8_t* borrowers, int count, int processors);

// Of a pool's threads, how many may work now; at least 1. Cores that are not given back within half
// a second count as forgotten, until every byte is 0 again.
int threads_left(int threads);

}  // namespace localllm
