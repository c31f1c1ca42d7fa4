// Threads of a pool while cores are lent to others.
#include "core/lending.h"

#include <atomic>
#include <chrono>
#include <set>

#include "core/threads.h"
#include "expect.h"

using localllm::lend_cores;
using localllm::ThreadPool;

namespace {

constexpr double kShortOfForgotten = 0.3, kLong = 20;  // seconds

std::atomic<unsigned char> borrowers[2];
const auto* const bytes = reinterpret_cast<const uint8_t*>(borrowers);

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The threads that take part within so many seconds, or until these have.
std::set<int> working(ThreadPool* pool, double seconds, const std::set<int>& until = {}) {
  std::atomic<bool> seen[8] = {};
  std::set<int> found;
  for (const double end = now() + seconds; now() < end && (until.empty() || found != until);) {
    pool->parallel(64, 1, [&](int, int, int thread) {
      seen[thread] = true;
      for (const double chunk = now() + 20e-6; now() < chunk;) {
      }
    });
    for (int i = 0; i < 8; ++i)
      if (seen[i]) found.insert(i);
  }
  return found;
}

}  // namespace

int main() {
  ThreadPool pool(3);
  const std::set<int> all{0, 1, 2};
  expect(working(&pool, kLong, all) == all, "a pool does not use its threads");

  lend_cores(bytes, 2, 3);
  expect(working(&pool, kLong, all) == all, "threads rest though nobody needs their core");
  borrowers[1] = 1;
  expect(working(&pool, kShortOfForgotten).count(2) == 0, "one core is lent and its thread works");
  expect(working(&pool, kLong, all) == all, "a core is lent for ever");
  borrowers[1] = 0;
  expect(working(&pool, kLong, all) == all, "a core is not taken back");
  borrowers[0] = borrowers[1] = 1;
  expect(working(&pool, kShortOfForgotten) == std::set<int>{0}, "two cores are lent");
  borrowers[0] = 0;
  expect(working(&pool, kLong, {0, 1}).count(1) == 1, "one of two cores is not taken back");

  borrowers[1] = 0;
  working(&pool, 0.01);
  lend_cores(bytes, 2, 4);  // a core more than the pool has threads
  borrowers[0] = 1;
  expect(working(&pool, kShortOfForgotten, all) == all, "a spare core is not lent first");
  borrowers[1] = 1;
  expect(working(&pool, 0.1).count(2) == 0, "of two cores lent only one is spare");
  return 0;
}
