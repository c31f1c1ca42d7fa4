// A pool of threads that share out numbered chunks of work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/lending.h"

namespace localllm {

// Processors this process may really use: affinity, cgroup quota, and one per physical core.
int default_threads();

// Flushes denormals on the calling thread while alive, as every pool thread does.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  uint64_t saved_;
};

// One caller at a time. Chunks are claimed from an atomic counter, and a job is over when its
// chunks are done, so a thread that got no processor time is never waited for. While cores are lent
// (lending.h) the last threads claim none.
class ThreadPool {
 public:
  // Starts threads - 1 workers; fewer where the system refuses to start more.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Until told otherwise, all work stays on the caller's thread.
  void set_alone(bool alone) { alone_ = alone; }
  // Seconds the caller waited for others since the last call.
  double take_waited() { return std::exchange(waited_, 0.0); }

  // f(first, last, thread) over [0, n) in chunks of `grain`; returns when all are done.
  template <class F>
  void parallel(int n, int grain, const F& f) {
    if (n <= 0) return;
    if (alone_ || n <= grain || threads_left(size()) == 1) {
      f(0, n, 0);
      return;
    }
    run(n, grain, &f, [](const void* context, int first, int last, int thread) {
      (*static_cast<const F*>(context))(first, last, thread);
    });
  }

 private:
  using Function = void (*)(const void* context, int first, int last, int thread);

  void run(int n, int grain, const void* context, Function function);
  void work(int thread);
  bool may_work(int thread) const { return thread < threads_left(size()); }
  bool claim_one(uint64_t expected_job, int thread);
  uint64_t wait_for_job(uint64_t seen, int thread);
  void wait_until_done();
  void wait_for_workers();

  // The job number in the high half, chunks still to be claimed in the low half. Claiming by
  // compare-and-swap on both keeps a late thread from touching a job it did not see begin.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stop_{false};
  bool alone_ = false;
  double waited_ = 0;

  // Written before the ticket that announces them; stable until their job is done.
  int items_ = 0, grain_ = 1, chunks_ = 0;
  const void* context_ = nullptr;
  Function function_ = nullptr;

  std::mutex mutex_;
  std::condition_variable work_ready_, work_done_;
  std::vector<std::thread> workers_;
};

}  // namespace localllm
