#include "core/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "core/memory.h"
#include "core/threads.h"

namespace localllm {

namespace {

constexpr size_t kChunk = size_t{1} << 20;
constexpr int kLanes = 16;  // sums that do not wait for each other, several vectors of them
constexpr int kLeastPasses = 5, kMostPasses = 200;
constexpr double kSeconds = 0.4;

uint64_t sum_of(const uint8_t* data, size_t bytes) {
  uint64_t sums[kLanes] = {};
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  for (size_t i = 0; i + kLanes <= bytes / sizeof(uint64_t); i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += words[i + static_cast<size_t>(lane)];
  uint64_t all = 0;
  for (const uint64_t sum : sums) all += sum;
  return all;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double read_bandwidth(size_t bytes, int threads) {
  const size_t whole = std::max<size_t>(1, bytes / kChunk) * kChunk;
  const Region region = Region::allocate(whole);
  ThreadPool pool(threads);
  // Untouched pages all are the one page of zeros, which the caches hold.
  pool.parallel(static_cast<int>(whole / kChunk), 1, [&](int first, int last, int) {
    const auto chunks = static_cast<size_t>(last - first);
    std::memset(region.data() + static_cast<size_t>(first) * kChunk, 1, chunks * kChunk);
  });
  return read_bandwidth(region.data(), whole, &pool);
}

double read_bandwidth(const uint8_t* data, size_t bytes, ThreadPool* pool) {
  const size_t chunks = bytes / kChunk;
  const auto each = [&](auto&& f) {
    pool->parallel(static_cast<int>(chunks), 1, [&](int first, int last, int) {
      for (int i = first; i < last; ++i) f(data + static_cast<size_t>(i) * kChunk);
    });
  };
  std::atomic<uint64_t> sink{0};  // so that no compiler leaves the reading out
  double best = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int pass = 0; pass < kMostPasses; ++pass) {
    if (pass >= kLeastPasses && seconds_since(start) > kSeconds) break;
    const auto began = std::chrono::steady_clock::now();
    each([&](const uint8_t* chunk) {
      sink.fetch_add(sum_of(chunk, kChunk), std::memory_order_relaxed);
    });
    best = std::max(best, static_cast<double>(chunks * kChunk) / seconds_since(began));
  }
  return best;
}

}  // namespace localllm
