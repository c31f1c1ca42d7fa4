// The same product on AMX tiles of bfloat16: 16 packed rows times up to 48 columns.
//
// Tiles 0-2 are sums of 16 x 16 float32, 3 holds 16 rows of 16 steps, 4 and 5 in turn 16 steps of
// 16 columns; 6 and 7 are the halves of 3 and 4, for the 8 steps that may remain.
#pragma once

#include "simd/tiles.h"

namespace localllm::LOCALLLM_ISA {
namespace {

static_assert(kRows == 16 && kVecs == 3 && kPair == 2, "what the tiles are made for");

constexpr int kStep = kRows * kPair;  // elements of one step of packed rows
constexpr int kUnit = 16;             // steps of a tile
constexpr int kStepUnit = kUnit / 2;
constexpr bool kRowMajor = true;  // packed rows lie unit after unit, row after row

// Where a block of packed rows holds the first element of a row's step, of `steps`.
inline ptrdiff_t packed_at(int row, int step, int steps) {
  const int first = step / kUnit * kUnit, width = steps - first < kUnit ? steps - first : kUnit;
  return (static_cast<ptrdiff_t>(first) * kRows + row * width + (step - first)) * kPair;
}

// Alive while `tile` is used: tiles have their shapes on this thread alone, and only so long.
struct Tiles {
  Tiles() {
    TileConfig c;
    for (int t = 0; t < 8; ++t) c.rows[t] = 16, c.row_bytes[t] = 64;
    c.row_bytes[6] = 32;
    c.rows[7] = 8;
    configure_tiles(c);
  }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#ifdef LOCALLLM_EMULATE

inline float of_bfloat(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return to_float(half);
}

// T += A * B: even and odd elements have sums of their own, added at the end (Intel's manual).
template <int T, int A, int B>
inline void bfloat_product() {
  for (int m = 0; m < tiles.config.rows[A]; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum[2] = {0.0f, 0.0f}, total;
      for (int k = 0; k < tiles.config.row_bytes[A] / 4; ++k)
        for (int i = 0; i < 2; ++i)
          sum[i] = __builtin_fmaf(of_bfloat(&tiles.data[A][m][4 * k + 2 * i]),
                                  of_bfloat(&tiles.data[B][k][4 * n + 2 * i]), sum[i]);
      std::memcpy(&total, &tiles.data[T][m][4 * n], 4);
      total += sum[0] + sum[1];
      std::memcpy(&tiles.data[T][m][4 * n], &total, 4);
    }
}

#else

// T += A * B.
template <int T, int A, int B>
inline void bfloat_product();
#define LOCALLLM_PRODUCT(t, a, b)                                  \
  template <>                                                      \
  inline void bfloat_product<t, a, b>() {                          \
    __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #t); \
  }
LOCALLLM_PRODUCT(0, 3, 4)
LOCALLLM_PRODUCT(0, 3, 5)
LOCALLLM_PRODUCT(1, 3, 4)
LOCALLLM_PRODUCT(1, 3, 5)
LOCALLLM_PRODUCT(2, 3, 4)
LOCALLLM_PRODUCT(2, 3, 5)
LOCALLLM_PRODUCT(0, 6, 7)
LOCALLLM_PRODUCT(1, 6, 7)
LOCALLLM_PRODUCT(2, 6, 7)
#undef LOCALLLM_PRODUCT

#endif

// FIRST: which of tiles 4 and 5 is taken first.
template <int NV, int FIRST>
inline void whole_unit(const Elem* a, const Elem* b) {
  constexpr ptrdiff_t kStride = NV * 64;
  constexpr int kOther = 9 - FIRST;
  tile_load<3>(a, 64);
  tile_load<FIRST>(b, kStride);
  bfloat_product<0, 3, FIRST>();
  if constexpr (NV > 1) {
    tile_load<kOther>(b + 32, kStride);
    bfloat_product<1, 3, kOther>();
  }
  if constexpr (NV > 2) {
    tile_load<FIRST>(b + 64, kStride);
    bfloat_product<2, 3, FIRST>();
  }
}

template <int NV>
inline void half_unit(const Elem* a, const Elem* b) {
  constexpr ptrdiff_t kStride = NV * 64;
  tile_load<6>(a, 32);
  tile_load<7>(b, kStride);
  bfloat_product<0, 6, 7>();
  if constexpr (NV > 1) {
    tile_load<7>(b + 32, kStride);
    bfloat_product<1, 6, 7>();
  }
  if constexpr (NV > 2) {
    tile_load<7>(b + 64, kStride);
    bfloat_product<2, 6, 7>();
  }
}

template <int NV>
inline void run_steps(const Elem* a, const Elem* b, int steps) {
  constexpr ptrdiff_t kLeft = kUnit * kStep, kRight = kUnit * NV * 16 * kPair;
  for (; steps >= 2 * kUnit; steps -= 2 * kUnit, a += 2 * kLeft, b += 2 * kRight) {
    whole_unit<NV, 4>(a, b);
    whole_unit<NV, NV == 2 ? 4 : 5>(a + kLeft, b + kRight);
  }
  if (steps >= kUnit) {
    whole_unit<NV, 4>(a, b);
    steps -= kUnit, a += kLeft, b += kRight;
  }
  if (steps > 0) half_unit<NV>(a, b);
}

// c [kRows, NV * 16] = a b + a2 b2, each of its own steps.
template <int NV>
inline void tile(const Elem* a, const Elem* b, int steps, const Elem* a2, const Elem* b2,
                 int steps2, float* c) {
  constexpr ptrdiff_t kStride = NV * 64;
  tile_clear<0>();
  if constexpr (NV > 1) tile_clear<1>();
  if constexpr (NV > 2) tile_clear<2>();
  run_steps<NV>(a, b, steps);
  run_steps<NV>(a2, b2, steps2);
  tile_store<0>(c, kStride);
  if constexpr (NV > 1) tile_store<1>(c + 16, kStride);
  if constexpr (NV > 2) tile_store<2>(c + 32, kStride);
}

inline void tile(int vecs, const Elem* a, const Elem* b, int steps, const Elem* a2, const Elem* b2,
                 int steps2, float* c) {
  if (vecs == 3) return tile<3>(a, b, steps, a2, b2, steps2, c);
  if (vecs == 2) return tile<2>(a, b, steps, a2, b2, steps2, c);
  tile<1>(a, b, steps, a2, b2, steps2, c);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
