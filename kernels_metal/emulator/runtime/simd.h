// Operations of a simdgroup and of a quadgroup: all lanes hand over a value, the last computes.
#pragma once
#include "halves.h"
#include "sync.h"

enum Op : u32 { // msl_runtime.h has the same
  ADD = 0, MUL, MIN, MAX, AND, OR, XOR,           // over all active lanes
  SCAN_ADD = 16, SCAN_ADD_BEFORE, SCAN_MUL, SCAN_MUL_BEFORE,
  SHUFFLE = 32, // argument: the lane
  SHIFT_LANES,  // argument: the lane, or 32 and up for "keep your own"
  FIRST, BALLOT, UNIFORM,
  MATRIX = 48,
  QUAD = 256, // added to ADD … XOR and to the scans
};
enum Type : u32 { I8 = 0, U8, I16, U16, I32, U32, I64, U64, F16, BF16, F32 };

struct Half { u16 bits; };
struct Bfloat { u16 bits; };
static inline float wide(Half x) { return half_to_float(x.bits); }
static inline float wide(Bfloat x) { return __builtin_bit_cast(float, (u32)x.bits << 16); }
template <class T> static inline T wide(T x) { return x; }
template <class T> struct As { template <class W> static T of(W x) { return (T)x; } };
template <> struct As<Half> { static Half of(float x) { return {float_to_half(x)}; } };
template <> struct As<Bfloat> { static Bfloat of(float x) { return {float_to_bfloat(x)}; } };

template <class W> static inline W smaller(W a, W b) { return b < a ? b : a; }
template <class W> static inline W larger(W a, W b) { return a < b ? b : a; }
// As fmin and fmax: a NaN loses against a number.
static inline float smaller(float a, float b) { return __builtin_fminf(a, b); }
static inline float larger(float a, float b) { return __builtin_fmaxf(a, b); }

template <class W> static W bitwise(u32 op, W a, W b) {
  return op == AND ? (W)(a & b) : op == OR ? (W)(a | b) : (W)(a ^ b);
}
static float bitwise(u32, float a, float) { return a; } // the header lets no float come here

template <class T> static T joined(u32 op, T a, T b) {
  auto x = wide(a), y = wide(b);
  using W = decltype(x);
  switch (op) {
  case ADD: return As<T>::of((W)(x + y));
  case MUL: return As<T>::of((W)(x * y));
  case MIN: return As<T>::of(smaller(x, y));
  case MAX: return As<T>::of(larger(x, y));
  }
  return As<T>::of(bitwise(op, x, y));
}

template <class T> static T at(const u8 (*slots)[SLOT], u32 lane, u32 k) {
  T x;
  memcpy(&x, slots[lane] + k * sizeof(T), sizeof(T));
  return x;
}

// A balanced tree over the lanes that take part, in lane order: the hardware's order is not known,
// and a tree of this depth has the error that one must expect.
template <class T> static void reduce(Simdgroup &s, u32 phase, u32 op, u32 first, u32 count, u32 n) {
  for (u32 k = 0; k < n; k++) {
    T v[SIMD];
    u32 have = 0;
    for (u32 i = first; i < first + count; i++)
      if (s.mask >> i & 1) v[have++] = at<T>(s.slot[phase], i, k);
    for (; have > 1; have = (have + 1) / 2) {
      u32 half = have / 2, rest = have - half;
      for (u32 i = 0; i < half; i++) v[i] = joined<T>(op, v[i], v[i + rest]);
    }
    for (u32 i = first; i < first + count; i++)
      memcpy(s.result[phase][i] + k * sizeof(T), &v[0], sizeof(T));
  }
}

template <class T> static void scan(Simdgroup &s, u32 phase, u32 op, u32 first, u32 count, u32 n) {
  u32 join = op == SCAN_ADD || op == SCAN_ADD_BEFORE ? ADD : MUL;
  bool before = op == SCAN_ADD_BEFORE || op == SCAN_MUL_BEFORE;
  for (u32 k = 0; k < n; k++) {
    T total = As<T>::of(join == ADD ? 0 : 1);
    for (u32 i = first; i < first + count; i++) {
      if (!(s.mask >> i & 1)) continue;
      T with = joined<T>(join, total, at<T>(s.slot[phase], i, k));
      memcpy(s.result[phase][i] + k * sizeof(T), before ? &total : &with, sizeof(T));
      total = with;
    }
  }
}

template <class T> static void over_lanes(Simdgroup &s, u32 phase, u32 what, u32 bytes) {
  u32 op = what % QUAD, n = bytes / sizeof(T), step = what >= QUAD ? 4 : SIMD;
  for (u32 first = 0; first < SIMD; first += step) {
    if (!(s.mask >> first & (step == 4 ? 15 : ~0u))) continue;
    if (op >= SCAN_ADD) scan<T>(s, phase, op, first, step, n);
    else reduce<T>(s, phase, op, first, step, n);
  }
}

// simdgroup_matrix 8x8: lane l holds two neighbours of a row. Apple does not document the layout;
// MLX's BaseMMAFrag::get_coord relies on this one.
static inline u32 matrix_row(u32 l) { return (l >> 2 & 4) + (l >> 1 & 3); }
static inline u32 matrix_column(u32 l) { return (l >> 2 & 2) * 2 + (l & 1) * 2; }

