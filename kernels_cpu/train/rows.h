// What goes row by row: norms, rotation, activations, the softmax of the head; and back.
#pragma once

#include "train/product.h"

namespace localllm::LOCALLLM_ISA {
namespace {

inline float sum_of(const float* x, int n) {
  Vec sum = zero();
  each_vec(n, [&](int i, auto tail) { sum = add(sum, load(x + i, tail)); });
  return reduce_add(sum);
}

inline float dot_of(const float* x, const float* y, int n) {
  Vec sum = zero();
  each_vec(n, [&](int i, auto tail) { sum = fma(load(x + i, tail), load(y + i, tail), sum); });
  return reduce_add(sum);
}

struct Moments {
  float mean, inverse;
};

inline Moments moments(const train::NormSpec& s, const float* x) {
  const float n = static_cast<float>(s.n);
  const float mean = s.layer ? sum_of(x, s.n) / n : 0.0f;
  Vec sum = zero();
  each_vec(s.n, [&](int i, auto tail) {
    const Vec d = select(valid(tail), sub(load(x + i, tail), set1(mean)), zero());
    sum = fma(d, d, sum);
  });
  return {mean, 1.0f / sqrt1(reduce_add(sum) / n + s.eps)};
}

// f(i, tail, normalized)
template <class F>
inline void norm_row(const train::NormSpec& s, const float* x, F f) {
  const Moments m = moments(s, x);
  each_vec(s.n, [&](int i, auto tail) {
    Vec y =
        mul(mul(sub(load(x + i, tail), set1(m.mean)), set1(m.inverse)), load(s.weight + i, tail));
    if (s.bias) y = add(y, load(s.bias + i, tail));
    f(i, tail, y);
  });
}

// f(i, tail, gradient at x), for dy the gradient at the result. y = n w with n = (x - mean) / d:
// dx = (g - mean(g) - n mean(g n)) / d with g = dy w, and no mean(g) for RMSNorm. The gain's
// gradient is dy n, the bias's dy; both times alpha.
template <class F>
inline void norm_row_back(const train::NormSpec& s, const float* x, const float* dy, float alpha,
                          const train::NormSums& sums, F f) {
  const Moments m = moments(s, x);
  const Vec inverse = set1(m.inverse), mean = set1(m.mean);
  Vec sum = zero(), product = zero();
  each_vec(s.n, [&](int i, auto tail) {
    const Vec g = mul(load(dy + i, tail), load(s.weight + i, tail));
    sum = add(sum, g);
    product = fma(g, mul(sub(load(x + i, tail), mean), inverse), product);
  });
  const float n = static_cast<float>(s.n);
  const Vec shift = set1(s.layer ? reduce_add(sum) / n : 0.0f);
  const Vec along = set1(reduce_add(product) / n);
  each_vec(s.n, [&](int i, auto tail) {
    const Vec g = mul(load(dy + i, tail), load(s.weight + i, tail));
    const Vec normal = mul(sub(load(x + i, tail), mean), inverse);
    if (sums.gain) {
      const Vec d = mul(load(dy + i, tail), set1(alpha));
      store(sums.gain + i, fma(d, normal, load(sums.gain + i, tail)), tail);
      if (sums.bias) store(sums.bias + i, add(d, load(sums.bias + i, tail)), tail);
    }
    f(i, tail, mul(inverse, sub(sub(g, shift), mul(normal, along))));
  });
}

void to_elements(const float* x, float scale, int ld, int cols, int row0, int row1, void* out,
                 int out_ld) {
  for (int r = row0; r < row1; ++r)
    each_vec(cols, [&](int i, auto tail) {
      store_elem(static_cast<Elem*>(out) + static_cast<ptrdiff_t>(r) * out_ld + i,
                 mul(load(x + static_cast<ptrdiff_t>(r) * ld + i, tail), set1(scale)), tail);
    });
}

void to_floats(const void* x, int n, float* out) {
  each_vec(n, [&](int i, auto tail) {
    store(out + i, load_elem(static_cast<const Elem*>(x) + i, tail), tail);
  });
}

void norm(const train::NormSpec& s, const float* x, int row0, int row1, void* out, int out_ld) {
  for (int r = row0; r < row1; ++r)
    norm_row(s, x + static_cast<ptrdiff_t>(r) * s.n, [&](int i, auto tail, const Vec& y) {
      store_elem(static_cast<Elem*>(out) + static_cast<ptrdiff_t>(r) * out_ld + i, y, tail);
    });
}

void norm_add(const train::NormSpec& s, const float* x, float alpha, const float* add_to, int row0,
              int row1, float* out) {
  for (int r = row0; r < row1; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(r) * s.n;
    norm_row(s, x + at, [&](int i, auto tail, const Vec& y) {
      store(out + at + i, add(load(add_to + at + i, tail), mul(set1(alpha), y)), tail);
    });
  }
}

void norm_back(const train::NormSpec& s, const float* x, const float* dy, float alpha, bool adding,
               int row0, int row1, float* dx, train::NormSums sums) {
  for (int r = row0; r < row1; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(r) * s.n;
    norm_row_back(s, x + at, dy + at, alpha, sums, [&](int i, auto tail, const Vec& g) {
      const Vec scaled = mul(g, set1(alpha));
      store(dx + at + i, adding ? add(load(dx + at + i, tail), scaled) : scaled, tail);
    });
  }
}

// Turns pairs by the angle of the table, or back.
inline void rotate_row(const train::Heads& h, const float* table, bool back, float* x) {
  const float *cos = table, *sin = table + h.half;
  for (int head = 0; head < h.heads; ++head, x += h.head_dim) {
    if (h.interleaved) {
      for (int i = 0; i < h.half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1], s = back ? -sin[i] : sin[i];
        x[2 * i] = a * cos[i] - b * s;
        x[2 * i + 1] = b * cos[i] + a * s;
      }
      continue;
    }
    each_vec(h.half, [&](int i, auto tail) {
      const Vec a = load(x + i, tail), b = load(x + h.half + i, tail);
      const Vec c = load(cos + i, tail), turn = load(sin + i, tail);
      const Vec s = back ? sub(zero(), turn) : turn;
      const Vec first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
      store(x + i, first, tail);
      store(x + h.half + i, second, tail);
    });
  }
}

void heads(const train::Heads& h, const void* x, int ld, int row0, int row1, void* out,
           float* scratch) {
  const int width = h.heads * h.head_dim;
  for (int r = row0; r < row1; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(r) * ld;
    to_floats(static_cast<const Elem*>(x) + at, width, scratch);
    if (h.norm.weight) {
      for (int c = 0; c < width; c += h.norm.n) {
        float* part = scratch + c;
        norm_row(h.norm, part, [&](int i, auto tail, const Vec& y) { store(part + i, y, tail); });
      }
    }
    if (h.half > 0) rotate_row(h, h.table + static_cast<ptrdiff_t>(r) * 2 * h.half, false, scratch);
    to_elements(scratch, 1.0f, 0, width, 0, 1, static_cast<Elem*>(out) + at, 0);
  }
}

void heads_back(const train::Heads& h, const void* x, int ld, const float* dy, int row0, int row1,
                void* dx, float* scratch, train::NormSums sums) {
  const int width = h.heads * h.head_dim;
  float* raw = scratch + width;
  for (int r = row0; r < row1; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(r) * ld;
    each_vec(width, [&](int i, auto tail) { store(scratch + i, load(dy + at + i, tail), tail); });
    if (h.half > 0) rotate_row(h, h.table + static_cast<ptrdiff_t>(r) * 2 * h.half, true, scratch);
    if (h.norm.weight) {
      to_floats(static_cast<const Elem*>(x) + at, width, raw);
      for (int c = 0; c < width; c += h.norm.n) {
        float* part = scratch + c;
        norm_row_back(h.norm, raw + c, part, 1.0f, sums,
                      [&](int i, auto tail, const Vec& g) { store(part + i, g, tail); });
      }
    }
    to_elements(scratch, 1.0f, 0, width, 0, 1, static_cast<Elem*>(dx) + at, 0);
  }
}

struct Slope {
  Vec value, slope;
};

inline Slope activation(Activation kind, const Vec& x) {
  const Vec one = set1(1.0f), half = set1(0.5f);
  if (kind == Activation::kRelu) {
    const Mask on = less(zero(), x);
    return {select(on, x, zero()), select(on, one, zero())};
  }
  if (kind == Activation::kSilu) {
    const Vec s = div(one, add(one, exp(sub(zero(), x))));
    const Vec y = mul(x, s);
    return {y, add(s, mul(y, sub(one, s)))};
  }
  if (kind == Activation::kGelu) {
    const Vec chance = mul(half, add(one, erf(mul(x, set1(0.70710678f)))));
    const Vec density = mul(set1(0.39894228f), exp(mul(set1(-0.5f), mul(x, x))));
    return {mul(x, chance), add(chance, mul(x, density))};
  }
  const Vec square = mul(x, x);
  const Vec inner = mul(set1(0.79788456f), mul(x, fma(set1(0.044715f), square, one)));
  const Vec t = tanh(inner);
  const Vec slope = mul(set1(0.79788456f), fma(set1(3.0f * 0.044715f), square, one));
  const Vec rise = mul(mul(half, x), mul(sub(one, mul(t, t)), slope));
  return {mul(mul(half, x), add(one, t)), add(mul(half, add(one, t)), rise)};
}

// gate null: not gated, `up` is activated.
void activate(Activation kind, const void* gate, const void* up, int ld, int n, int row0, int row1,
              void* out) {
  for (int r = row0; r < row1; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(r) * ld;
    each_vec(n, [&](int i, auto tail) {
      const Vec u = load_elem(static_cast<const Elem*>(up) + at + i, tail);
      const Vec y =
          gate ? mul(activation(kind, load_elem(static_cast<const Elem*>(gate) + at + i, tail))
                         .value,
                     u)
               : activation(kind, u).value;
      store_elem(static_cast<Elem*>(out) + at + i, y, tail);
    });
  }
}

void activate_back(Activation kind, const void* gate, const void* up, const float* dy, int ld,
                   int n, int row0, int row1, void* dgate, void* dup) {
  for (int r = row0; r < row1; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(r) * ld;
    each_vec(n, [&](int i, auto tail) {
      const Vec u = load_elem(static_cast<const Elem*>(up) + at + i, tail);
      const Vec d = load(dy + at + i, tail);
      if (!gate) {
        store_elem(static_cast<Elem*>(dup) + at + i, mul(d, activation(kind, u).slope), tail);
        return;
      }
      const Slope a = activation(kind, load_elem(static_cast<const Elem*>(gate) + at + i, tail));
      store_elem(static_cast<Elem*>(dgate) + at + i, mul(mul(d, u), a.slope), tail);
      store_elem(static_cast<Elem*>(dup) + at + i, mul(d, a.value), tail);
    });
  }
}

void add_columns(const void* x, int ld, int m, int column0, int n, float* out) {
  for (int r = 0; r < m; ++r) {
    const Elem* from = static_cast<const Elem*>(x) + static_cast<ptrdiff_t>(r) * ld + column0;
    each_vec(n, [&](int i, auto tail) {
      store(out + i, add(load(out + i, tail), load_elem(from + i, tail)), tail);
    });
  }
}

// Logits as the model gives them, and their slope.
inline Slope logit(const train::HeadTile& t, const Vec& x) {
  const Vec scale = set1(t.scale), scaled = mul(x, scale);
  if (t.softcap == 0.0f) return {scaled, scale};
  const Vec y = tanh(div(scaled, set1(t.softcap)));
  return {mul(set1(t.softcap), y), mul(scale, sub(set1(1.0f), mul(y, y)))};
}

// One pass over the vocabulary: `top` is the largest logit so far, `sum` of exp(logit - top).
void head_tile(const train::HeadTile& t, int row0, int row1) {
  const float lowest = -3.0e38f;
  for (int r = row0; r < row1; ++r) {
    const float* x = t.logits + static_cast<ptrdiff_t>(r) * t.ld;
    Vec top = set1(lowest);
    each_vec(t.width, [&](int i, auto tail) {
      top = max(select(valid(tail), logit(t, load(x + i, tail)).value, set1(lowest)), top);
    });
    const float before = t.top[r], now = reduce_max(top);
    const float reference = now > before ? now : before;
    if (now > before && before > lowest) {
      float lanes16[16];
      store(lanes16, exp(set1(before - now)));
      t.sum[r] *= lanes16[0];
      if (t.dhidden) {
        float* d = t.dhidden + static_cast<ptrdiff_t>(r) * t.hidden;
        each_vec(t.hidden, [&](int i, auto tail) {
          store(d + i, mul(load(d + i, tail), set1(lanes16[0])), tail);
        });
      }
    }
    t.top[r] = reference;
    Vec sum = zero();
    each_vec(t.width, [&](int i, auto tail) {
      const Slope l = logit(t, load(x + i, tail));
      const Vec p = select(valid(tail), exp(sub(l.value, set1(reference))), zero());
      sum = add(sum, p);
      if (t.probabilities)
        store_elem(static_cast<Elem*>(t.probabilities) + static_cast<ptrdiff_t>(r) * t.ld + i,
                   mul(p, l.slope), tail);
    });
    t.sum[r] += reduce_add(sum);
    const int target = t.targets[r] - t.column0;
    if (target >= 0 && target < t.width) {
      const Slope l = logit(t, set1(x[target]));
      float lanes16[16];
      store(lanes16, l.value);
      t.target[r] = lanes16[0];
      store(lanes16, l.slope);
      t.target_slope[r] = lanes16[0];
    }
  }
}

void head_slopes(const train::HeadTile& t, int row0, int row1) {
  for (int r = row0; r < row1; ++r) {
    const float* x = t.logits + static_cast<ptrdiff_t>(r) * t.ld;
    Elem* out = static_cast<Elem*>(t.probabilities) + static_cast<ptrdiff_t>(r) * t.ld;
    const float weight = t.weights[r];
    const Vec share = set1(weight / t.sum[r]), top = set1(t.top[r]);
    each_vec(t.width, [&](int i, auto tail) {
      const Slope l = logit(t, load(x + i, tail));
      store_elem(out + i, mul(mul(exp(sub(l.value, top)), share), l.slope), tail);
    });
    const int target = t.targets[r] - t.column0;
    if (target < 0 || target >= t.width) continue;
    const Slope l = logit(t, set1(x[target]));
    float lanes16[16];
    store(lanes16, mul(sub(mul(exp(sub(l.value, top)), share), set1(weight)), l.slope));
    out[target] = to_elem(lanes16[0]);
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
