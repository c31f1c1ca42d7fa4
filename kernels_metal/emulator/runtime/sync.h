// Where threads of a threadgroup meet: barriers and the operations of a simdgroup.
#pragma once
#include "banks.h"
#include "fault.h"

static const u32 SLOT = 64; // bytes that a lane hands over at most

struct Simdgroup {
  alignas(64) u8 slot[2][SIMD][SLOT];
  alignas(64) u8 result[2][SIMD][SLOT];
  u32 size, live, arrived, mask;
  u64 site;
  u32 what; // the operation that the first to arrive asked for
  u32 epoch[2]; // memory barriers passed, of threadgroup memory and of device memory
};

static Simdgroup simdgroups[MAX_THREADS / SIMD];
static u32 simd_count, live_threads, arrived_threads, group_epoch[2];
static u64 barrier_site;
static u32 barrier_flags;

static void block() { // the running thread cannot go on
  Thread *me = running;
  set_blocked(me->index);
  if (Thread *next = next_ready()) return go_to(next);
  if (me->waiting == RETURNED && !live_threads) return back_to_main();
  u32 at[5] = {0};
  for (u32 i = 0; i < thread_count; i++) at[threads[i].waiting]++;
  if (first_fault(DEADLOCK, 0)) {
    report->offset = at[AT_SIMD] + at[AT_SIMD_BARRIER];
    report->bytes = at[AT_BARRIER];
    report->extra = at[RETURNED];
  }
  stop();
}

static void wake(u32 first, u32 count, u8 waiting1, u8 waiting2) {
  for (u32 i = first; i < first + count; i++) {
    Thread &t = threads[i];
    if (t.waiting != waiting1 && t.waiting != waiting2) continue;
    t.waiting = AT_NOTHING;
    set_ready(i);
  }
}

static void release(Simdgroup &s, u32 which) {
  if (launch->watch) banks_step(which);
  for (u32 i = 0; i < s.size; i++) threads[which * SIMD + i].active = s.mask;
  s.arrived = s.mask = 0;
  wake(which * SIMD, s.size, AT_SIMD, AT_SIMD_BARRIER);
}

// Returns true for the last lane to arrive, whose part it is to compute and to release.
static bool arrive(Simdgroup &s, u32 what, u64 site) {
  Thread *me = running;
  if (!s.arrived) {
    s.what = what;
    s.site = site;
  } else if (s.what != what || s.site != site) {
    fault(DIVERGENT_SIMD, site);
  }
  s.mask |= 1u << me->lane;
  if (++s.arrived < s.live) return false;
  if (s.live != s.size && launch->strict) fault(PARTIAL_SIMD, site);
  return true;
}

static const u32 SIMD_BARRIER = 0xffff;

static void pass_memory_barrier(u32 *epoch, u32 flags) {
  if (flags & 2) epoch[0]++;
  if (flags & 1) epoch[1]++;
}

extern "C" __attribute__((noinline, visibility("default"))) void msl_simdgroup_barrier(u32 flags) {
  Thread *me = running;
  Simdgroup &s = simdgroups[me->simd];
  if (arrive(s, SIMD_BARRIER, (u64)__builtin_return_address(0))) {
    report->simd_barriers++;
    pass_memory_barrier(s.epoch, flags);
    release(s, me->simd);
  } else {
    me->waiting = AT_SIMD_BARRIER;
    block();
  }
}

extern "C" __attribute__((noinline, visibility("default"))) void msl_threadgroup_barrier(u32 flags) {
  Thread *me = running;
  u64 site = (u64)__builtin_return_address(0);
  if (!arrived_threads) {
    barrier_site = site;
    barrier_flags = flags;
  } else if (barrier_site != site) {
    fault(DIVERGENT_BARRIER, site);
  }
  if (live_threads != thread_count) fault(BARRIER_AFTER_RETURN, site);
  barrier_flags &= flags;
  if (++arrived_threads < live_threads) {
    me->waiting = AT_BARRIER;
    return block();
  }
  report->barriers++;
  arrived_threads = 0;
  pass_memory_barrier(group_epoch, barrier_flags);
  if (launch->watch)
    for (u32 i = 0; i < simd_count; i++) banks_step(i);
  wake(0, thread_count, AT_BARRIER, AT_BARRIER);
}

static void finish_early(Simdgroup &s, u32 which); // simd.h

static void thread_returns() {
  Thread *me = running;
  me->waiting = RETURNED;
  live_threads--;
  Simdgroup &s = simdgroups[me->simd];
  s.live--;
  if (s.arrived && s.arrived == s.live) {
    if (launch->strict) fault(PARTIAL_SIMD, s.site);
    finish_early(s, me->simd);
  }
  if (arrived_threads) fault(BARRIER_AFTER_RETURN, barrier_site);
}
