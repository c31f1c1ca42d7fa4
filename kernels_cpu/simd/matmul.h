// Matmul over packed panels. The chains that decide every bit are here; an instruction set adds
// only exact integer dot products:
//   unpack<BITS>(block, out)                     one code block -> 512 bytes
//   dot_packed<BITS, FIRST, LAST, ROWS>(...)     vectors FIRST..LAST-1 of a packed block
//   dot_panel<BITS, FIRST, LAST, ROWS>(...)      the same of an unpacked block
//   kByteShift                                   what the two add to each 8-bit code
//
// For output r of row m, over groups g in order, two float32 chains, each from 0:
//   dots = fma(float(D), scale[r,g] * d[m,g], dots)    D = sum q * (code + offset), exact
//   bias = fma(bias[r,g], sum_x[m,g], bias)            only where the format has biases
//   y = dots + bias
// Dense weights: one chain y = fma(w[r,k], x[m,k], y) over k in order.
#pragma once

#include "simd/panel.h"

namespace localllm::LOCALLLM_ISA {
namespace {

template <int BITS, bool PACKED, int FIRST, int LAST, int ROWS>
inline __attribute__((always_inline)) void dots_of(const uint8_t* codes, const int8_t* q,
                                                   ptrdiff_t stride, IVec (&dot)[ROWS]) {
  if constexpr (PACKED)
    dot_packed<BITS, FIRST, LAST, ROWS>(codes, q, stride, dot);
  else
    dot_panel<BITS, FIRST, LAST, ROWS>(codes, q, stride, dot);
}

// ROWS rows and the sums of one group: `half` is 0 or 1 within a block of two groups, else -1.
template <int ROWS>
struct Group {
  const GroupInfo* info;
  ptrdiff_t stride;
  int half;
  const GroupInfo& of(int m) const { return info[m * stride]; }
  int32_t sum_q(int m) const { return half < 0 ? of(m).sum_q : of(m).half_sum_q[half]; }
  float sum_x(int m) const { return half < 0 ? of(m).sum_x : of(m).half_sum_x[half]; }
};

template <int ROWS>
inline __attribute__((always_inline)) void add_dots(const IVec (&dot)[ROWS], int offset,
                                                    const Group<ROWS>& g, const Vec& scale,
                                                    Vec (&dots)[ROWS]) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    const IVec shifted = offset ? add(dot[m], set1(int32_t{offset * g.sum_q(m)})) : dot[m];
    dots[m] = fma(to_float(shifted), mul(scale, set1(g.of(m).scale)), dots[m]);
  }
}

template <int ROWS>
inline __attribute__((always_inline)) void add_bias(const Group<ROWS>& g, const Vec& value,
                                                    Vec (&bias)[ROWS]) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) bias[m] = fma(value, set1(g.sum_x(m)), bias[m]);
}

template <int ROWS>
inline __attribute__((always_inline)) void clear(Vec (&v)[ROWS]) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) v[m] = zero();
}

// Rows of activations as a tile walks along them.
struct Rows {
  const int8_t* q;
  ptrdiff_t q_stride;
  const GroupInfo* info;
  ptrdiff_t info_stride;
  void step() {
    q += kGroup;
    ++info;
  }
};

// Asks for a record of weights further on, block by block, while one is read. Always inline, since
// GCC drops calls of a function that does no more than that.
struct Ahead {
  const uint8_t* next = nullptr;  // null: the hardware does so by itself
  ptrdiff_t step = 0;             // bytes of a block, with its share of the tables
  LOCALLLM_INLINE void block() {
    if (!next) return;
    for (ptrdiff_t i = 0; i < step; i += 64) prefetch(next + i);
    next += step;
  }
};

