#include "core/threads.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace localllm {

namespace {

// Some 20-50 us of spinning: longer than the gap between two stages of a step, far shorter than
// a scheduler's time slice.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

constexpr uint64_t job_of(uint64_t ticket) { return ticket >> 32; }
constexpr uint32_t left_in(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

}  // namespace

#if defined(__x86_64__)
FlushDenormals::FlushDenormals() : saved_(_mm_getcsr()) {
  _mm_setcsr(static_cast<unsigned>(saved_) | 0x8040);  // FTZ and DAZ
}
FlushDenormals::~FlushDenormals() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FlushDenormals::FlushDenormals() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));  // FZ
}
FlushDenormals::~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
FlushDenormals::FlushDenormals() : saved_(0) {}
FlushDenormals::~FlushDenormals() = default;
#endif

ThreadPool::ThreadPool(int threads) {
  for (int t = 1; t < threads; ++t) {
    try {
      workers_.emplace_back([this, t] { work(t); });
    } catch (const std::system_error&) {
      break;  // a limit on processes: run with what there is
    }
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_ready_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void ThreadPool::run(int n, int grain, const void* context, Function function) {
  items_ = n;
  grain_ = grain;
  chunks_ = (n + grain - 1) / grain;
  context_ = context;
  function_ = function;
  unfinished_.store(chunks_, std::memory_order_relaxed);
  const uint64_t job = (job_of(ticket_.load(std::memory_order_relaxed)) + 1) & 0xffffffff;
  ticket_.store(job << 32 | static_cast<uint32_t>(chunks_));
  if (sleepers_.load() > size() - threads_left(size())) {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ready_.notify_all();
  }
  while (claim_one(job, 0)) {
  }
  wait_until_done();
}

bool ThreadPool::claim_one(uint64_t job, int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (job_of(ticket) != job || left_in(ticket) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                          std::memory_order_acquire));
  const int chunk = chunks_ - static_cast<int>(left_in(ticket));
  const int first = chunk * grain_;
  function_(context_, first, std::min(first + grain_, items_), thread);
  if (unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_done_.notify_one();
  }
  return true;
}

void ThreadPool::wait_until_done() {
  if (unfinished_.load(std::memory_order_acquire) == 0) return;
  const auto start = std::chrono::steady_clock::now();
  wait_for_workers();
  waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void ThreadPool::wait_for_workers() {
  for (int i = 0; i < kSpins; ++i) {
    if (unfinished_.load(std::memory_order_acquire) == 0) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_ = true;
  work_done_.wait(lock, [this] { return unfinished_.load() == 0; });
  caller_sleeps_ = false;
}

uint64_t ThreadPool::wait_for_job(uint64_t seen, int thread) {
  const auto news = [&] {
    const uint64_t ticket = ticket_.load();
    return stop_.load() || (job_of(ticket) != seen && left_in(ticket) > 0 && may_work(thread));
  };
  for (int i = 0; i < kSpins && !news(); ++i) relax();
  if (!news()) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;  // before the last look, so that the caller sees us or we see the job
    work_ready_.wait(lock, news);
    --sleepers_;
  }
  return job_of(ticket_.load(std::memory_order_acquire));
}

void ThreadPool::work(int thread) {
  const FlushDenormals flush;
  uint64_t seen = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    seen = wait_for_job(seen, thread);
    while (may_work(thread) && claim_one(seen, thread)) {
    }
  }
}

}  // namespace localllm
