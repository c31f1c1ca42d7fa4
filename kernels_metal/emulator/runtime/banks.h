// Bank conflicts of threadgroup memory, under a model: 32 banks of 4 bytes; the lanes of a
// simdgroup access together where they are at the same instruction for the same time since they
// last met; lanes that touch the same word share it. A step needs as many cycles as the busiest
// bank has distinct words; what is above (distinct words / 32, rounded up) is a conflict.
// Apple publishes no figures of its own; 32 banks of 4 bytes is what others have measured.
#pragma once
#include "fault.h"
#include <stdlib.h>

struct BankAccess { u32 site; u32 where; }; // where: byte offset << 8 | bytes

struct BankTrail {
  BankAccess *list;
  u32 count, room;
  void add(BankAccess access) {
    if (count == room) {
      room = room ? room * 2 : 64;
      list = (BankAccess *)realloc(list, room * sizeof(BankAccess));
    }
    list[count++] = access;
  }
};

static BankTrail bank_trails[MAX_THREADS];

static void bank_step_of(const BankAccess *accesses, u32 count) {
  u32 words[32][SIMD], per_bank[32] = {0}, distinct = 0, worst = 0;
  for (u32 i = 0; i < count; i++) {
    u32 offset = accesses[i].where >> 8, bytes = accesses[i].where & 255;
    if (bytes > 16) bytes = 16;
    for (u32 word = offset / 4; word <= (offset + bytes - 1) / 4; word++) {
      u32 bank = word % 32, k = 0;
      while (k < per_bank[bank] && words[bank][k] != word) k++;
      if (k < per_bank[bank] || k == SIMD) continue;
      words[bank][per_bank[bank]++] = word;
      distinct++;
      if (k + 1 > worst) worst = k + 1;
    }
  }
  report->bank_steps++;
  report->bank_conflicts += worst - (distinct + 31) / 32;
}

// Called where the lanes of a simdgroup meet.
static void banks_step(u32 simd) {
  BankTrail *trails = bank_trails + simd * SIMD;
  u32 next[SIMD] = {0};
  for (;;) {
    BankAccess together[SIMD];
    u32 count = 0, site = 0;
    for (u32 i = 0; i < SIMD; i++) {
      if (next[i] == trails[i].count) continue;
      BankAccess access = trails[i].list[next[i]];
      if (!count) site = access.site;
      if (access.site != site) continue;
      together[count++] = access;
      next[i]++;
    }
    if (!count) break;
    bank_step_of(together, count);
  }
  for (u32 i = 0; i < SIMD; i++) trails[i].count = 0;
}
