// Matmul over packed panels. The chains that decide every bit are here; an instruction set adds
// only exact integer dot products:
//   unpack<BITS>(block, out)                     one code block -> 512 bytes
//   dot_packed<BITS, FIRST, LAST, ROWS>(...)     vectors FIRST..LAST-1 of a packed block
//   dot_panel<BITS, FIRST, LAST, ROWS>(...)      the same of an unpacked block
//
// For output r of row m, over groups g in order, two float32 chains, each from 0:
//   dots = fma(float(D), scale[r,g] * d[m,g], dots)    D = sum q * (code + offset), exact
//   bias = fma(bias[r,g], sum_x[m,g], bias)            only where the format has biases
//   y = dots + bias
// Dense weights: one chain y = fma(w[r,k], x[m,k], y) over k in order.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

template <int BITS>
constexpr int block_bytes() {
  return BITS * 64;
}

// Group values without multipliers: [groups][16], each written `repeat` times.
template <class T>
inline float* expand_plain(const T* values, int groups, int repeat, float* out) {
  if (repeat == 1) {
    for (int g = 0; g < groups; ++g, values += kLanes, out += kLanes) store(out, load(values));
    return out;
  }
  for (int g = 0; g < groups; ++g, values += kLanes) {
    const Vec v = load(values);
    for (int i = 0; i < repeat; ++i, out += kLanes) store(out, v);
  }
  return out;
}

// The same with a small integer a group, `per` groups to a value.
template <class T>
inline float* expand_two_level(const T* values, const GroupTable& t, const uint8_t* multipliers,
                               int groups, int repeat, float* out) {
  for (int g = 0; g < groups; values += kLanes) {
    const Vec value = load(values);
    for (int i = 0; i < t.groups_per_value; ++i, ++g, multipliers += kLanes) {
      const IVec m = t.multiplier > 0 ? load_uint8(multipliers)
                                      : load_int8(reinterpret_cast<const int8_t*>(multipliers));
      const Vec v = mul(value, to_float(m));
      for (int r = 0; r < repeat; ++r, out += kLanes) store(out, v);
    }
  }
  return out;
}

// A group table of one panel as float32 [count][16]; past the last group zeros.
inline void expand(const GroupTable& t, const uint8_t* panel, int groups, int repeat, int count,
                   float* out) {
  const float* end = out + static_cast<ptrdiff_t>(count) * kLanes;
  const auto fill = [&](const auto* values) {
    return t.multiplier == 0
               ? expand_plain(values, groups, repeat, out)
               : expand_two_level(values, t, panel + t.multipliers_at, groups, repeat, out);
  };
  out = t.half ? fill(reinterpret_cast<const uint16_t*>(panel + t.values_at))
               : fill(reinterpret_cast<const float*>(panel + t.values_at));
  for (; out < end; out += kLanes) store(out, zero());
}

// A panel made ready: group tables in float32, one entry per 32 inputs (per 16 for group 16).
struct Panel {
  const uint8_t* codes;
  const float* scales;
  const float* biases;  // or null
  float* free;          // scratch after the tables
};

inline Panel open_panel(const Matrix& w, int panel, void* scratch) {
  const uint8_t* base = w.data + static_cast<size_t>(panel) * w.panel_bytes;
  const bool halves = w.group == 16;
  const int groups = (w.cols + w.group - 1) / w.group;
  const int count = w.blocks() * (halves ? 2 : 1);
  const int repeat = halves ? 1 : w.group / kGroup;
  float* scales = align64(scratch);
  float* biases = scales + static_cast<ptrdiff_t>(count) * kLanes;
  expand(w.scales, base, groups, repeat, count, scales);
  if (w.biases.present) expand(w.biases, base, groups, repeat, count, biases);
  return {base + w.codes_at, scales, w.biases.present ? biases : nullptr,
          biases + static_cast<ptrdiff_t>(count) * kLanes};
}

