// AMX tiles. Inline assembly, since GCC's intrinsics do not say that they touch memory.
//
// For products of bytes tiles 0-3 are sums of 16 x 16 int32, 4 and 5 hold 16 rows of activations, 6
// and 7 the codes of 16 matrix rows. With LOCALLLM_EMULATE the same operations are plain C++, for
// tests on machines without AMX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace localllm::LOCALLLM_ISA {
namespace {

struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the layout of LDTILECFG");

// For products over `inputs` (at most 64, a multiple of 4) bytes.
inline TileConfig tile_config(int inputs) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = t < 6 ? 16 : static_cast<uint8_t>(inputs / 4);
    c.row_bytes[t] = t == 4 || t == 5 ? static_cast<uint16_t>(inputs) : 64;
  }
  return c;
}

#ifdef LOCALLLM_EMULATE

struct EmulatedTiles {
  TileConfig config;
  uint8_t data[8][16][64];
};
inline thread_local EmulatedTiles tiles;

inline void configure_tiles(const TileConfig& c) {
  std::memset(tiles.data, 0, sizeof(tiles.data));
  tiles.config = c;
}
inline void release_tiles() { std::memset(tiles.data, 0xff, sizeof(tiles.data)); }

template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  for (int r = 0; r < tiles.config.rows[T]; ++r)
    std::memcpy(tiles.data[T][r], static_cast<const uint8_t*>(from) + r * stride,
                tiles.config.row_bytes[T]);
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  for (int r = 0; r < tiles.config.rows[T]; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.data[T][r],
                tiles.config.row_bytes[T]);
}
template <int T>
inline void tile_clear() {
  std::memset(tiles.data[T], 0, sizeof(tiles.data[T]));
}
// T = A * B for signed bytes.
template <int T, int A, int B>
inline void tile_product() {
  for (int m = 0; m < tiles.config.rows[A]; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < tiles.config.row_bytes[A]; ++k)
        sum += static_cast<int8_t>(tiles.data[A][m][k]) *
               static_cast<int8_t>(tiles.data[B][k / 4][4 * n + k % 4]);
      std::memcpy(&tiles.data[T][m][4 * n], &sum, 4);
    }
}

#else

inline void configure_tiles(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c)); }
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int T>
struct Tile;
#define LOCALLLM_TILE(n)                                                                      \
  template <>                                                                                 \
  struct Tile<n> {                                                                            \
    static void load(const void* p, ptrdiff_t stride) {                                       \
      __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n ::"r"(p), "r"(stride) : "memory");     \
    }                                                                                         \
    static void store(void* p, ptrdiff_t stride) {                                            \
      __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(p), "r"(stride) : "memory"); \
    }                                                                                         \
    static void clear() { __asm__ volatile("tilezero %tmm" #n); }                             \
  };
LOCALLLM_TILE(0)
LOCALLLM_TILE(1)
LOCALLLM_TILE(2)
LOCALLLM_TILE(3)
LOCALLLM_TILE(4)
LOCALLLM_TILE(5)
LOCALLLM_TILE(6)
LOCALLLM_TILE(7)
#undef LOCALLLM_TILE

template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  Tile<T>::load(from, stride);
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  Tile<T>::store(to, stride);
}
template <int T>
inline void tile_clear() {
  Tile<T>::clear();
}
// T = A * B for signed bytes.
template <int T, int A, int B>
inline void tile_product() {
  static_assert(A == 4 + T / 2 && B == 6 + T % 2, "only the pairs that are used");
  tile_clear<T>();
  if constexpr (T == 0) __asm__ volatile("tdpbssd %tmm6, %tmm4, %tmm0");
  if constexpr (T == 1) __asm__ volatile("tdpbssd %tmm7, %tmm4, %tmm1");
  if constexpr (T == 2) __asm__ volatile("tdpbssd %tmm6, %tmm5, %tmm2");
  if constexpr (T == 3) __asm__ volatile("tdpbssd %tmm7, %tmm5, %tmm3");
}

#endif

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
