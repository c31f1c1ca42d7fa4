// What moves between memory and the chip: one LRU cache of 128-byte lines in front of the device
// memory, written back. A store to a line that is not there brings nothing in; a load of bytes of
// such a line that were not stored does. Lines end with their buffer.
#pragma once
#include "memory.h"
#include <stdlib.h>

struct Resident {
  u32 older, newer;
  Region *region;
  u64 line;
  u64 stored[2]; // one bit a byte
  bool fetched, dirty;
};

static Resident *residents; // [0] is the head: its `older` is the newest
static u32 resident_count, resident_room;

static void begin_traffic() {
  u32 room = launch->cache_bytes / LINE;
  if (room < 1) room = 1;
  if (room != resident_room) {
    free(residents);
    residents = (Resident *)calloc(room + 1, sizeof(Resident));
    resident_room = room;
  }
  resident_count = 0;
  residents[0].older = residents[0].newer = 0;
}

static u64 bytes_of_line(const Region &r, u64 line) {
  u64 from = line * LINE;
  return r.bytes - from < LINE ? r.bytes - from : LINE;
}

static void unlink(u32 i) {
  Resident &x = residents[i];
  residents[x.newer].older = x.older;
  residents[x.older].newer = x.newer;
}

static void make_newest(u32 i) {
  Resident &x = residents[i], &head = residents[0];
  x.older = head.older;
  x.newer = 0;
  residents[head.older].newer = i;
  head.older = i;
}

static void write_back(Resident &x) {
  if (x.dirty) report->moved_written += bytes_of_line(*x.region, x.line);
}

static u32 admit(Region &r, u64 line) {
  u32 i;
  if (resident_count < resident_room) {
    i = ++resident_count;
  } else {
    i = residents[0].newer; // the oldest
    Resident &x = residents[i];
    write_back(x);
    x.region->resident[x.line] = 0;
    unlink(i);
  }
  residents[i] = {0, 0, &r, line, {0, 0}, false, false};
  r.resident[line] = i;
  make_newest(i);
  return i;
}

static void traffic(Region &r, u64 offset, u64 bytes, bool store) {
  for (u64 line = offset / LINE; line <= (offset + bytes - 1) / LINE; line++) {
    u8 mark = store ? 2 : 1;
    if (!(r.touched[line] & mark)) {
      r.touched[line] |= mark;
      (store ? report->lines_written : report->lines_read)++;
    }
    u32 i = r.resident[line];
    if (!i) i = admit(r, line);
    else if (residents[0].older != i) unlink(i), make_newest(i);
    Resident &x = residents[i];
    if (!store && x.fetched) continue;
    u64 from = offset > line * LINE ? offset - line * LINE : 0;
    u64 to = offset + bytes < (line + 1) * LINE ? offset + bytes - line * LINE : LINE;
    for (int half = 0; half < 2; half++) {
      u64 low = half * 64, a = from > low ? from - low : 0, b = to > low ? to - low : 0;
      if (b > 64) b = 64;
      if (a >= b) continue;
      u64 mask = (b - a == 64 ? ~0ull : (1ull << (b - a)) - 1) << a;
      if (store) {
        x.stored[half] |= mask;
      } else if (mask & ~x.stored[half] && !x.fetched) {
        x.fetched = true;
        report->moved_read += bytes_of_line(r, line);
      }
    }
    if (store) x.dirty = true;
  }
}

static void end_traffic() {
  for (u32 i = residents[0].older; i; i = residents[i].older) write_back(residents[i]);
}
