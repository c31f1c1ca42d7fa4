// The buffers of a dispatch between guard pages, and the threadgroup variables of the program.
#pragma once
#include "fault.h"

struct Race; // races.h

struct Region {
  u64 base, bytes;
  u32 space, index;
  bool writable, initialised;
  u64 loaded, stored;
  Race *races;    // one a byte, where two threads can meet; else null
  u32 *resident;  // one a line of 128 bytes: its place in the cache model + 1
  u8 *touched;    // one a line: 1 read, 2 written
  u64 packed;     // of a threadgroup variable: where it would lie without our gaps
  char *map;
  u64 map_bytes;
};

static const u32 MAX_REGIONS = 256, LINE = 128;
static Region regions[MAX_REGIONS]; // buffers first, threadgroup variables after them
static u32 region_count, buffer_regions;
static Region *last_region;

static bool in_arena(u64 address) { return address - launch->arena < launch->arena_bytes; }

static Region *region_of(u64 address) {
  if (last_region && address - last_region->base < last_region->bytes) return last_region;
  for (u32 i = 0; i < region_count; i++)
    if (address - regions[i].base < regions[i].bytes) return last_region = &regions[i];
  return nullptr;
}

// The buffer that an address just misses; a threadgroup variable for one in the arena.
static Region *neighbour_of(u64 address) {
  Region *best = nullptr;
  u64 nearest = ~0ull;
  bool arena = in_arena(address);
  for (u32 i = 0; i < region_count; i++) {
    Region &r = regions[i];
    if ((r.space == THREADGROUP) != arena) continue;
    if (!arena && address - (u64)r.map >= r.map_bytes) continue;
    u64 gap = address < r.base ? r.base - address : address - (r.base + r.bytes);
    if (gap < nearest) nearest = gap, best = &r;
  }
  return best;
}

static void place_buffer(Buffer &b, u32 index) {
  const u64 page = 65536; // the largest page of any arm64 kernel
  u64 body = (b.bytes + page - 1) / page * page;
  if (!body) body = page;
  Region &r = regions[region_count++];
  memset(&r, 0, sizeof r);
  r.map_bytes = body + 2 * page;
  r.map = (char *)mmap(nullptr, r.map_bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char *from = r.map + page;
  mprotect(from, body, PROT_READ | PROT_WRITE);
  // Metal aligns buffers far more strictly than any type asks for; 16 is the largest of those.
  char *base = launch->low ? from : (char *)((u64)(from + body - b.bytes) & ~15ull);
  memcpy(base, b.data, b.bytes);
  if (!b.writable) mprotect(from, body, PROT_READ);
  r.base = (u64)base;
  r.bytes = b.bytes;
  r.space = b.space;
  r.index = index;
  r.writable = b.writable;
  r.initialised = b.initialised;
  if (!launch->watch) return;
  u64 lines = b.bytes / LINE + 1;
  r.resident = (u32 *)calloc(lines, 4);
  r.touched = (u8 *)calloc(lines, 1);
}

static void place_variables() {
  u64 packed = 0;
  for (u32 i = 0; i < launch->variable_count; i++) {
    Variable &v = launch->variables[i];
    Region &r = regions[region_count++];
    memset(&r, 0, sizeof r);
    r.base = (u64)v.address;
    r.bytes = v.bytes;
    r.space = THREADGROUP;
    r.index = i;
    r.writable = true;
    r.packed = packed;
    packed += (v.bytes + 15) / 16 * 16;
  }
}
