// The kinds of entries in the cache, and how a step's keys and values are read as float32.
//
// Keys of a record: f(entry, half, tokens 16 * half ..). Values: entries 16 * half .. of one token.
// While a row is read, the one `ahead` bytes further is fetched towards the processor.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

struct Nibbles {
  uint8_t byte;  // two codes
};

template <class Code>
inline void fetch(const Code* row, ptrdiff_t ahead) {
  prefetch(reinterpret_cast<const char*>(row) + ahead);
}
inline void fetch(const float*, ptrdiff_t) {}  // scratch

inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const uint16_t* p) { return load(p); }
inline Vec widen(const int8_t* p) { return to_float(load_int8(p)); }

inline IVec low_nibbles(const Nibbles* p) {
  return bit_and(load_uint8(&p->byte), set1(int32_t{15}));
}
inline IVec high_nibbles(const Nibbles* p) { return shift_right<4>(load_uint8(&p->byte)); }
inline Vec code_value(const IVec& nibbles) { return to_float(add(nibbles, set1(int32_t{-8}))); }

template <class Code, class F>
inline __attribute__((always_inline)) void each_key(const Code* keys, int entries, ptrdiff_t ahead,
                                                    F f) {
  for (int d = 0; d < entries; ++d) {
    const Code* row = keys + d * kStep;
    fetch(row, ahead);
    // Half after half: sums, keys and a query entry then fit in 16 registers.
    f(d, Count<0>{}, widen(row));
    f(d, Count<1>{}, widen(row + 16));
  }
}
template <class F>
inline __attribute__((always_inline)) void each_key(const Nibbles* keys, int entries,
                                                    ptrdiff_t ahead, F f) {
  for (int d = 0; d < entries; d += 2) {
    const Nibbles* row = keys + d / 2 * kStep;
    fetch(row, ahead);
    f(d, Count<0>{}, code_value(low_nibbles(row)));
    f(d, Count<1>{}, code_value(low_nibbles(row + 16)));
    if (d + 1 == entries) return;
    f(d + 1, Count<0>{}, code_value(high_nibbles(row)));
    f(d + 1, Count<1>{}, code_value(high_nibbles(row + 16)));
  }
}

// Codes from the start of a record of V to the row of token t.
template <class Code>
inline const Code* value_row(const Code* codes, int t) {
  return codes + t * kGroup;
}
inline const Nibbles* value_row(const Nibbles* codes, int t) { return codes + t * (kGroup / 2); }

template <class Code>
inline Vec value_half(const Code* row, int half) {
  return widen(row + 16 * half);
}
inline Vec value_half(const Nibbles* row, int half) {
  return code_value(half ? high_nibbles(row) : low_nibbles(row));
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