// The chains of ROWS rows over some blocks; `codes` packed as in memory or unpacked to bytes.
template <int BITS, bool HALVES, bool PACKED, bool BIAS, int ROWS, class Source>
inline __attribute__((always_inline)) void chain(const Source& groups, const uint8_t* codes,
                                                 int blocks, int offset, Rows& x, Vec (&dots)[ROWS],
                                                 Vec (&bias)[ROWS], Ahead ahead = {}) {
  for (int b = 0; b < blocks; ++b) {
    IVec dot[ROWS];
    if constexpr (PACKED) ahead.block();
    const auto finish = [&](int entry, const Group<ROWS>& group) {
      add_dots<ROWS>(dot, offset, group, groups.scale(entry), dots);
      if constexpr (BIAS) add_bias<ROWS>(group, groups.bias(entry), bias);
    };
    if constexpr (HALVES) {
      dots_of<BITS, PACKED, 0, 4, ROWS>(codes, x.q, x.q_stride, dot);
      finish(2 * b, {x.info, x.info_stride, 0});
      dots_of<BITS, PACKED, 4, 8, ROWS>(codes, x.q, x.q_stride, dot);
      finish(2 * b + 1, {x.info, x.info_stride, 1});
    } else {
      dots_of<BITS, PACKED, 0, 8, ROWS>(codes, x.q, x.q_stride, dot);
      finish(b, {x.info, x.info_stride, -1});
    }
    codes += PACKED ? block_bytes<BITS>() : kPanelBlock;
    x.step();
  }
}

template <bool BIAS, int ROWS>
inline void store_tile(const Vec (&dots)[ROWS], const Vec (&bias)[ROWS], float* out,
                       ptrdiff_t stride, int valid_rows) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
    store_row(out + m * stride, BIAS ? add(dots[m], bias[m]) : dots[m], valid_rows);
}

// A panel read once from memory, record by record: for few rows.
template <int BITS, bool HALVES, bool BIAS, bool IN_PLACE, int ROWS>
void stream_tile(const Matrix& w, const uint8_t* record, int shift, int offset, Rows x,
                 const PanelScratch& scratch, float* out, ptrdiff_t stride, int valid_rows) {
  const ptrdiff_t distance = stream_ahead();
  const ptrdiff_t per_block = static_cast<ptrdiff_t>(w.record_bytes) / w.record_blocks;
  Vec dots[ROWS], bias[ROWS];
  clear(dots);
  clear(bias);
  for (int left = w.blocks(); left > 0; left -= w.record_blocks, record += w.record_bytes) {
    const auto groups = [&] {
      if constexpr (IN_PLACE)
        return view_record(w, record, shift);
      else
        return expand_record(w, record, scratch.scales, scratch.biases);
    }();
    chain<BITS, HALVES, true, BIAS>(
        groups, record + w.codes_at, left < w.record_blocks ? left : w.record_blocks, offset, x,
        dots, bias, {distance ? record + distance : nullptr, per_block});
  }
  store_tile<BIAS>(dots, bias, out, stride, valid_rows);
}

// A panel made ready in scratch: for many rows.
template <int BITS, bool HALVES, bool BIAS, int ROWS>
void ready_tile(const Expanded& groups, const uint8_t* codes, int blocks, int offset, Rows x,
                float* out, ptrdiff_t stride, int valid_rows) {
  // Where registers are few the bias chains run first and wait in memory.
  constexpr bool kApart = BIAS && ROWS > kBiasRows;
  Vec dots[ROWS], bias[ROWS];
  float waiting[kApart ? ROWS : 1][kLanes];
  clear(bias);
  if constexpr (kApart) {
    constexpr int kGroups = HALVES ? 2 : 1;
    for (int b = 0; b < blocks; ++b)
      for (int h = 0; h < kGroups; ++h)
        add_bias<ROWS>({x.info + b, x.info_stride, HALVES ? h : -1}, groups.bias(kGroups * b + h),
                       bias);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) store(waiting[m], bias[m]);
  }
  clear(dots);
  chain<BITS, HALVES, false, BIAS && !kApart>(groups, codes, blocks, offset, x, dots, bias);
  if constexpr (kApart) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) bias[m] = load(waiting[m]);
  }
  store_tile<BIAS>(dots, bias, out, stride, valid_rows);
}

// f(Count<rows>) over all rows in tiles of at most MOST; f gets the tile's first row too.
template <int MOST, class F>
inline void each_tile(int rows, F&& f) {
  int m = 0;
  for (; m + MOST <= rows; m += MOST) f(m, Count<MOST>{});
  if constexpr (MOST > 1) each_tile<MOST / 2>(rows - m, [&](int at, auto n) { f(m + at, n); });
}

// The same with tiles of every size: few rows are bound by memory, which one tile reads once.
template <int MOST, class F>
inline void few_rows(int rows, F&& f) {
  if (rows == MOST) return f(0, Count<MOST>{});
  if constexpr (MOST > 1) few_rows<MOST - 1>(rows, f);
}

