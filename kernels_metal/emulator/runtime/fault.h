// A fault ends the run: it is written down once, and no thread goes on.
#pragma once
#include "fibers.h"

static void note_place() {
  if (!running) return;
  report->thread[0] = running->x;
  report->thread[1] = running->y;
  report->thread[2] = running->z;
  for (int i = 0; i < 3; i++) report->group[i] = group_at[i];
}

static bool first_fault(Kind kind, u64 pc) {
  if (report->kind) return false;
  report->kind = kind;
  report->pc = pc;
  note_place();
  return true;
}

[[noreturn]] static void stop() {
  for (;;) back_to_main(); // never resumed
}

[[noreturn]] static void fault(Kind kind, u64 pc, int64_t extra = 0) {
  if (first_fault(kind, pc)) report->extra = extra;
  stop();
}
