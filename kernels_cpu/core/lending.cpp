#include "core/lending.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace localllm {

namespace {

constexpr int64_t kLongest = 500'000'000;  // nanoseconds

struct Cores {
  const uint8_t* borrowers;
  int count, processors;
};

std::atomic<const Cores*> cores_{nullptr};  // what was there before stays: a thread may look at it
std::atomic<int64_t> since_{0};             // when a core was lent first, 0: none is

int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

}  // namespace

void lend_cores(const uint8_t* borrowers, int count, int processors) {
  cores_.store(new Cores{borrowers, count, processors}, std::memory_order_release);
}

int threads_left(int threads) {
  const Cores* cores = cores_.load(std::memory_order_acquire);
  if (cores == nullptr) return threads;
  int lent = 0;
  for (int i = 0; i < cores->count; ++i)
    lent += __atomic_load_n(cores->borrowers + i, __ATOMIC_RELAXED) != 0;
  if (lent == 0) {
    if (since_.load(std::memory_order_relaxed) != 0) since_.store(0, std::memory_order_relaxed);
    return threads;
  }
  const int64_t now = nanoseconds();
  int64_t since = since_.load(std::memory_order_relaxed);
  if (since == 0) since_.store(since = now, std::memory_order_relaxed);
  if (now - since > kLongest) return threads;
  return std::max(1, std::min(threads, cores->processors - lent));
}

}  // namespace localllm
