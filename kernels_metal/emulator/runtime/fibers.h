// Every thread of a threadgroup is a fiber. Threadgroups run one after another, in grid order.
#pragma once
#include "abi.h"
#include <string.h>
#include <sys/mman.h>

static const u32 MAX_THREADS = 1024, SIMD = 32, STACK = 128 * 1024, PAGE = 4096;

// Saves the callee-saved registers and the stack pointer in *from, goes on at `to`.
extern "C" void msl_switch(void **from, void *to) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
__asm__(".text\n.globl msl_switch\n.hidden msl_switch\n.type msl_switch,@function\nmsl_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
        ".size msl_switch,.-msl_switch\n");
#elif defined(__aarch64__)
__asm__(".text\n.globl msl_switch\n.hidden msl_switch\n.type msl_switch,%function\nmsl_switch:\n"
        "sub sp,sp,#176\n"
        "stp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
        "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
        "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
        "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
        "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
        "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\n"
        "ldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\nadd sp,sp,#176\nret\n"
        ".size msl_switch,.-msl_switch\n");
#else
#error "fibers are written for x86-64 and arm64"
#endif

enum Waiting : u8 { AT_NOTHING, AT_SIMD, AT_SIMD_BARRIER, AT_BARRIER, RETURNED };

struct Thread {
  void *sp;
  char *stack; // lowest address, above a guard page
  u32 index, lane, simd;
  u32 x, y, z; // position in the threadgroup
  u32 active;  // lanes that took part in the last simdgroup operation
  u8 waiting, phase;
};

static Thread threads[MAX_THREADS];
static Thread *running;
static u32 thread_count;
static void *main_sp;
static Launch *launch;
static Report *report;
static u32 group_size[3], groups[3], group_at[3], group_full[3];
static u32 random_state;
static u64 ready[MAX_THREADS / 64]; // one bit a thread

static inline void set_ready(u32 i) { ready[i / 64] |= 1ull << (i % 64); }
static inline void set_blocked(u32 i) { ready[i / 64] &= ~(1ull << (i % 64)); }

// The first ready thread at or after `from`, around the end; MAX_THREADS if there is none.
static u32 ready_from(u32 from) {
  const u32 words = MAX_THREADS / 64;
  u64 word = ready[from / 64] & (~0ull << (from % 64));
  for (u32 k = 0; k <= words; k++) {
    u32 at = (from / 64 + k) % words;
    if (k) word = ready[at];
    if (word) return at * 64 + __builtin_ctzll(word);
  }
  return MAX_THREADS;
}

static u32 ready_until(u32 from) { // the last at or before `from`, around the start
  const u32 words = MAX_THREADS / 64;
  u64 word = ready[from / 64] & (~0ull >> (63 - from % 64));
  for (u32 k = 0; k <= words; k++) {
    u32 at = (from / 64 + words - k) % words;
    if (k) word = ready[at];
    if (word) return at * 64 + 63 - __builtin_clzll(word);
  }
  return MAX_THREADS;
}

static Thread *next_ready() {
  u32 at = running ? running->index : 0, found;
  if (launch->order == FORWARD) {
    found = ready_from(at);
  } else if (launch->order == REVERSE) {
    found = ready_until(running ? at : thread_count - 1);
  } else {
    random_state = random_state * 1664525u + 1013904223u;
    found = ready_from((random_state >> 8) % thread_count);
  }
  return found == MAX_THREADS ? nullptr : &threads[found];
}

static void go_to(Thread *to) {
  Thread *from = running;
  if (to == from) return;
  report->switches++;
  running = to;
  msl_switch(from ? &from->sp : &main_sp, to->sp);
}

static void back_to_main() {
  Thread *from = running;
  running = nullptr;
  msl_switch(&from->sp, main_sp);
}

static void give_stack(Thread &t, void (*start)()) {
  if (!t.stack) {
    char *map = (char *)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(map, PAGE, PROT_NONE);
    t.stack = map + PAGE;
  }
  u64 *sp = (u64 *)(t.stack + STACK);
#if defined(__x86_64__)
  *--sp = 0; // where a caller's return address would be
  *--sp = (u64)start;
  for (int i = 0; i < 6; i++) *--sp = 0;
#else
  sp -= 22;
  memset(sp, 0, 176);
  sp[11] = (u64)start;
#endif
  t.sp = sp;
}
