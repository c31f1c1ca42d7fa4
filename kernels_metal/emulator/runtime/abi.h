// What Python and the runtime hand each other. program.py mirrors these structs with ctypes.
#pragma once
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum Space : u32 { DEVICE = 0, CONSTANT = 1, THREADGROUP = 2 };
enum Order : u32 { FORWARD = 0, REVERSE = 1, RANDOM = 2 };

// The numbers are part of the interface: faults.py has a sentence for each.
enum Kind : u32 {
  NONE = 0,
  OUT_OF_BOUNDS,        // region, offset, bytes
  WILD_POINTER,         // offset: the address
  WRITE_TO_READ_ONLY,   // region, offset, bytes
  MISALIGNED,           // region, offset, bytes; extra: the alignment asked for
  RACE,                 // region, offset, bytes; other_*: who touched it before
  UNINITIALISED,        // region, offset, bytes
  DIVERGENT_SIMD,       // lanes of a simdgroup wait at different operations
  DIVERGENT_BARRIER,    // threads wait at different barriers
  BARRIER_AFTER_RETURN, // some threads are gone
  DEADLOCK,             // offset, bytes, extra: threads at a simd op, at a barrier, returned
  INACTIVE_LANE,        // extra: the lane
  PARTIAL_SIMD,         // strict, or an operation that needs all lanes
  DIFFERENT_ARGUMENTS,  // an argument that all lanes must share
  STACK_OVERFLOW,
  ARRAY_INDEX,          // extra: the index; text: the type
  DIVISION_BY_ZERO,
  SHIFT,                // extra: the amount
  MISSING_RETURN,
  FLOAT_TO_INTEGER,     // text: the type
  UNREACHABLE,
  TOO_MANY_THREADS,
  SIGNAL,
};

struct Buffer {
  void *data; // copied in before the run, and out after it if writable
  u64 bytes;
  u32 space; // DEVICE or CONSTANT
  u32 writable;
  u32 initialised; // 0: what it holds before the first store has no meaning
  u32 _pad;
  u64 unwritten; // out: bytes never stored
  u64 loaded, stored; // out: bytes, by instructions
};

struct Variable { // a threadgroup variable
  void *address;
  u64 bytes;
};

struct Launch {
  void (*entry)();
  Buffer *buffers;
  Variable *variables;
  u64 arena, arena_bytes; // the threadgroup variables and the gaps around them
  u64 cache_bytes;
  u32 buffer_count, variable_count;
  u32 grid[3], group[3];
  u32 order, seed, strict;
  u32 low;   // buffers start at a page boundary; else they end at one
  u32 watch; // the program was compiled with its accesses reported
  u32 initialised; // a load of what nothing was stored to is a fault
};

struct Report {
  u64 threads, threadgroups, switches;
  u64 simd_ops, matrix_ops, barriers, simd_barriers, atomics;
  u64 loaded[3], stored[3]; // by Space
  u64 lines_read, lines_written, moved_read, moved_written;
  u64 bank_steps, bank_conflicts, uninitialised;
  u32 kind, region, is_write, in_threadgroup;
  int64_t offset;
  u64 bytes;
  int64_t extra;
  u64 pc; // in the program: from where it is loaded
  u32 thread[3], group[3];
  u32 other_thread, other_group, other_write, has_line;
  u32 line, column;
  char file[128];
  char text[128];
};