inline void store_row(float* out, const Vec& y, int valid_rows) {
  if (valid_rows >= kLanes)
    store(out, y);
  else
    store(out, y, valid_rows);
}

template <int ROWS>
inline void add_group(const IVec (&dot)[ROWS], int offset, const int32_t (&sum_q)[ROWS],
                      const float (&d)[ROWS], const float* scales, Vec (&dots)[ROWS]) {
  const Vec s = load(scales);
  for (int m = 0; m < ROWS; ++m) {
    const IVec shifted = offset ? add(dot[m], set1(int32_t{offset * sum_q[m]})) : dot[m];
    dots[m] = fma(to_float(shifted), mul(s, set1(d[m])), dots[m]);
  }
}

// The bias chain of ROWS rows; zero where the format has none.
template <bool HALVES, int ROWS>
inline void bias_chain(const Panel& p, int blocks, const GroupInfo* info, ptrdiff_t stride,
                       Vec (&bias)[ROWS]) {
  for (int m = 0; m < ROWS; ++m) bias[m] = zero();
  const float* b = p.biases;
  for (int g = 0; g < blocks; ++g) {
    for (int h = 0; h < (HALVES ? 2 : 1); ++h, b += kLanes) {
      const Vec value = load(b);
      for (int m = 0; m < ROWS; ++m) {
        const GroupInfo& i = info[m * stride + g];
        bias[m] = fma(value, set1(HALVES ? i.half_sum_x[h] : i.sum_x), bias[m]);
      }
    }
  }
}

template <int BITS, bool PACKED, int FIRST, int LAST, int ROWS>
inline void dots_of(const uint8_t* codes, const int8_t* q, ptrdiff_t stride, IVec (&dot)[ROWS]) {
  if constexpr (PACKED)
    dot_packed<BITS, FIRST, LAST, ROWS>(codes, q, stride, dot);
  else
    dot_panel<BITS, FIRST, LAST, ROWS>(codes, q, stride, dot);
}

// ROWS rows against a panel, its codes packed as in memory or unpacked to bytes.
template <int BITS, bool HALVES, bool PACKED, int ROWS>
void tile(const Panel& p, const uint8_t* codes, int blocks, int offset, const int8_t* q,
          ptrdiff_t q_stride, const GroupInfo* info, ptrdiff_t info_stride, float* out,
          ptrdiff_t stride, int valid_rows) {
  Vec bias[ROWS] = {}, dots[ROWS] = {};
  if (p.biases) bias_chain<HALVES, ROWS>(p, blocks, info, info_stride, bias);

  const float* s = p.scales;
  for (int g = 0; g < blocks;
       ++g, codes += PACKED ? block_bytes<BITS>() : kPanelBlock, q += kGroup, ++info) {
    float d[ROWS];
    for (int m = 0; m < ROWS; ++m) d[m] = info[m * info_stride].scale;
    int32_t sum[ROWS];
    IVec dot[ROWS];
    if constexpr (HALVES) {
      dots_of<BITS, PACKED, 0, 4, ROWS>(codes, q, q_stride, dot);
      for (int m = 0; m < ROWS; ++m) sum[m] = info[m * info_stride].half_sum_q[0];
      add_group<ROWS>(dot, offset, sum, d, s, dots);
      dots_of<BITS, PACKED, 4, 8, ROWS>(codes, q, q_stride, dot);
      for (int m = 0; m < ROWS; ++m) sum[m] = info[m * info_stride].half_sum_q[1];
      add_group<ROWS>(dot, offset, sum, d, s + kLanes, dots);
      s += 2 * kLanes;
    } else {
      dots_of<BITS, PACKED, 0, 8, ROWS>(codes, q, q_stride, dot);
      for (int m = 0; m < ROWS; ++m) sum[m] = info[m * info_stride].sum_q;
      add_group<ROWS>(dot, offset, sum, d, s, dots);
      s += kLanes;
    }
  }
  for (int m = 0; m < ROWS; ++m)
    store_row(out + m * stride, p.biases ? add(dots[m], bias[m]) : dots[m], valid_rows);
}

