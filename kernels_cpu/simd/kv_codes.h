// The kinds of entries in the cache, and how a step's keys and values are read as float32.
//
// Keys of a record: f(entry, half, tokens 16 * half ..). Values: entries 16 * half .. of one token.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

struct Nibbles {
  uint8_t byte;  // two codes
};

// Asks for the row `ahead` bytes further, a whole piece: the hardware's prefetcher follows blocks
// in sequence, but not scattered ones. Always inline, since GCC drops calls of a function that does
// no more than that.
template <class Code>
inline __attribute__((always_inline)) void fetch(const Code* row, ptrdiff_t ahead) {
  if (ahead) prefetch(reinterpret_cast<const char*>(row) + ahead);
}
inline void fetch(const float*, ptrdiff_t) {}  // scratch

inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const uint16_t* p) { return load(p); }
inline Vec widen(const int8_t* p) { return to_float(load_int8(p)); }

// What the 4-bit codes stand for: the 16 values that lose least of a Gaussian (J. Max, 1960), its
// ends at 127. Rotated entries are nearly Gaussian, whatever they were before.
constexpr int8_t kLevels[16] = {-127, -96, -75, -58, -44, -31, -18, -6,
                                6,    18,  31,  44,  58,  75,  96,  127};

inline Vec low_nibbles(const Nibbles* p) { return to_float(pick_low(kLevels, &p->byte)); }
inline Vec high_nibbles(const Nibbles* p) { return to_float(pick_high(kLevels, &p->byte)); }

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
    f(d, Count<0>{}, low_nibbles(row));
    f(d, Count<1>{}, low_nibbles(row + 16));
    if (d + 1 == entries) return;
    f(d + 1, Count<0>{}, high_nibbles(row));
    f(d + 1, Count<1>{}, high_nibbles(row + 16));
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
  return half ? high_nibbles(row) : low_nibbles(row);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
