// The governor over made-up steps: it runs alone while that is quicker, and not otherwise.
#include "core/governor.h"

#include "expect.h"

using localllm::Governor;

namespace {

struct Machine {
  double alone, together, lost;  // seconds a step; share of `together` that is lost
};

struct Outcome {
  double seconds = 0;
  int alone = 0, steps = 0;
};

Outcome run(Governor* governor, const Machine& m, double duration, double* now, int rows = 1) {
  Outcome o;
  for (const double end = *now + duration; *now < end; ++o.steps) {
    const bool alone = governor->alone(rows);
    const double seconds = alone ? m.alone : m.together;
    *now += seconds;
    o.seconds += seconds;
    o.alone += alone;
    governor->record(rows, seconds, alone ? 0 : m.lost * seconds, *now);
  }
  return o;
}

}  // namespace

int main() {
  const Machine quiet{0.004, 0.0025, 0.03}, busy{0.004, 0.0075, 0.6}, shared{0.004, 0.003, 0.3};
  double now = 100;
  Governor g;
  expect(run(&g, quiet, 5, &now).alone == 0, "a quiet machine uses all threads");
  int after_moments = 0;
  for (int i = 0; i < 20; ++i) {
    after_moments += run(&g, busy, 0.03, &now).alone;
    after_moments += run(&g, quiet, 0.3, &now).alone;
  }
  expect(after_moments == 0, "what takes a core for a moment changes nothing");
  const Outcome under_load = run(&g, busy, 20, &now);
  expect(under_load.seconds / under_load.steps < 1.05 * busy.alone,
         "beside a neighbour a step takes hardly longer than alone");
  run(&g, quiet, 3, &now);
  expect(run(&g, quiet, 5, &now).alone == 0, "once it has gone all threads are used again");
  const Outcome still_worth = run(&g, shared, 20, &now);
  expect(still_worth.seconds / still_worth.steps < 1.05 * shared.together,
         "lost time alone is no reason while sharing is quicker");
  run(&g, busy, 20, &now);
  expect(run(&g, busy, 5, &now, 200).alone == 0, "large steps always use all threads");
  expect(!g.alone(2), "another number of rows starts afresh");
}
