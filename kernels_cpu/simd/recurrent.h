// What recurrent token mixers do with a row and a head's state. Every lane is an entry of its own,
// summed in one order, so neither blocks of lanes nor chunks of rows show in a result.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"
#include "simd/rows.h"

namespace localllm::LOCALLLM_ISA {
namespace {

inline Vec sigmoid(const Vec& x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// log(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)) with u = e^-|x|; relative error 1e-7.
inline Vec softplus(const Vec& x) {
  const Vec u = exp(min(x, sub(zero(), x)));
  const Vec s = div(u, add(u, set1(2.0f))), z = mul(s, s);  // s up to 1/3
  Vec p = set1(1.0f / 15.0f);
  p = fma(p, z, set1(1.0f / 13.0f));
  p = fma(p, z, set1(1.0f / 11.0f));
  p = fma(p, z, set1(1.0f / 9.0f));
  p = fma(p, z, set1(1.0f / 7.0f));
  p = fma(p, z, set1(1.0f / 5.0f));
  p = fma(p, z, set1(1.0f / 3.0f));
  p = fma(p, z, set1(1.0f));
  return fma(add(s, s), p, max(x, zero()));
}

void gate(const float* g, int n, float* x) {
  each_vec(n, [&](int i, auto part) {
    store(x + i, mul(load(x + i, part), sigmoid(load(g + i, part))), part);
  });
}

void product(const float* a, const float* b, int n, float* out) {
  each_vec(n, [&](int i, auto part) {
    store(out + i, mul(load(a + i, part), load(b + i, part)), part);
  });
}

void convolve(const float* const* inputs, const float* taps, int kernel, const float* bias, int n,
              bool silu, float* out) {
  each_vec(n, [&](int i, auto part) {
    Vec sum = mul(load(inputs[0] + i, part), load(taps + i, part));
    for (int k = 1; k < kernel; ++k)
      sum =
          fma(load(inputs[k] + i, part), load(taps + static_cast<ptrdiff_t>(k) * n + i, part), sum);
    if (bias) sum = add(sum, load(bias + i, part));
    store(out + i, silu ? mul(sum, sigmoid(sum)) : sum, part);
  });
}

void unit(float* x, int n, float factor) {
  Vec squares = zero();
  each_vec(n, [&](int i, auto part) {
    const Vec a = load(x + i, part);
    squares = fma(a, a, squares);
  });
  scale(x, n, factor / sqrt1(reduce_add(squares) + 1e-6f));
}

void delta_gates(const float* rate, const float* step, int heads, float* beta, float* decay) {
  each_vec(heads, [&](int h, auto part) {
    store(beta + h, sigmoid(load(beta + h, part)), part);
    const Vec slowed = softplus(add(load(decay + h, part), load(step + h, part)));
    store(decay + h, exp(mul(load(rate + h, part), slowed)), part);
  });
}

// Entries [16 * COUNT] of a head's values, or `part` of 16.
template <int COUNT, class Part>
inline void delta_columns(const DeltaRow& row, int keys, int stride, const float* from, float* to,
                          const float* v, float* out, Part part) {
  const Vec decay = set1(row.decay), beta = set1(row.beta);
  Vec sum[COUNT];
  for (int c = 0; c < COUNT; ++c) sum[c] = zero();
  for (int i = 0; i < keys; ++i) {
    const Vec k = set1(row.k[i]);
    const float* s = from + static_cast<ptrdiff_t>(i) * stride;
#pragma GCC unroll 2
    for (int c = 0; c < COUNT; ++c) sum[c] = fma(load(s + 16 * c, part), k, sum[c]);
  }
  Vec change[COUNT];
  for (int c = 0; c < COUNT; ++c) {
    const Vec known = mul(sum[c], decay);
    change[c] = mul(beta, sub(load(v + 16 * c, part), known));
    sum[c] = zero();
  }
  for (int i = 0; i < keys; ++i) {
    const Vec k = set1(row.k[i]), q = set1(row.q[i]);
    const ptrdiff_t at = static_cast<ptrdiff_t>(i) * stride;
#pragma GCC unroll 2
    for (int c = 0; c < COUNT; ++c) {
      const Vec s = fma(k, change[c], mul(load(from + at + 16 * c, part), decay));
      store(to + at + 16 * c, s, part);
      sum[c] = fma(s, q, sum[c]);
    }
  }
  for (int c = 0; c < COUNT; ++c) store(out + 16 * c, sum[c], part);
}

void delta_rule(const DeltaRow& row, int keys, int values, const float* from, float* to) {
  int j = 0;
  for (; j + 32 <= values; j += 32)
    delta_columns<2>(row, keys, values, from + j, to + j, row.v + j, row.out + j, Full{});
  for (; j + 16 <= values; j += 16)
    delta_columns<1>(row, keys, values, from + j, to + j, row.v + j, row.out + j, Full{});
  if (j < values)
    delta_columns<1>(row, keys, values, from + j, to + j, row.v + j, row.out + j, values - j);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
