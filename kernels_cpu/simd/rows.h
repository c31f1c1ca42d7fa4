// What happens to one row outside the matmuls: norms, quantization, activations, RoPE, logits.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

void norm(const float* x, int n, const NormParams& p, float* out) {
  const float count = static_cast<float>(n);
  float mean = 0.0f;
  if (p.layer) {
    Vec sum = zero();
    each_vec(n, [&](int i, auto part) { sum = add(sum, load(x + i, part)); });
    mean = reduce_add(sum) / count;
  }
  const Vec center = set1(mean);
  Vec squares = zero();
  each_vec(n, [&](int i, auto part) {
    Vec d = load(x + i, part);
    if (p.layer) d = select(valid(part), sub(d, center), zero());
    squares = fma(d, d, squares);
  });
  const Vec inverse = set1(1.0f / sqrt1(reduce_add(squares) / count + p.eps));
  each_vec(n, [&](int i, auto part) {
    Vec d = load(x + i, part);
    if (p.layer) d = sub(d, center);
    const Vec scaled = mul(d, inverse), gain = load(p.gain + i, part);
    store(out + i, p.bias ? fma(scaled, gain, load(p.bias + i, part)) : mul(scaled, gain), part);
  });
}

inline void quantize_group(const Vec& a, const Vec& b, int8_t* q, GroupInfo* info) {
  const IVec no_sign = set1(int32_t{0x7fffffff});
  // Compared as integers, infinity and NaN are the largest magnitudes.
  const int32_t largest = reduce_max(max(bit_and(bits(a), no_sign), bit_and(bits(b), no_sign)));
  const Vec top = from_bits(set1(largest));
  float lanes16[16];
  store(lanes16, top);
  const float amax = lanes16[0];
  const bool finite = largest < 0x7f800000;
  const float inverse = finite && amax > 1e-30f ? 127.0f / amax : 0.0f;
  IVec qa = set1(int32_t{0}), qb = qa;
  if (inverse != 0.0f) {
    qa = to_int(mul(a, set1(inverse)));
    qb = to_int(mul(b, set1(inverse)));
  }
  store_int8(q, qa);
  store_int8(q + 16, qb);
  const float scale = finite ? amax / 127.0f : __builtin_nanf("");
  const int32_t first = reduce_add(qa), second = reduce_add(qb);
  info->scale = scale;
  info->sum_x = scale * static_cast<float>(first + second);
  info->half_sum_x[0] = scale * static_cast<float>(first);
  info->half_sum_x[1] = scale * static_cast<float>(second);
  info->sum_q = first + second;
  info->half_sum_q[0] = first;
  info->half_sum_q[1] = second;
  info->unused = 0;
}

void quantize(const float* x, int n, int8_t* q, GroupInfo* info) {
  int i = 0;
  for (; i + kGroup <= n; i += kGroup) quantize_group(load(x + i), load(x + i + 16), q + i, info++);
  if (i == n) return;
  float tail[kGroup] = {};
  for (int k = i; k < n; ++k) tail[k - i] = x[k];
  quantize_group(load(tail), load(tail + 16), q + i, info);
}

void add_scaled(const float* y, int n, float factor, float* x) {
  const Vec f = set1(factor);
  each_vec(n, [&](int i, auto part) {
    store(x + i, fma(load(y + i, part), f, load(x + i, part)), part);
  });
}

void scale(float* x, int n, float factor) {
  const Vec f = set1(factor);
  each_vec(n, [&](int i, auto part) { store(x + i, mul(load(x + i, part), f), part); });
}

template <Activation A>
inline Vec apply(const Vec& x) {
  const Vec one = set1(1.0f), half_x = mul(set1(0.5f), x);
  if constexpr (A == Activation::kSilu) {
    return div(x, add(one, exp(sub(zero(), x))));
  } else if constexpr (A == Activation::kSigmoid) {
    return div(one, add(one, exp(sub(zero(), x))));
  } else if constexpr (A == Activation::kGelu) {
    return mul(half_x, add(one, erf(mul(x, set1(0.70710678118654752f)))));
  } else if constexpr (A == Activation::kGeluTanh) {
    const Vec inner = mul(x, fma(mul(x, set1(0.044715f)), x, one));
    return mul(half_x, add(one, tanh(mul(inner, set1(0.79788456080286536f)))));
  } else {
    return max(zero(), x);
  }
}

template <Activation A>
void activate_as(const float* gate, const float* up, int n, float* out) {
  each_vec(n, [&](int i, auto part) {
    const Vec a = apply<A>(load(gate + i, part));
    store(out + i, up ? mul(a, load(up + i, part)) : a, part);
  });
}

// g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up within [-7, 7].
void clamped_swiglu(const float* gate, const float* up, int n, float* out) {
  const Vec one = set1(1.0f), limit = set1(7.0f), low = set1(-7.0f), slope = set1(-1.702f);
  each_vec(n, [&](int i, auto part) {
    const Vec g = min(load(gate + i, part), limit);
    const Vec u = max(min(load(up + i, part), limit), low);
    store(out + i, mul(div(g, add(one, exp(mul(g, slope)))), add(u, one)), part);
  });
}

void activate(Activation kind, const float* gate, const float* up, int n, float* out) {
  switch (kind) {
    case Activation::kClampedSwiglu: return clamped_swiglu(gate, up, n, out);
    case Activation::kSilu: return activate_as<Activation::kSilu>(gate, up, n, out);
    case Activation::kGelu: return activate_as<Activation::kGelu>(gate, up, n, out);
    case Activation::kGeluTanh: return activate_as<Activation::kGeluTanh>(gate, up, n, out);
    case Activation::kRelu: return activate_as<Activation::kRelu>(gate, up, n, out);
    case Activation::kSigmoid: return activate_as<Activation::kSigmoid>(gate, up, n, out);
  }
}

void rope(const float* cos, const float* sin, int half, float* x) {
  each_vec(half, [&](int i, auto part) {
    const Vec a = load(x + i, part), b = load(x + half + i, part);
    const Vec c = load(cos + i, part), s = load(sin + i, part);
    const Vec rotated_a = sub(mul(a, c), mul(b, s));
    const Vec rotated_b = add(mul(b, c), mul(a, s));
    store(x + i, rotated_a, part);
    store(x + half + i, rotated_b, part);
  });
}

void softmax(float* x, int n) {
  Vec top = set1(-3.0e38f);
  each_vec(n, [&](int i, auto part) {
    top = max(top, select(valid(part), load(x + i, part), set1(-3.0e38f)));
  });
  const Vec highest = set1(reduce_max(top));
  Vec sum = zero();
  each_vec(n, [&](int i, auto part) {
    const Vec e = select(valid(part), exp(sub(load(x + i, part), highest)), zero());
    store(x + i, e, part);
    sum = add(sum, e);
  });
  const Vec total = set1(reduce_add(sum));
  each_vec(n, [&](int i, auto part) { store(x + i, div(load(x + i, part), total), part); });
}

void finish_logits(float* x, int n, float factor, float softcap) {
  const Vec f = set1(factor), nan = from_bits(set1(int32_t{0x7fc00000}));
  const Vec cap = set1(softcap), inverse = set1(softcap > 0.0f ? 1.0f / softcap : 0.0f);
  each_vec(n, [&](int i, auto part) {
    Vec y = load(x + i, part);
    if (factor != 1.0f) y = mul(y, f);
    if (softcap > 0.0f) y = mul(cap, tanh(mul(y, inverse)));
    store(x + i, select(is_nan(y), nan, y), part);
  });
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
