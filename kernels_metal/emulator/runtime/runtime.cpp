// Runs one dispatch of a compiled kernel: threadgroup after threadgroup, each thread a fiber.
#include "checks.h"
#include "simd.h"
#include "watch.h"
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>

static sigjmp_buf in_main;

MSL_CALL u32 msl_builtin(u32 which) { // the numbers are those of lower.py
  Thread *t = running;
  u32 axis = which % 3;
  u32 local[3] = {t->x, t->y, t->z};
  switch (which) {
  case 0: case 1: case 2: return group_at[axis] * group_full[axis] + local[axis];
  case 3: case 4: case 5: return local[axis];
  case 6: case 7: case 8: return group_at[axis];
  case 9: case 10: case 11: return launch->grid[axis];
  case 12: case 13: case 14: return group_size[axis];
  case 15: case 16: case 17: return group_full[axis];
  case 18: case 19: case 20: return groups[axis];
  case 21: return t->index;
  case 22: return t->lane;
  case 23: return t->simd;
  case 24: return simd_count;
  case 25: return SIMD;
  case 26: return t->index % 4;
  case 27: return t->index / 4;
  case 28: return (thread_count + 3) / 4;
  case 29: return (group_full[0] * group_full[1] * group_full[2] + SIMD - 1) / SIMD;
  }
  return 0;
}

MSL_CALL u64 msl_buffer(u32 index) { return regions[index].base; }

MSL_CALL void msl_fault(u32 kind, u32 extra) { fault((Kind)kind, MSL_PC, extra); }

static void fiber() {
  launch->entry();
  thread_returns();
  block();
  stop();
}

static void on_signal(int number, siginfo_t *info, void *) {
  u64 address = (u64)info->si_addr;
  if (!running) { // not a kernel's doing
    signal(number, SIG_DFL);
    return;
  }
  bool memory = number == SIGSEGV || number == SIGBUS;
  Region *r = memory ? neighbour_of(address) : nullptr;
  u64 below = (u64)running->stack - address;
  if (memory && below - 1 < PAGE) {
    first_fault(STACK_OVERFLOW, 0);
  } else if (r && address - r->base < r->bytes) {
    if (first_fault(WRITE_TO_READ_ONLY, 0)) report->region = r->index;
    report->offset = address - r->base;
  } else if (r) {
    if (first_fault(OUT_OF_BOUNDS, 0)) {
      report->region = r->index;
      report->in_threadgroup = r->space == THREADGROUP;
      report->offset = (int64_t)(address - r->base);
    }
  } else if (memory) {
    if (first_fault(WILD_POINTER, 0)) report->offset = address;
  } else if (first_fault(SIGNAL, 0)) {
    report->extra = number;
  }
  running = nullptr;
  siglongjmp(in_main, 1);
}

static void run_threadgroup() {
  thread_count = 1;
  for (int i = 0; i < 3; i++) {
    u32 rest = launch->grid[i] - group_at[i] * group_full[i];
    group_size[i] = rest < group_full[i] ? rest : group_full[i];
    thread_count *= group_size[i];
  }
  simd_count = (thread_count + SIMD - 1) / SIMD;
  live_threads = thread_count;
  arrived_threads = 0;
  group_epoch[0] = group_epoch[1] = 0;
  group_serial++;
  report->threadgroups++;
  report->threads += thread_count;
  for (u32 i = buffer_regions; i < region_count; i++) // all ones: NaN in half, bfloat and float
    memset((void *)regions[i].base, 0xff, regions[i].bytes);
  memset(ready, 0, sizeof ready);
  for (u32 i = 0; i < thread_count; i++) {
    Thread &t = threads[i];
    t.index = i;
    t.lane = i % SIMD;
    t.simd = i / SIMD;
    t.x = i % group_size[0];
    t.y = i / group_size[0] % group_size[1];
    t.z = i / (group_size[0] * group_size[1]);
    t.waiting = AT_NOTHING;
    t.phase = 0;
    set_ready(i);
    give_stack(t, fiber);
  }
  for (u32 i = 0; i < simd_count; i++) {
    Simdgroup &s = simdgroups[i];
    s.size = s.live = thread_count - i * SIMD < SIMD ? thread_count - i * SIMD : SIMD;
    s.arrived = s.mask = 0;
    s.epoch[0] = s.epoch[1] = 0;
  }
  running = nullptr;
  go_to(next_ready());
  running = nullptr;
  if (launch->watch)
    for (u32 i = 0; i < simd_count; i++) banks_step(i);
}

static void run_grid() {
  for (int i = 0; i < 3; i++) {
    group_full[i] = launch->group[i] < launch->grid[i] ? launch->group[i] : launch->grid[i];
    groups[i] = (launch->grid[i] + group_full[i] - 1) / group_full[i];
  }
  for (group_at[2] = 0; group_at[2] < groups[2]; group_at[2]++)
    for (group_at[1] = 0; group_at[1] < groups[1]; group_at[1]++)
      for (group_at[0] = 0; group_at[0] < groups[0]; group_at[0]++) {
        run_threadgroup();
        if (report->kind) return;
      }
}

static void *race_cells(u64 bytes) { // zero pages, taken only where they are touched
  return mmap(nullptr, bytes * sizeof(Race) + 1, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static Race arena_cells[MAX_REGIONS * 16 + 64 * 1024]; // for 32 KiB and what rounding adds

static void set_up() {
  region_count = 0;
  last_region = nullptr;
  for (u32 i = 0; i < launch->buffer_count; i++) place_buffer(launch->buffers[i], i);
  buffer_regions = region_count;
  place_variables();
  if (!launch->watch) return;
  for (u32 i = 0; i < region_count; i++) {
    Region &r = regions[i];
    if (r.space == THREADGROUP) r.races = arena_cells + r.packed;
    else if (r.writable) r.races = (Race *)race_cells(r.bytes);
  }
  for (BankTrail &trail : bank_trails) trail.count = 0;
  begin_traffic();
}

static void take_down() {
  if (launch->watch) end_traffic();
  for (u32 i = 0; i < buffer_regions; i++) {
    Region &r = regions[i];
    Buffer &b = launch->buffers[i];
    b.loaded = r.loaded;
    b.stored = r.stored;
    if (r.races) {
      if (!report->kind && !r.initialised)
        for (u64 k = 0; k < r.bytes; k++) b.unwritten += !r.races[k].written;
      munmap(r.races, r.bytes * sizeof(Race) + 1);
    }
    free(r.resident);
    free(r.touched);
    if (b.writable) memcpy(b.data, (void *)r.base, r.bytes);
    munmap(r.map, r.map_bytes);
  }
}

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};

MSL_CALL int msl_run(Launch *l, Report *r) {
  launch = l;
  report = r;
  running = nullptr;
  random_state = l->seed;
  if ((u64)l->group[0] * l->group[1] * l->group[2] > MAX_THREADS) {
    r->kind = TOO_MANY_THREADS;
    return 1;
  }
  static char other_stack[65536];
  stack_t stack = {}, old_stack;
  stack.ss_sp = other_stack;
  stack.ss_size = sizeof other_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {}, old[5];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  find_image();
  set_up();
  for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, &old[i]);
  if (sigsetjmp(in_main, 1) == 0) run_grid();
  running = nullptr;
  for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &old[i], nullptr);
  take_down();
  if (r->pc) r->pc -= image_base;
  sigaltstack(&old_stack, nullptr);
  return r->kind != NONE;
}