struct Fragment { float a[2], b[2], c[2]; };

static void multiply(Simdgroup &s, u32 phase) {
  float a[8][8], b[8][8], c[8][8];
  for (u32 l = 0; l < SIMD; l++) {
    Fragment f = at<Fragment>(s.slot[phase], l, 0);
    u32 r = matrix_row(l), k = matrix_column(l);
    memcpy(&a[r][k], f.a, 8);
    memcpy(&b[r][k], f.b, 8);
    memcpy(&c[r][k], f.c, 8);
  }
  for (u32 r = 0; r < 8; r++)
    for (u32 k = 0; k < 8; k++)
      for (u32 j = 0; j < 8; j++) c[r][j] += a[r][k] * b[k][j];
  for (u32 l = 0; l < SIMD; l++)
    memcpy(s.result[phase][l], &c[matrix_row(l)][matrix_column(l)], 8);
}

static void compute(Simdgroup &s, u32 phase, u32 op, u32 type, u32 bytes) {
  if (op == MATRIX) {
    report->matrix_ops++;
    if (s.mask != ~0u) fault(PARTIAL_SIMD, s.site);
    return multiply(s, phase);
  }
  report->simd_ops += op != UNIFORM;
  if (op >= SHUFFLE && op < MATRIX) return;
  switch (type) {
  case I8: return over_lanes<int8_t>(s, phase, op, bytes);
  case U8: return over_lanes<u8>(s, phase, op, bytes);
  case I16: return over_lanes<int16_t>(s, phase, op, bytes);
  case U16: return over_lanes<u16>(s, phase, op, bytes);
  case I32: return over_lanes<int32_t>(s, phase, op, bytes);
  case U32: return over_lanes<u32>(s, phase, op, bytes);
  case I64: return over_lanes<int64_t>(s, phase, op, bytes);
  case U64: return over_lanes<u64>(s, phase, op, bytes);
  case F16: return over_lanes<Half>(s, phase, op, bytes);
  case BF16: return over_lanes<Bfloat>(s, phase, op, bytes);
  case F32: return over_lanes<float>(s, phase, op, bytes);
  }
}

// The slots keep what the released lanes read; the phase says which half is theirs.
struct Pending { u32 phase, op, type, bytes; };
static Pending pending[MAX_THREADS / SIMD];

static void finish_early(Simdgroup &s, u32 which) {
  if (s.what != SIMD_BARRIER) {
    Pending &p = pending[which];
    compute(s, p.phase, p.op, p.type, p.bytes);
  } else {
    report->simd_barriers++;
  }
  release(s, which);
}

extern "C" __attribute__((noinline, visibility("default"))) void
msl_simd(u32 op, u32 type, const void *mine, void *out, u32 bytes, u32 argument) {
  Thread *me = running;
  u64 site = (u64)__builtin_return_address(0);
  Simdgroup &s = simdgroups[me->simd];
  u32 phase = me->phase;
  me->phase ^= 1;
  memcpy(s.slot[phase][me->lane], mine, bytes);
  pending[me->simd] = {phase, op, type, bytes};
  if (arrive(s, op << 4 | type, site)) {
    compute(s, phase, op, type, bytes);
    release(s, me->simd);
  } else {
    me->waiting = AT_SIMD;
    block();
  }
  u32 active = me->active;
  switch (op) {
  case SHUFFLE:
    if (argument >= SIMD || !(active >> argument & 1)) fault(INACTIVE_LANE, site, argument);
    memcpy(out, s.slot[phase][argument], bytes);
    return;
  case SHIFT_LANES: // past the ends a lane keeps its own; a lane that is not there is undefined
    if (argument >= SIMD) memcpy(out, mine, bytes);
    else if (active >> argument & 1) memcpy(out, s.slot[phase][argument], bytes);
    else if (launch->strict) fault(INACTIVE_LANE, site, argument);
    else memset(out, 0xff, bytes);
    return;
  case FIRST: memcpy(out, s.slot[phase][__builtin_ctz(active)], bytes); return;
  case BALLOT: {
    u32 votes = 0;
    for (u32 i = 0; i < SIMD; i++)
      if (active >> i & 1 && s.slot[phase][i][0]) votes |= 1u << i;
    memcpy(out, &votes, 4);
    return;
  }
  case UNIFORM:
    if (active != ~0u) fault(PARTIAL_SIMD, site);
    for (u32 i = 1; i < SIMD; i++)
      if (memcmp(s.slot[phase][i], s.slot[phase][0], bytes)) fault(DIFFERENT_ARGUMENTS, site);
    return;
  case MATRIX: memcpy(out, s.result[phase][me->lane], 8); return;
  }
  memcpy(out, s.result[phase][me->lane], bytes);
}

extern "C" __attribute__((visibility("default"))) u32 msl_active() {
  // The lanes that have not returned: those that the next operation will find.
  Simdgroup &s = simdgroups[running->simd];
  u32 mask = 0;
  for (u32 i = 0; i < s.size; i++)
    if (threads[running->simd * SIMD + i].waiting != RETURNED) mask |= 1u << i;
  return mask;
}