// All rows of `in` against one panel, in tiles of kTileRows.
template <int BITS, bool HALVES, bool PACKED>
void panel_rows(const Panel& p, const uint8_t* codes, const Matrix& w, const Input& in, float* out,
                ptrdiff_t stride, int row) {
  int m = 0;
  const auto run = [&](auto tile_rows) {
    tile<BITS, HALVES, PACKED, decltype(tile_rows)::value>(
        p, codes, w.blocks(), w.offset, in.q + m * in.q_stride, in.q_stride,
        in.info + m * in.info_stride, in.info_stride, out + m * stride + row, stride, w.rows - row);
    m += decltype(tile_rows)::value;
  };
  while (m + kTileRows <= in.rows) run(Count<kTileRows>{});
  while (m + 2 <= in.rows) run(Count<2>{});
  if (m < in.rows) run(Count<1>{});
}

template <int BITS, bool HALVES>
void matmul_quantized(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                      int last, void* scratch) {
  for (int panel = first; panel < last; ++panel) {
    const Panel p = open_panel(w, panel, scratch);
    const int row = panel * kLanes;
    if (in.rows <= kPackedRows) {
      panel_rows<BITS, HALVES, true>(p, p.codes, w, in, out, stride, row);
      continue;
    }
    auto* codes = reinterpret_cast<uint8_t*>(p.free);
    for (int g = 0; g < w.blocks(); ++g)
      unpack<BITS>(p.codes + static_cast<size_t>(g) * block_bytes<BITS>(),
                   codes + static_cast<size_t>(g) * kPanelBlock);
    panel_rows<BITS, HALVES, false>(p, codes, w, in, out, stride, row);
  }
}

// ---- float32 activations ----------------------------------------------------------------

template <class T>
struct Dense {
  using type = T;
  static Vec get(const T* p) { return load(p); }
};
struct Bfloat {
  using type = uint16_t;
  static Vec get(const uint16_t* p) { return load_bfloat(p); }
};

// ROWS rows against PANELS panels that lie `panel_stride` values apart: [cols][16] each.
template <class Format, int ROWS, int PANELS>
inline void dense_tile(const typename Format::type* w, ptrdiff_t panel_stride, int cols,
                       const float* x, ptrdiff_t x_stride, Vec (&y)[ROWS][PANELS]) {
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < PANELS; ++n) y[m][n] = zero();
  for (int k = 0; k < cols; ++k) {
    Vec value[PANELS];
    for (int n = 0; n < PANELS; ++n) value[n] = Format::get(w + n * panel_stride + k * kLanes);
    for (int m = 0; m < ROWS; ++m) {
      const Vec xk = set1(x[m * x_stride + k]);
      for (int n = 0; n < PANELS; ++n) y[m][n] = fma(value[n], xk, y[m][n]);
    }
  }
}

template <class Format, int ROWS, int PANELS>
inline void dense_store(const typename Format::type* w, ptrdiff_t panel_stride, int cols,
                        const Input& in, int m, float* out, ptrdiff_t stride, int row, int rows) {
  Vec y[ROWS][PANELS];
  dense_tile<Format, ROWS, PANELS>(w, panel_stride, cols, in.x + m * in.x_stride, in.x_stride, y);
  for (int i = 0; i < ROWS; ++i)
    for (int n = 0; n < PANELS; ++n) {
      const int r = row + n * kLanes;
      store_row(out + (m + i) * stride + r, y[i][n], rows - r);
    }
}

// All rows of `in` against one panel of values.
template <class Format>
void dense_panel(const typename Format::type* w, int cols, const Input& in, float* out,
                 ptrdiff_t stride, int row, int rows) {
  int m = 0;
  for (; m + kDenseRows <= in.rows; m += kDenseRows)
    dense_store<Format, kDenseRows, 1>(w, 0, cols, in, m, out, stride, row, rows);
  for (; m < in.rows; ++m) dense_store<Format, 1, 1>(w, 0, cols, in, m, out, stride, row, rows);
}

