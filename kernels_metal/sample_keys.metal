// Logits as keys, which compare as integers, and probabilities as masses, which add exactly.

inline uint bits_of(half x) { return as_type<ushort>(x); }
inline uint bits_of(bfloat16_t x) { return as_type<ushort>(x); }
inline uint bits_of(float x) { return as_type<uint>(x); }

inline float from_bits(half, uint bits) { return float(as_type<half>(ushort(bits))); }
inline float from_bits(bfloat16_t, uint bits) { return float(as_type<bfloat16_t>(ushort(bits))); }
inline float from_bits(float, uint bits) { return as_type<float>(bits); }

template <typename T>
struct Keys {
  static constexpr uint sign() { return 1u << (8 * sizeof(T) - 1); }
  static constexpr uint ones() { return sign() - 1 + sign(); }
  static uint infinity() { return bits_of(T(INFINITY)) | sign(); }
  static uint lowest() { return (~bits_of(T(-INFINITY)) & ones()) + 1; }  // of the finite ones
};

// In the order of the values; NaN above all; both zeros the same.
template <typename T>
inline uint key_of(T x) {
  const uint bits = bits_of(x), sign = Keys<T>::sign();
  if ((bits & ~sign) > bits_of(T(INFINITY))) return Keys<T>::ones();
  if (bits == sign) return sign;
  return (bits & sign) ? ~bits & Keys<T>::ones() : bits | sign;
}

template <typename T>
inline float value_of(uint key) {
  const uint sign = Keys<T>::sign();
  return from_bits(T(0), (key & sign) ? key ^ sign : ~key & Keys<T>::ones());
}

// The probability against that of the likeliest, in units of 2^-44: 2^19 of them fit 64 bits, and
// integers add to the same sum in any order.
constant constexpr float UNITS = 17592186044416.0f;

inline ulong mass_of(float value, float highest, float temperature) {
  return ulong(precise::exp((value - highest) / temperature) * UNITS);
}

// floor(mass * share / 2^32), for a mass below 2^63
inline ulong share_of(ulong mass, uint share) {
  return (mass >> 32) * share + (((mass & 0xffffffffu) * share) >> 32);
}

// A fraction below 1 as a share; exact from 2^-8 on.
inline uint as_share(float fraction) {
  return uint(clamp(fraction, 0.0f, 0.99999994f) * 4294967296.0f);
}

// simdgroup functions take no 64-bit integers; two of 32 do as well.
inline ulong inclusive_sum(ulong x, int lane) {
  for (ushort step = 1; step < 32; step *= 2) {
    const ulong below = as_type<ulong>(simd_shuffle_up(as_type<uint2>(x), step));
    if (lane >= step) x += below;
  }
  return x;
}

inline ulong from_lane(ulong x, ushort lane) {
  return as_type<ulong>(simd_shuffle(as_type<uint2>(x), lane));
}

// The sum over the threadgroup, in every thread. totals: one for each simdgroup.
inline ulong group_sum(
    ulong x, threadgroup ulong* totals, int lane, int simdgroup, int simdgroups) {
  const ulong sum = from_lane(inclusive_sum(x, lane), 31);
  if (lane == 0) totals[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  ulong all = 0;
  for (int s = 0; s < simdgroups; s++) all += totals[s];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return all;
}
