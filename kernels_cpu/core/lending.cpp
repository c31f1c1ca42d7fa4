#include "core/lending.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace localllm {

namespace {

constexpr int64_t kLongest = 500'000'000;  // nanoseconds

const volatile uint8_t* borrowers_ = nullptr;
int processors_ = 0;
std::atomic<int> count_{0};      // set last: it publishes the two above
std::atomic<int64_t> since_{0};  // when a core was lent first, 0: none is

int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

}  // namespace

void lend_cores(const uint8_t* borrowers, int count, int processors) {
  count_.store(0);
  borrowers_ = borrowers;
  processors_ = processors;
  count_.store(count, std::memory_order_release);
}

int threads_left(int threads) {
  const int count = count_.load(std::memory_order_acquire);
  if (count == 0) return threads;
  int lent = 0;
  for (int i = 0; i < count; ++i) lent += borrowers_[i] != 0;
  if (lent == 0) {
    if (since_.load(std::memory_order_relaxed) != 0) since_.store(0, std::memory_order_relaxed);
    return threads;
  }
  const int64_t now = nanoseconds();
  int64_t since = since_.load(std::memory_order_relaxed);
  if (since == 0) since_.store(since = now, std::memory_order_relaxed);
  if (now - since > kLongest) return threads;
  return std::max(1, std::min(threads, processors_ - lent));
}

}  // namespace localllm