template <class Format>
void matmul_dense(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                  int last) {
  using T = typename Format::type;
  const auto at = [&](int panel) {
    return reinterpret_cast<const T*>(w.data + static_cast<size_t>(panel) * w.panel_bytes);
  };
  int panel = first;
  // A single row has one chain a panel: several panels at once hide its latency.
  constexpr int together = 4;
  const ptrdiff_t panel_stride = static_cast<ptrdiff_t>(w.panel_bytes / sizeof(T));
  if (in.rows == 1)
    for (; panel + together <= last; panel += together)
      dense_store<Format, 1, together>(at(panel), panel_stride, w.cols, in, 0, out, stride,
                                       panel * kLanes, w.rows);
  for (; panel < last; ++panel)
    dense_panel<Format>(at(panel), w.cols, in, out, stride, panel * kLanes, w.rows);
}

// Codes back to float32 [blocks * 32][16]: round(round(scale * (code + offset)) + bias).
template <int BITS>
void dequantize(const Panel& p, int blocks, bool halves, int offset, float* values) {
  alignas(64) uint8_t block[kPanelBlock];
  const IVec shift = set1(int32_t{offset});
  for (int g = 0; g < blocks; ++g) {
    unpack<BITS>(p.codes + static_cast<size_t>(g) * block_bytes<BITS>(), block);
    for (int v = 0; v < 8; ++v) {
      const int entry = halves ? 2 * g + v / 4 : g;
      const Vec s = load(p.scales + entry * kLanes);
      const IVec four = load(reinterpret_cast<const int32_t*>(block + v * 64));
      const auto put = [&](const IVec& code, int j) {
        Vec value = mul(s, to_float(add(code, shift)));
        if (p.biases) value = add(value, load(p.biases + entry * kLanes));
        store(values + (g * kGroup + 4 * v + j) * kLanes, value);
      };
      put(shift_right<24>(shift_left<24>(four)), 0);
      put(shift_right<24>(shift_left<16>(four)), 1);
      put(shift_right<24>(shift_left<8>(four)), 2);
      put(shift_right<24>(four), 3);
    }
  }
}

template <int BITS>
void matmul_dequantized(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                        int last, void* scratch) {
  for (int panel = first; panel < last; ++panel) {
    const Panel p = open_panel(w, panel, scratch);
    dequantize<BITS>(p, w.blocks(), w.group == 16, w.offset, p.free);
    dense_panel<Dense<float>>(p.free, w.cols, in, out, stride, panel * kLanes, w.rows);
  }
}

template <int BITS>
void matmul_bits(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                 int last, void* scratch) {
  if (!in.q) return matmul_dequantized<BITS>(w, in, out, stride, first, last, scratch);
  if (w.group == 16) return matmul_quantized<BITS, true>(w, in, out, stride, first, last, scratch);
  matmul_quantized<BITS, false>(w, in, out, stride, first, last, scratch);
}

void matmul(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first, int last,
            void* scratch) {
  switch (w.kind) {
    case WeightKind::kFloat32: return matmul_dense<Dense<float>>(w, in, out, stride, first, last);
    case WeightKind::kFloat16:
      return matmul_dense<Dense<uint16_t>>(w, in, out, stride, first, last);
    case WeightKind::kBfloat16: return matmul_dense<Bfloat>(w, in, out, stride, first, last);
    case WeightKind::kQ4: return matmul_bits<4>(w, in, out, stride, first, last, scratch);
    case WeightKind::kQ5: return matmul_bits<5>(w, in, out, stride, first, last, scratch);
    case WeightKind::kQ6: return matmul_bits<6>(w, in, out, stride, first, last, scratch);
    case WeightKind::kQ8: return matmul_bits<8>(w, in, out, stride, first, last, scratch);
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
