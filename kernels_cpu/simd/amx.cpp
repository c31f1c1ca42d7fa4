// AMX int8 matmul for many rows: exact products in tiles, the float chains on AVX-512 vectors.
//
// A pass covers 32 rows and two panels, so four tiles of 16 x 16. It walks along the inputs in
// units of one weight group, at most 32. A unit's products are stored while the next unit's are
// under way, and its float work follows three units behind, two units together, between the tile
// instructions: a tile store right behind its product would wait for it.
#define LOCALLLM_ISA amx
#include "simd/vnni512.h"

// These need the vectors defined above, so they stand apart from them.
#include "simd/panel.h"
#include "simd/tiles.h"

namespace localllm {
extern const Kernels kAvx512VnniKernels;
}

namespace localllm::amx {
namespace {

constexpr int kRows = 32;    // of a pass
constexpr int kFewest = 64;  // rows from which tiles pay
constexpr int kSlots = 4;    // units whose products are kept
constexpr int kTileInts = 256;

struct Buffers {
  alignas(64) int32_t products[kSlots][4][kTileInts];
  alignas(64) float dots[2][kRows][kLanes];  // of the two panels
  alignas(64) float bias[2][kRows][kLanes];
};
static_assert(sizeof(Buffers) <= kTileScratch, "scratch of a thread");

// Exact for |x| < 2^22. Beside tile instructions an addition has two ports, a conversion one.
inline Vec small_to_float(__m512i x) {
  return _mm512_sub_ps(
      _mm512_castsi512_ps(_mm512_add_epi32(x, _mm512_castps_si512(_mm512_set1_ps(kRound)))),
      _mm512_set1_ps(kRound));
}

struct Pass {
  const Matrix& w;
  const uint8_t* codes[2];  // unpacked panels
  Expanded groups[2];
  const int8_t* q;
  ptrdiff_t q_stride;
  const GroupInfo* info;
  ptrdiff_t info_stride;
  Buffers& buffers;
};

// UNIT inputs share a scale: 16 or 32.
template <int UNIT>
struct Unit {
  static constexpr int kPerBlock = kGroup / UNIT;
  static const GroupInfo& info(const Pass& p, int row, int unit) {
    return p.info[row * p.info_stride + unit / kPerBlock];
  }
  static int32_t sum_q(const GroupInfo& i, int unit) {
    return kPerBlock == 1 ? i.sum_q : i.half_sum_q[unit % 2];
  }
  static float sum_x(const GroupInfo& i, int unit) {
    return kPerBlock == 1 ? i.sum_x : i.half_sum_x[unit % 2];
  }
};

// Tile T: rows 16 * (T / 2) .. + 15 of the pass against panel T % 2.
template <int UNIT, int T>
inline void start_product(const Pass& p, int unit) {
  const int8_t* x = p.q + (T / 2) * 16 * p.q_stride + unit * UNIT;
  const uint8_t* codes = p.codes[T % 2] + static_cast<ptrdiff_t>(unit) * UNIT * kLanes;
  if constexpr (T % 2 == 0) tile_load<4 + T / 2>(x, p.q_stride);
  if constexpr (T / 2 == 0) tile_load<6 + T % 2>(codes, 64);
  tile_product<T, 4 + T / 2, 6 + T % 2>();
}

// Four rows of both panels over `count` units: dots = fma(float(D), scale * d, dots).
template <int UNIT>
inline void add_units(const Pass& p, int row, int unit, int count) {
  constexpr int kTogether = 4;
  Vec dots[kTogether][2];
#pragma GCC unroll 4
  for (int m = 0; m < kTogether; ++m)
    for (int n = 0; n < 2; ++n) dots[m][n] = load(p.buffers.dots[n][row + m]);
  for (int u = unit; u < unit + count; ++u) {
    const Vec scale[2] = {p.groups[0].scale(u), p.groups[1].scale(u)};
    const auto& products = p.buffers.products[u % kSlots];
#pragma GCC unroll 4
    for (int m = 0; m < kTogether; ++m) {
      const GroupInfo& info = Unit<UNIT>::info(p, row + m, u);
      const Vec d = set1(info.scale);
      const int32_t shift = p.w.offset * Unit<UNIT>::sum_q(info, u);
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int32_t* product = products[2 * (row / 16) + n] + (row % 16 + m) * kLanes;
        const __m512i exact = _mm512_add_epi32(load512(product), _mm512_set1_epi32(shift));
        dots[m][n] = fma(small_to_float(exact), mul(scale[n], d), dots[m][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kTogether; ++m)
    for (int n = 0; n < 2; ++n) store(p.buffers.dots[n][row + m], dots[m][n]);
}

// One beat: stores the products of the unit before, starts this one's, and between the tiles adds
// a half of the rows of two earlier units.
template <int UNIT>
inline void beat(const Pass& p, int t, int units) {
  const int late = t - 3;  // units late / 2 * 2 and the next, rows of half late % 2
  const int first = late >= 0 ? late / 2 * 2 : 0, half = late >= 0 ? late % 2 : 0;
  const int count = late < 0 || first >= units ? 0 : units - first < 2 ? 1 : 2;
  const auto quarter = [&](auto tile) {
    constexpr int T = decltype(tile)::value;
    if (t > 0 && t <= units) tile_store<T>(p.buffers.products[(t - 1) % kSlots][T], 64);
    if (t < units) start_product<UNIT, T>(p, t);
    if (count) add_units<UNIT>(p, 16 * half + 4 * T, first, count);
  };
  quarter(Count<0>{});
  quarter(Count<1>{});
  quarter(Count<2>{});
  quarter(Count<3>{});
}

template <int UNIT>
void bias_chains(const Pass& p, int units) {
  constexpr int kTogether = 8;
  for (int row = 0; row < kRows; row += kTogether)
    for (int n = 0; n < 2; ++n) {
      Vec bias[kTogether];
#pragma GCC unroll 8
      for (int m = 0; m < kTogether; ++m) bias[m] = zero();
      for (int u = 0; u < units; ++u) {
        const Vec value = p.groups[n].bias(u);
#pragma GCC unroll 8
        for (int m = 0; m < kTogether; ++m)
          bias[m] =
              fma(value, set1(Unit<UNIT>::sum_x(Unit<UNIT>::info(p, row + m, u), u)), bias[m]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kTogether; ++m) store(p.buffers.bias[n][row + m], bias[m]);
    }
}

template <int UNIT>
void run_pass(const Pass& p, float* out, ptrdiff_t stride, int valid_rows) {
  const int units = p.w.blocks() * Unit<UNIT>::kPerBlock;
  const bool biased = p.w.biases.present;
  if (biased) bias_chains<UNIT>(p, units);
  std::memset(p.buffers.dots, 0, sizeof(p.buffers.dots));
  const int pairs = (units + 1) / 2;
  for (int t = 0; t < 2 * pairs + 3; ++t) beat<UNIT>(p, t, units);
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < 2; ++n) {
      Vec y = load(p.buffers.dots[n][m]);
      if (biased) y = add(y, load(p.buffers.bias[n][m]));
      store_row(out + m * stride + n * kLanes, y, valid_rows - n * kLanes);
    }
}

void unpack_panel(const Matrix& w, const uint8_t* panel, uint8_t* codes) {
  const auto all = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    each_record(w, panel, [&](const uint8_t* record, int first, int blocks) {
      for (int b = 0; b < blocks; ++b)
        unpack<kBits>(record + w.codes_at + b * block_bytes<kBits>(),
                      codes + static_cast<ptrdiff_t>(first + b) * kPanelBlock);
    });
  };
  switch (w.kind) {
    case WeightKind::kQ4: return all(Count<4>{});
    case WeightKind::kQ5: return all(Count<5>{});
    case WeightKind::kQ6: return all(Count<6>{});
    default: return all(Count<8>{});
  }
}

// Whole passes of `in` against panels first, first + 1.
template <int UNIT>
void two_panels(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                void* scratch) {
  // Tables of the first panel, its codes, tables of the second, its codes, buffers.
  const PanelScratch one = panel_scratch(w, scratch);
  const auto panel_codes = static_cast<ptrdiff_t>(w.blocks()) * kPanelBlock;
  auto* codes_one = reinterpret_cast<uint8_t*>(one.rest);
  const PanelScratch two = panel_scratch(w, codes_one + panel_codes);
  auto* codes_two = reinterpret_cast<uint8_t*>(two.rest);
  auto& buffers = *reinterpret_cast<Buffers*>(align64(codes_two + panel_codes));
  unpack_panel(w, w.panel(first), codes_one);
  unpack_panel(w, w.panel(first + 1), codes_two);
  const Expanded groups_one = expand_panel(w, w.panel(first), one);
  const Expanded groups_two = expand_panel(w, w.panel(first + 1), two);
  for (int m = 0; m + kRows <= in.rows; m += kRows) {
    const Pass pass{
        w,           {codes_one, codes_two},       {groups_one, groups_two}, in.q + m * in.q_stride,
        in.q_stride, in.info + m * in.info_stride, in.info_stride,           buffers};
    run_pass<UNIT>(pass, out + m * stride + first * kLanes, stride, w.rows - first * kLanes);
  }
}

void matmul(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first, int last,
            void* scratch) {
  const auto without_tiles = kAvx512VnniKernels.matmul;
  if (!w.quantized() || !in.q || in.rows < kFewest)
    return without_tiles(w, in, out, stride, first, last, scratch);
  const int tiled = in.rows / kRows * kRows, paired = first + (last - first) / 2 * 2;
  if (paired < last) without_tiles(w, in, out, stride, paired, last, scratch);
  if (tiled < in.rows) {
    Input tail = in;
    tail.rows -= tiled;
    tail.q += tiled * in.q_stride;
    tail.info += tiled * in.info_stride;
    without_tiles(w, tail, out + tiled * stride, stride, first, paired, scratch);
  }
  const TileConfig config = tile_config(w.group == 16 ? 16 : 32);
  configure_tiles(config);
  for (int i = first; i < paired; i += 2) {
    if (w.group == 16)
      two_panels<16>(w, in, out, stride, i, scratch);
    else
      two_panels<32>(w, in, out, stride, i, scratch);
  }
  release_tiles();
}

}  // namespace
}  // namespace localllm::amx

namespace localllm {
using Matmul = decltype(Kernels::matmul);
extern const Matmul kAmxMatmul;
const Matmul kAmxMatmul = amx::matmul;
}  // namespace localllm
