// Functions among the lanes of a simdgroup or quadgroup; runtime/simd.h computes them.
#pragma once
namespace metal {
template <class T> struct msl_code { static constexpr __constant int value = -1; };
#define MSL_CODE(T, N) template <> struct msl_code<T> { static constexpr __constant int value = N; };
MSL_CODE(char, 0) MSL_CODE(signed char, 0) MSL_CODE(uchar, 1) MSL_CODE(short, 2)
MSL_CODE(ushort, 3) MSL_CODE(int, 4) MSL_CODE(uint, 5) MSL_CODE(half, 8) MSL_CODE(bfloat, 9)
MSL_CODE(float, 10)

template <class T> MSL_FN T msl_lanes(uint op, T x, uint argument = 0) {
  static_assert(msl_code<msl_element<T>>::value >= 0,
                "simdgroup and quadgroup functions take char, short, int, half, bfloat and float "
                "and their vectors; no bool and nothing of 64 bits");
  T y;
  msl_simd(op, msl_code<msl_element<T>>::value, &x, &y, sizeof(T), argument);
  return y;
}
template <class T> MSL_FN T msl_bitwise(uint op, T x) {
  static_assert(is_integral_v<msl_element<T>>, "simd_and, simd_or and simd_xor take integers");
  return msl_lanes(op, x);
}
#define MSL_REDUCE(WHO, PLUS)                                                                    \
  template <class T> MSL_FN T WHO##_sum(T x) { return msl_lanes(PLUS msl_add, x); }               \
  template <class T> MSL_FN T WHO##_product(T x) { return msl_lanes(PLUS msl_mul, x); }           \
  template <class T> MSL_FN T WHO##_min(T x) { return msl_lanes(PLUS msl_min, x); }               \
  template <class T> MSL_FN T WHO##_max(T x) { return msl_lanes(PLUS msl_max, x); }               \
  template <class T> MSL_FN T WHO##_and(T x) { return msl_bitwise(PLUS msl_and, x); }             \
  template <class T> MSL_FN T WHO##_or(T x) { return msl_bitwise(PLUS msl_or, x); }               \
  template <class T> MSL_FN T WHO##_xor(T x) { return msl_bitwise(PLUS msl_xor, x); }             \
  template <class T> MSL_FN T WHO##_prefix_inclusive_sum(T x) { return msl_lanes(PLUS msl_scan_add, x); } \
  template <class T> MSL_FN T WHO##_prefix_exclusive_sum(T x) { return msl_lanes(PLUS msl_scan_add_before, x); } \
  template <class T> MSL_FN T WHO##_prefix_inclusive_product(T x) { return msl_lanes(PLUS msl_scan_mul, x); } \
  template <class T> MSL_FN T WHO##_prefix_exclusive_product(T x) { return msl_lanes(PLUS msl_scan_mul_before, x); }
MSL_REDUCE(simd, )
MSL_REDUCE(quad, msl_quad +)

template <class T> MSL_FN T simd_shuffle(T x, ushort lane) { return msl_lanes(msl_shuffle, x, lane); }
template <class T> MSL_FN T simd_broadcast(T x, ushort lane) { return msl_lanes(msl_shuffle, x, lane); }
template <class T> MSL_FN T simd_shuffle_xor(T x, ushort mask) { return msl_lanes(msl_shuffle, x, MSL_LANE ^ mask); }
template <class T> MSL_FN T simd_shuffle_rotate_down(T x, ushort d) { return msl_lanes(msl_shuffle, x, (MSL_LANE + d) & 31); }
template <class T> MSL_FN T simd_shuffle_rotate_up(T x, ushort d) { return msl_lanes(msl_shuffle, x, (MSL_LANE - d) & 31); }
template <class T> MSL_FN T simd_broadcast_first(T x) { return msl_lanes(msl_first, x); }
template <class T> MSL_FN T simd_shuffle_down(T x, ushort d) { return msl_lanes(msl_shift_lanes, x, MSL_LANE + d); }
template <class T> MSL_FN T simd_shuffle_up(T x, ushort d) { return msl_lanes(msl_shift_lanes, x, MSL_LANE - d); }
template <class T> MSL_FN T simd_shuffle_and_fill_down(T x, T fill, ushort d) {
  uint from = MSL_LANE + d;
  T a = msl_lanes(msl_shift_lanes, x, from), b = msl_lanes(msl_shift_lanes, fill, (from - 32) & 31);
  return from < 32 ? a : b;
}
template <class T> MSL_FN T simd_shuffle_and_fill_up(T x, T fill, ushort d) {
  uint from = MSL_LANE - d;
  T a = msl_lanes(msl_shift_lanes, x, from), b = msl_lanes(msl_shift_lanes, fill, from & 31);
  return from < 32 ? a : b;
}
template <class T> MSL_FN T quad_shuffle(T x, ushort i) { return msl_lanes(msl_shuffle, x, (MSL_LANE & ~3u) + i); }
template <class T> MSL_FN T quad_broadcast(T x, ushort i) { return msl_lanes(msl_shuffle, x, (MSL_LANE & ~3u) + i); }
template <class T> MSL_FN T quad_shuffle_xor(T x, ushort mask) { return msl_lanes(msl_shuffle, x, MSL_LANE ^ mask); }
template <class T> MSL_FN T quad_shuffle_down(T x, ushort d) {
  uint lane = MSL_LANE;
  return msl_lanes(msl_shift_lanes, x, (lane & 3) + d < 4 ? lane + d : 32);
}
template <class T> MSL_FN T quad_shuffle_up(T x, ushort d) {
  uint lane = MSL_LANE;
  return msl_lanes(msl_shift_lanes, x, (lane & 3) >= d ? lane - d : 32);
}
template <class T> MSL_FN T quad_shuffle_rotate_down(T x, ushort d) {
  uint lane = MSL_LANE;
  return msl_lanes(msl_shuffle, x, (lane & ~3u) + ((lane + d) & 3));
}
template <class T> MSL_FN T quad_shuffle_rotate_up(T x, ushort d) {
  uint lane = MSL_LANE;
  return msl_lanes(msl_shuffle, x, (lane & ~3u) + ((lane - d) & 3));
}

MSL_FN uint msl_votes(bool p) {
  uint mine = p, votes;
  msl_simd(msl_ballot, 5, &mine, &votes, 4, 0);
  return votes;
}
// The lanes still there; a lane that waits elsewhere makes the runtime report divergence.
MSL_FN uint msl_voters() { return msl_votes(true); }
struct simd_vote {
  typedef ulong vote_t;
  ulong bits;
  MSL_FN explicit simd_vote(ulong b = 0) : bits(b) {}
  MSL_FN explicit operator ulong() const { return bits; }
  MSL_FN bool all() const { return (uint)bits == 0xffffffffu; }
  MSL_FN bool any() const { return (uint)bits != 0; }
};
MSL_FN simd_vote simd_ballot(bool p) { return simd_vote(msl_votes(p)); }
MSL_FN simd_vote simd_active_threads_mask() { return simd_vote(msl_voters()); }
MSL_FN bool simd_any(bool p) { return msl_votes(p) != 0; }
MSL_FN bool simd_all(bool p) { return msl_votes(!p) == 0; }
MSL_FN bool simd_is_first() { return MSL_LANE == (uint)__builtin_ctz(msl_voters()); }
MSL_FN bool quad_any(bool p) { return (msl_votes(p) >> (MSL_LANE & ~3u) & 15) != 0; }
MSL_FN bool quad_all(bool p) { return (msl_votes(!p) >> (MSL_LANE & ~3u) & 15) == 0; }
MSL_FN bool quad_is_first() { return (MSL_LANE & 3u) == (uint)__builtin_ctz(msl_voters() >> (MSL_LANE & ~3u)); }
} // namespace metal
