// Two threads, one byte, at least one store, and no barrier between them.
//
// Within a threadgroup a threadgroup_barrier whose flags name the memory orders all threads, a
// simdgroup_barrier those of one simdgroup. Operations such as simd_sum order no memory. Threads
// of different threadgroups are never ordered. Atomics race only with plain accesses.
#pragma once
#include "memory.h"
#include "sync.h"

struct Race {
  u32 writer_group, write_epoch, write_simd_epoch;
  u32 reader_group, read_epoch, read_simd_epoch;
  u32 reader_simds; // who read since read_epoch began
  u16 writer, reader;
  u8 written, write_atomic;
  u8 read, read_by_others, read_by_groups, read_atomic;
};

static u32 group_serial; // of the threadgroup that runs; never used again

struct Now {
  u32 epoch, simd_epoch;
  u16 thread;
  u32 simd;
};

static Now now_in(const Region &r) {
  u32 which = r.space == THREADGROUP ? 0 : 1;
  return {group_epoch[which], simdgroups[running->simd].epoch[which], (u16)running->index,
          running->simd};
}

[[noreturn]] static void race(const Region &r, u64 offset, u64 bytes, bool store, u64 pc,
                              u32 other, u32 other_serial, bool other_store) {
  if (first_fault(RACE, pc)) {
    report->region = r.index;
    report->in_threadgroup = r.space == THREADGROUP;
    report->offset = offset;
    report->bytes = bytes;
    report->is_write = store;
    report->other_thread = other;
    report->other_group = group_serial - other_serial; // how many threadgroups ago
    report->other_write = other_store;
  }
  stop();
}

static bool after_write(const Race &c, const Now &now) {
  if (c.writer_group != group_serial) return false;
  if (c.writer == now.thread || c.write_epoch != now.epoch) return true;
  return c.writer / SIMD == now.simd && c.write_simd_epoch != now.simd_epoch;
}

static void load_races(Region &r, u64 offset, u64 bytes, bool atomic, u64 pc) {
  Now now = now_in(r);
  bool shared = r.space == THREADGROUP;
  for (Race *c = r.races + offset; c < r.races + offset + bytes; c++) {
    bool written = c->written && (!shared || c->writer_group == group_serial);
    if (!written && !r.initialised) {
      report->uninitialised++;
      if (launch->initialised) {
        if (first_fault(UNINITIALISED, pc)) {
          report->region = r.index;
          report->in_threadgroup = shared;
          report->offset = offset;
          report->bytes = bytes;
        }
        stop();
      }
    }
    if (written && !(c->write_atomic && atomic) && !after_write(*c, now))
      race(r, offset, bytes, false, pc, c->writer, c->writer_group, true);
    if (c->read && c->reader_group == group_serial && c->read_epoch == now.epoch) {
      if (c->reader / SIMD == now.simd && c->read_simd_epoch == now.simd_epoch) {
        if (c->reader != now.thread) c->read_by_others = 1;
      } else {
        c->read_by_others = 0;
      }
      c->read_atomic &= atomic;
    } else {
      if (c->read && c->reader_group != group_serial && !shared) c->read_by_groups = 1;
      c->read = 1;
      c->read_by_others = 0;
      c->reader_simds = 0;
      c->read_atomic = atomic;
      c->reader_group = group_serial;
      c->read_epoch = now.epoch;
    }
    c->reader = now.thread;
    c->read_simd_epoch = now.simd_epoch;
    c->reader_simds |= 1u << now.simd;
  }
}

static bool before_write(const Race &c, const Now &now, bool shared) { // were all reads?
  if (!c.read) return true;
  if (c.reader_group != group_serial) return shared;
  if (c.read_by_groups && !shared) return false;
  if (c.read_epoch != now.epoch) return true;
  if (c.reader_simds & ~(1u << now.simd)) return false;
  if (c.read_simd_epoch != now.simd_epoch) return true;
  return !c.read_by_others && c.reader == now.thread;
}

static void store_races(Region &r, u64 offset, u64 bytes, bool atomic, u64 pc) {
  Now now = now_in(r);
  bool shared = r.space == THREADGROUP;
  for (Race *c = r.races + offset; c < r.races + offset + bytes; c++) {
    bool written = c->written && (!shared || c->writer_group == group_serial);
    if (written && !(c->write_atomic && atomic) && !after_write(*c, now))
      race(r, offset, bytes, true, pc, c->writer, c->writer_group, true);
    if (!(c->read && c->read_atomic && atomic) && !before_write(*c, now, shared))
      race(r, offset, bytes, true, pc, c->reader, c->reader_group, false);
    c->written = 1;
    c->write_atomic = atomic;
    c->writer = now.thread;
    c->writer_group = group_serial;
    c->write_epoch = now.epoch;
    c->write_simd_epoch = now.simd_epoch;
    c->read = c->read_by_groups = 0;
  }
}
