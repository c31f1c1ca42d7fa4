// Every access that the compiled program reports: is it allowed, and what does it cost?
#pragma once
#include "image.h"
#include "races.h"
#include "traffic.h"

static bool on_own_stack(u64 address) { return address - (u64)running->stack < STACK; }

[[noreturn]] static void out_of_reach(u64 address, u64 bytes, bool store, u64 pc) {
  Region *r = neighbour_of(address);
  if (r && first_fault(OUT_OF_BOUNDS, pc)) {
    report->region = r->index;
    report->in_threadgroup = r->space == THREADGROUP;
    report->offset = (int64_t)(address - r->base);
  } else if (first_fault(WILD_POINTER, pc)) {
    report->offset = address;
  }
  report->bytes = bytes;
  report->is_write = store;
  stop();
}

static void access(u64 address, u64 bytes, bool store, bool atomic, u64 pc) {
  if (on_own_stack(address) || !bytes) return;
  Region *r = region_of(address);
  if (!r) {
    if (!store && !in_arena(address) && in_image(address)) { // a table in constant memory
      report->loaded[CONSTANT] += bytes;
      return;
    }
    if (running && address - (u64)running->stack + PAGE < PAGE) fault(STACK_OVERFLOW, pc);
    out_of_reach(address, bytes, store, pc);
  }
  u64 offset = address - r->base;
  if (offset + bytes > r->bytes || (store && !r->writable)) {
    if (first_fault(offset + bytes > r->bytes ? OUT_OF_BOUNDS : WRITE_TO_READ_ONLY, pc)) {
      report->region = r->index;
      report->in_threadgroup = r->space == THREADGROUP;
      report->offset = offset;
      report->bytes = bytes;
      report->is_write = store;
    }
    stop();
  }
  if (store) r->stored += bytes, report->stored[r->space] += bytes;
  else r->loaded += bytes, report->loaded[r->space] += bytes;
  if (r->races) {
    if (store) store_races(*r, offset, bytes, atomic, pc);
    else load_races(*r, offset, bytes, atomic, pc);
  }
  if (r->space == THREADGROUP) {
    u32 size = bytes < 255 ? bytes : 255;
    bank_trails[running->index].add({(u32)pc, (u32)(r->packed + offset) << 8 | size});
  } else {
    traffic(*r, offset, bytes, store);
  }
}

#define MSL_CALL extern "C" __attribute__((visibility("default")))
#define MSL_PC ((u64)__builtin_return_address(0))
static void aligned(u64 a, u64 alignment, u64 pc) {
  if (a % alignment == 0 || on_own_stack(a)) return;
  Region *r = region_of(a);
  if (!r || (a - r->base) % alignment == 0) return;
  if (first_fault(MISALIGNED, pc)) {
    report->region = r->index;
    report->in_threadgroup = r->space == THREADGROUP;
    report->offset = a - r->base;
    report->extra = alignment;
  }
  stop();
}

// clang calls these only where the type promises an alignment of its size (of 8 for 16 bytes);
// for all else it calls the ones with N.
#define MSL_ACCESS(BYTES)                                                                        \
  MSL_CALL void __asan_load##BYTES##_noabort(u64 a) {                                            \
    aligned(a, BYTES < 8 ? BYTES : 8, MSL_PC);                                                   \
    access(a, BYTES, false, false, MSL_PC);                                                      \
  }                                                                                              \
  MSL_CALL void __asan_store##BYTES##_noabort(u64 a) {                                           \
    aligned(a, BYTES < 8 ? BYTES : 8, MSL_PC);                                                   \
    access(a, BYTES, true, false, MSL_PC);                                                       \
  }
MSL_ACCESS(1) MSL_ACCESS(2) MSL_ACCESS(4) MSL_ACCESS(8) MSL_ACCESS(16)
MSL_CALL void __asan_loadN_noabort(u64 a, u64 n) { access(a, n, false, false, MSL_PC); }
MSL_CALL void __asan_storeN_noabort(u64 a, u64 n) { access(a, n, true, false, MSL_PC); }
MSL_CALL void *__asan_memcpy(void *to, const void *from, u64 n) {
  access((u64)from, n, false, false, MSL_PC);
  access((u64)to, n, true, false, MSL_PC);
  return memmove(to, from, n);
}
MSL_CALL void *__asan_memmove(void *to, const void *from, u64 n) {
  access((u64)from, n, false, false, MSL_PC);
  access((u64)to, n, true, false, MSL_PC);
  return memmove(to, from, n);
}
MSL_CALL void *__asan_memset(void *to, int value, u64 n) {
  access((u64)to, n, true, false, MSL_PC);
  return memset(to, value, n);
}
MSL_CALL void __asan_handle_no_return() {}

// Before an atomic operation, whose own accesses are not reported.
MSL_CALL void msl_atomic(u64 a, u32 bytes, u32 load, u32 store) {
  report->atomics++;
  if (!launch->watch) return;
  if (load) access(a, bytes, false, true, MSL_PC);
  if (store) access(a, bytes, true, true, MSL_PC);
}

// ir.py puts it before each load and store of a vector: no address may be less aligned.
MSL_CALL void msl_aligned(u64 a, u64 alignment) { aligned(a, alignment, MSL_PC); }