template <int BITS, bool HALVES, bool BIAS>
void matmul_quantized(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                      int last, void* scratch_memory) {
  const int shift = in_place_shift(w);
  const int offset = BITS == 8 ? w.offset - kByteShift : w.offset;
  const PanelScratch scratch = panel_scratch(w, scratch_memory);
  const auto rows = [&](int m) {
    return Rows{in.q + m * in.q_stride, in.q_stride, in.info + m * in.info_stride, in.info_stride};
  };
  for (int i = first; i < last; ++i) {
    const uint8_t* panel = w.panel(i);
    float* to = out + i * kLanes;
    const int valid = w.rows - i * kLanes;
    if (in.rows <= 2 * kStreamRows) {  // twice through the caches costs less than unpacking
      const auto stream = [&](int m, auto n) {
        constexpr int kRows = decltype(n)::value;
        const auto run = shift >= 0 ? stream_tile<BITS, HALVES, BIAS, true, kRows>
                                    : stream_tile<BITS, HALVES, BIAS, false, kRows>;
        run(w, panel, shift, offset, rows(m), scratch, to + m * stride, stride, valid);
      };
      const int whole = in.rows > kStreamRows ? kStreamRows : 0;
      if (whole) stream(0, Count<kStreamRows>{});
      few_rows<kStreamRows>(in.rows - whole, [&](int, auto n) { stream(whole, n); });
      continue;
    }
    auto* codes = reinterpret_cast<uint8_t*>(scratch.rest);
    each_record(w, panel, [&](const uint8_t* record, int block, int blocks) {
      for (int b = 0; b < blocks; ++b)
        unpack<BITS>(record + w.codes_at + b * block_bytes<BITS>(),
                     codes + static_cast<size_t>(block + b) * kPanelBlock);
    });
    const Expanded groups = expand_panel(w, panel, scratch);
    each_tile<kTileRows>(in.rows, [&](int m, auto n) {
      ready_tile<BITS, HALVES, BIAS, decltype(n)::value>(groups, codes, w.blocks(), offset, rows(m),
                                                         to + m * stride, stride, valid);
    });
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
  const auto at = [&](int panel) { return reinterpret_cast<const T*>(w.panel(panel)); };
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
void dequantize(const Matrix& w, const uint8_t* panel, const PanelScratch& scratch) {
  alignas(64) uint8_t block[kPanelBlock];
  const bool halves = w.group == 16;
  const IVec shift = set1(int32_t{w.offset});
  const Expanded groups = expand_panel(w, panel, scratch);
  const auto one = [&](const uint8_t* packed, int g) {
    unpack<BITS>(packed, block);
    for (int v = 0; v < 8; ++v) {
      const int entry = halves ? 2 * g + v / 4 : g;
      const Vec s = groups.scale(entry);
      const IVec four = load(reinterpret_cast<const int32_t*>(block + v * 64));
      const auto put = [&](const IVec& code, int j) {
        Vec value = mul(s, to_float(add(code, shift)));
        if (w.biases.present) value = add(value, groups.bias(entry));
        store(scratch.rest + (g * kGroup + 4 * v + j) * kLanes, value);
      };
      put(shift_right<24>(shift_left<24>(four)), 0);
      put(shift_right<24>(shift_left<16>(four)), 1);
      put(shift_right<24>(shift_left<8>(four)), 2);
      put(shift_right<24>(four), 3);
    }
  };
  each_record(w, panel, [&](const uint8_t* record, int first, int blocks) {
    for (int b = 0; b < blocks; ++b) one(record + w.codes_at + b * block_bytes<BITS>(), first + b);
  });
}

template <int BITS>
void matmul_dequantized(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                        int last, void* scratch_memory) {
  const PanelScratch scratch = panel_scratch(w, scratch_memory);
  for (int i = first; i < last; ++i) {
    dequantize<BITS>(w, w.panel(i), scratch);
    dense_panel<Dense<float>>(scratch.rest, w.cols, in, out, stride, i * kLanes, w.rows);
  }
}

template <int BITS>
void matmul_bits(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                 int last, void* scratch) {
  if (!in.q) return matmul_dequantized<BITS>(w, in, out, stride, first, last, scratch);
  const bool halves = w.group == 16;
  const auto run =
      w.biases.present
          ? (halves ? matmul_quantized<BITS, true, true> : matmul_quantized<BITS, false, true>)
          : (halves ? matmul_quantized<BITS, true, false> : matmul_quantized<BITS, false, false>);
  run(w, in, out, stride, first, last, scratch);
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
