// Causal attention within each sequence, and its gradient, from tiles: scores of some rows against
// all they see, never of a whole sequence at once.
//
// The gradient goes twice over the scores, by queries for dq and by keys for dk and dv, so that
// every result is one thread's and sums have one order.
#pragma once

#include "train/rows.h"

namespace localllm::LOCALLLM_ISA {
namespace {

constexpr int kQueryRows = 48 / kRows * kRows;

struct HeadPlace {
  const train::AttentionData& a;
  const train::Sequence& s;

  int dim() const { return a.spec.head_dim; }
  int dim_steps() const { return train::round_up(dim(), kBlock) / kPair; }
  int padded() const { return train::round_up(s.length, kPanel); }
  const Elem* row(const void* x, int heads, int head, int at) const {
    return static_cast<const Elem*>(x) + static_cast<ptrdiff_t>(s.first + at) * heads * dim() +
           head * dim();
  }
  // Panels of a head's rows; both forms take the same room.
  Elem* panels(void* p, int heads, int head) const {
    return static_cast<Elem*>(p) +
           (static_cast<ptrdiff_t>(s.padded) * heads + static_cast<ptrdiff_t>(head) * padded()) *
               dim_steps() * kPair;
  }
};

// The part of a lanes panel that begins at `column`.
inline const Elem* lanes_at(const HeadPlace& h, const Elem* panels, int column) {
  return panels + static_cast<ptrdiff_t>(column) * h.dim_steps() * kPair;
}

// The columns [c, c + …) of a sums panel, from row `at` on.
inline const Elem* sums_at(const HeadPlace& h, const Elem* panels, int column, int width, int at) {
  return panels + static_cast<ptrdiff_t>(column) * h.padded() + static_cast<ptrdiff_t>(at) * width;
}

inline void pack_head_lanes(const HeadPlace& h, const void* x, int heads, int head, void* out) {
  Elem* to = h.panels(out, heads, head);
  for (int r = 0; r < h.padded(); r += kPartWidth) {
    const int left = h.s.length - r;
    pack_lanes(
        h.row(x, heads, head, r < h.s.length ? r : 0), static_cast<ptrdiff_t>(heads) * h.dim(),
        left < 0            ? 0
        : left < kPartWidth ? left
                            : kPartWidth,
        h.dim(), h.dim_steps(), kPartWidth, to + static_cast<ptrdiff_t>(r) * h.dim_steps() * kPair);
  }
}

inline void pack_head_sums(const HeadPlace& h, const void* x, int heads, int head, void* out) {
  Elem* to = h.panels(out, heads, head);
  for (int c = 0; c < h.dim(); c += kPartWidth) {
    const int left = h.dim() - c, columns = left < kPartWidth ? left : kPartWidth;
    pack_sums(h.row(x, heads, head, 0) + c, static_cast<ptrdiff_t>(heads) * h.dim(), h.s.length,
              columns, h.padded() / kPair, to + static_cast<ptrdiff_t>(c) * h.padded(), 0);
  }
}

// Of a head of queries; those of a kv head do its keys and values too.
void attend_pack(const train::AttentionData& a, const train::Sequence& s, int head, bool backward) {
  const HeadPlace h{a, s};
  if (backward) {
    pack_head_lanes(h, a.q, a.spec.heads, head, a.q_lanes);
    pack_head_sums(h, a.q, a.spec.heads, head, a.q_sums);
    pack_head_lanes(h, a.dout, a.spec.heads, head, a.d_lanes);
    pack_head_sums(h, a.dout, a.spec.heads, head, a.d_sums);
    for (int r = 0; r < s.length; ++r) {
      const Elem* d = h.row(a.dout, a.spec.heads, head, r);
      const Elem* o = h.row(a.out, a.spec.heads, head, r);
      Vec sum = zero();
      each_vec(h.dim(), [&](int i, auto tail) {
        sum = fma(load_elem(d + i, tail), load_elem(o + i, tail), sum);
      });
      a.dot[static_cast<ptrdiff_t>(head) * a.rows + s.first + r] = reduce_add(sum);
    }
  }
  const int group = a.spec.heads / a.spec.kv_heads;
  if (head % group) return;
  const int kv = head / group;
  pack_head_lanes(h, a.k, a.spec.kv_heads, kv, a.k_lanes);
  if (backward) {
    pack_head_sums(h, a.k, a.spec.kv_heads, kv, a.k_sums);
    pack_head_lanes(h, a.v, a.spec.kv_heads, kv, a.v_lanes);
  } else {
    pack_head_sums(h, a.v, a.spec.kv_heads, kv, a.v_sums);
  }
}

// c [rows, last - first] (ld) = packed rows times the lanes panel's columns.
inline void scores(const HeadPlace& h, const Elem* rows, int count, const Elem* panels, int first,
                   int last, float* c, ptrdiff_t ld) {
  alignas(64) float part[kRows * kPartWidth];
  for (int column = first; column < last; column += kPartWidth)
    for (int b = 0; b < count; b += kRows) {
      tile(kVecs, rows + static_cast<ptrdiff_t>(b) * h.dim_steps() * kPair,
           lanes_at(h, panels, column), h.dim_steps(), nullptr, nullptr, 0, part);
      for (int r = 0; r < kRows && b + r < count; ++r)
        std::memcpy(c + (b + r) * ld + (column - first), part + r * kPartWidth,
                    kPartWidth * sizeof(float));
    }
}

// c [rows, head_dim] (+)= packed rows times the sums panel's rows first … last.
inline void mixed(const HeadPlace& h, const Elem* rows, int count, const Elem* panels, int first,
                  int last, float* c, bool adding) {
  alignas(64) float tile_out[kRows * kPartWidth];
  const int steps = (last - first) / kPair, dim = h.dim();
  for (int column = 0; column < dim; column += kPartWidth) {
    const int left = (dim - column + 15) / 16, vecs = left < kVecs ? left : kVecs;
    const int width = vecs * 16, n = dim - column < width ? dim - column : width;
    for (int b = 0; b < count; b += kRows) {
      tile(vecs, rows + static_cast<ptrdiff_t>(b) * steps * kPair,
           sums_at(h, panels, column, width, first), steps, nullptr, nullptr, 0, tile_out);
      for (int r = 0; r < kRows && b + r < count; ++r) {
        float* to = c + static_cast<ptrdiff_t>(b + r) * dim + column;
        const float* from = tile_out + r * width;
        for (int i = 0; i < n; ++i) to[i] = adding ? to[i] + from[i] : from[i];
      }
    }
  }
}

inline Slope score(const train::AttentionSpec& s, const Vec& x) {
  const Vec scale = set1(s.scale), scaled = mul(x, scale);
  if (s.softcap == 0.0f) return {scaled, scale};
  const Vec y = tanh(div(scaled, set1(s.softcap)));
  return {mul(set1(s.softcap), y), mul(scale, sub(set1(1.0f), mul(y, y)))};
}

// Room for a unit's work, cut from a thread's scratch.
struct AttendScratch {
  AttendScratch(const HeadPlace& h, void* scratch) {
    uint8_t* at = static_cast<uint8_t*>(scratch);
    const auto take = [&](size_t bytes) {
      uint8_t* p = at;
      at += (bytes + 63) & ~size_t{63};
      return p;
    };
    const size_t rows = kPanel, length = static_cast<size_t>(h.padded());
    const size_t dim = static_cast<size_t>(train::round_up(h.dim(), kBlock));
    a = reinterpret_cast<float*>(take(rows * length * 4));
    b = reinterpret_cast<float*>(take(rows * length * 4));
    first = reinterpret_cast<Elem*>(take(rows * dim * sizeof(Elem)));
    second = reinterpret_cast<Elem*>(take(rows * dim * sizeof(Elem)));
    elements = reinterpret_cast<Elem*>(take(rows * length * sizeof(Elem)));
    packed = reinterpret_cast<Elem*>(take(rows * length * sizeof(Elem)));
    out = reinterpret_cast<float*>(take(rows * dim * 4));
    out2 = reinterpret_cast<float*>(take(rows * dim * 4));
  }
  float *a, *b;
  Elem *first, *second, *elements, *packed;
  float *out, *out2;
};

inline void pack_some(const Elem* x, ptrdiff_t ld, int rows, int cols, int steps, Elem* out) {
  for (int b = 0; b < rows; b += kRows)
    pack_block(x + b * ld, ld, rows - b < kRows ? rows - b : kRows, cols, steps,
               out + static_cast<ptrdiff_t>(b) * steps * kPair);
}

inline int first_seen(const train::AttentionSpec& s, int row) {
  return s.window > 0 && row + 1 > s.window ? row + 1 - s.window : 0;
}

void attend(const train::AttentionData& a, const train::Sequence& s, int head, int row,
            void* scratch) {
  const Tiles in_use;
  const HeadPlace h{a, s};
  const AttendScratch w(h, scratch);
  const int count = s.length - row < kQueryRows ? s.length - row : kQueryRows;
  const int kv = head / (a.spec.heads / a.spec.kv_heads);
  const int first = first_seen(a.spec, row) / kPanel * kPanel;
  const int last = train::round_up(row + count, kPanel), width = last - first;
  const ptrdiff_t ld = static_cast<ptrdiff_t>(a.spec.heads) * h.dim();
  pack_some(h.row(a.q, a.spec.heads, head, row), ld, count, h.dim(), h.dim_steps(), w.first);
  scores(h, w.first, count, h.panels(a.k_lanes, a.spec.kv_heads, kv), first, last, w.a, width);
  float sums[kQueryRows];
  for (int r = 0; r < count; ++r) {
    float* x = w.a + static_cast<ptrdiff_t>(r) * width;
    const int from = first_seen(a.spec, row + r) - first, to = row + r + 1 - first;
    Vec top = set1(-3.0e38f);
    for (int i = 0; i < width; i += 16) {
      const Vec y =
          select(lanes(from - i, to - i), score(a.spec, load(x + i)).value, set1(-3.0e38f));
      store(x + i, y);
      top = max(y, top);
    }
    const float largest = reduce_max(top);
    Vec sum = zero();
    for (int i = 0; i < width; i += 16) {
      const Vec p = select(lanes(from - i, to - i), exp(sub(load(x + i), set1(largest))), zero());
      sum = add(sum, p);
      store_elem(w.elements + static_cast<ptrdiff_t>(r) * width + i, p);
    }
    sums[r] = reduce_add(sum);
    a.lse[static_cast<ptrdiff_t>(head) * a.rows + s.first + row + r] =
        largest + __builtin_logf(sums[r]);
  }
  pack_some(w.elements, width, count, width, width / kPair, w.packed);
  mixed(h, w.packed, count, h.panels(a.v_sums, a.spec.kv_heads, kv), first, last, w.out, false);
  for (int r = 0; r < count; ++r)
    to_elements(w.out + static_cast<ptrdiff_t>(r) * h.dim(), 1.0f / sums[r], 0, h.dim(), 0, 1,
                const_cast<Elem*>(h.row(a.out, a.spec.heads, head, row + r)), 0);
}

void attend_back_q(const train::AttentionData& a, const train::Sequence& s, int head, int row,
                   void* scratch) {
  const Tiles in_use;
  const HeadPlace h{a, s};
  const AttendScratch w(h, scratch);
  const int count = s.length - row < kQueryRows ? s.length - row : kQueryRows;
  const int kv = head / (a.spec.heads / a.spec.kv_heads);
  const int first = first_seen(a.spec, row) / kPanel * kPanel;
  const int last = train::round_up(row + count, kPanel), width = last - first;
  const ptrdiff_t ld = static_cast<ptrdiff_t>(a.spec.heads) * h.dim();
  pack_some(h.row(a.q, a.spec.heads, head, row), ld, count, h.dim(), h.dim_steps(), w.first);
  pack_some(h.row(a.dout, a.spec.heads, head, row), ld, count, h.dim(), h.dim_steps(), w.second);
  scores(h, w.first, count, h.panels(a.k_lanes, a.spec.kv_heads, kv), first, last, w.a, width);
  scores(h, w.second, count, h.panels(a.v_lanes, a.spec.kv_heads, kv), first, last, w.b, width);
  for (int r = 0; r < count; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(head) * a.rows + s.first + row + r;
    const Vec lse = set1(a.lse[at]), dot = set1(a.dot[at]);
    const int from = first_seen(a.spec, row + r) - first, to = row + r + 1 - first;
    for (int i = 0; i < width; i += 16) {
      const Slope l = score(a.spec, load(w.a + static_cast<ptrdiff_t>(r) * width + i));
      const Vec p = exp(sub(l.value, lse));
      const Vec g = sub(load(w.b + static_cast<ptrdiff_t>(r) * width + i), dot);
      store_elem(w.elements + static_cast<ptrdiff_t>(r) * width + i,
                 select(lanes(from - i, to - i), mul(mul(p, g), l.slope), zero()));
    }
  }
  pack_some(w.elements, width, count, width, width / kPair, w.packed);
  mixed(h, w.packed, count, h.panels(a.k_sums, a.spec.kv_heads, kv), first, last, w.out, false);
  for (int r = 0; r < count; ++r)
    std::memcpy(a.dq + static_cast<ptrdiff_t>(s.first + row + r) * ld + head * h.dim(),
                w.out + static_cast<ptrdiff_t>(r) * h.dim(),
                static_cast<size_t>(h.dim()) * sizeof(float));
}

void attend_back_kv(const train::AttentionData& a, const train::Sequence& s, int kv_head, int row,
                    void* scratch) {
  const Tiles in_use;
  const HeadPlace h{a, s};
  const AttendScratch w(h, scratch);
  const int count = s.length - row < kQueryRows ? s.length - row : kQueryRows;
  const int group = a.spec.heads / a.spec.kv_heads;
  // The queries that see some of these keys.
  const int first = row / kPanel * kPanel;
  int end = s.length;
  if (a.spec.window > 0 && row + count - 1 + a.spec.window < end)
    end = row + count - 1 + a.spec.window;
  const int last = train::round_up(end, kPanel), width = last - first;
  const ptrdiff_t ld = static_cast<ptrdiff_t>(a.spec.kv_heads) * h.dim();
  pack_some(h.row(a.k, a.spec.kv_heads, kv_head, row), ld, count, h.dim(), h.dim_steps(), w.first);
  pack_some(h.row(a.v, a.spec.kv_heads, kv_head, row), ld, count, h.dim(), h.dim_steps(), w.second);
  for (int i = 0; i < group; ++i) {
    const int head = kv_head * group + i;
    const ptrdiff_t at = static_cast<ptrdiff_t>(head) * a.rows + s.first;
    scores(h, w.first, count, h.panels(a.q_lanes, a.spec.heads, head), first, last, w.a, width);
    scores(h, w.second, count, h.panels(a.d_lanes, a.spec.heads, head), first, last, w.b, width);
    const auto each = [&](auto f) {
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < width; c += 16) {
          // Queries from the key's own position on, as far as the window reaches.
          const int key = row + r, query = first + c;
          const int to =
              a.spec.window > 0 && key + a.spec.window < s.length ? key + a.spec.window : s.length;
          const int left = s.length - query, n = left < 0 ? 0 : left < 16 ? left : 16;
          const Vec lse =
              n == 16 ? load(a.lse + at + query) : load(a.lse + at + (n ? query : 0), n);
          const ptrdiff_t place = static_cast<ptrdiff_t>(r) * width + c;
          const Slope l = score(a.spec, load(w.a + place));
          const Vec p = exp(sub(l.value, lse));
          store_elem(w.elements + place, select(lanes(key - query, to - query),
                                                f(place, query, n, p, l.slope), zero()));
        }
      pack_some(w.elements, width, count, width, width / kPair, w.packed);
    };
    each([&](ptrdiff_t, int, int, const Vec& p, const Vec&) { return p; });
    mixed(h, w.packed, count, h.panels(a.d_sums, a.spec.heads, head), first, last, w.out2, i > 0);
    each([&](ptrdiff_t place, int query, int n, const Vec& p, const Vec& slope) {
      const Vec dot = n == 16 ? load(a.dot + at + query) : load(a.dot + at + (n ? query : 0), n);
      return mul(mul(p, sub(load(w.b + place), dot)), slope);
    });
    mixed(h, w.packed, count, h.panels(a.q_sums, a.spec.heads, head), first, last, w.out, i > 0);
  }
  for (int r = 0; r < count; ++r) {
    const ptrdiff_t to = static_cast<ptrdiff_t>(s.first + row + r) * ld + kv_head * h.dim();
    const size_t bytes = static_cast<size_t>(h.dim()) * sizeof(float);
    std::memcpy(a.dk + to, w.out + static_cast<ptrdiff_t>(r) * h.dim(), bytes);
    std::memcpy(a.dv + to, w.out2 + static_cast<ptrdiff_t>(r) * h.dim(), bytes);
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
