// Elementary functions on 16 lanes, by polynomials: the same bits on every instruction set.
#pragma once

#include <cstdint>

namespace localllm::LOCALLLM_ISA {
namespace {

struct Full {};  // tag: all 16 lanes

template <int N>
struct Count {  // a number known at compile time, passed as an argument
  static constexpr int value = N;
};

inline float* align64(void* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63});
}

inline Vec load(const float* p, Full) { return load(p); }
inline Vec load(const float* p, int n) {
  float lanes16[16] = {};
  for (int i = 0; i < n; ++i) lanes16[i] = p[i];
  return load(lanes16);
}
inline void store(float* p, const Vec& a, Full) { store(p, a); }
inline void store(float* p, const Vec& a, int n) {
  float lanes16[16];
  store(lanes16, a);
  for (int i = 0; i < n; ++i) p[i] = lanes16[i];
}
inline Mask valid(Full) { return lanes(0, 16); }
inline Mask valid(int n) { return lanes(0, n); }

// f(i, Full) for whole vectors, f(i, count) for the rest.
template <class F>
inline void each_vec(int n, F f) {
  int i = 0;
  for (; i + 16 <= n; i += 16) f(i, Full{});
  if (i < n) f(i, n - i);
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLog2e = 1.44269504088896340736f;

// 2^t for t <= 127; 0 below -125; relative error 1e-7. NaN stays NaN.
inline Vec exp2(const Vec& t) {
  const Vec shifted = add(t, set1(kRound));
  const Vec f = sub(t, sub(shifted, set1(kRound)));
  Vec p = set1(0.000154035305f);
  p = fma(p, f, set1(0.00133335581552f));
  p = fma(p, f, set1(0.00961813423782587f));
  p = fma(p, f, set1(0.0555042065680027f));
  p = fma(p, f, set1(0.2402265071868896484375f));
  p = fma(p, f, set1(0.693147182464599609375f));
  p = fma(p, f, set1(1.0f));
  p = from_bits(add(bits(p), shift_left<23>(bits(shifted))));
  p = select(less(t, set1(-125.0f)), zero(), p);
  return select(is_nan(t), t, p);
}
inline float exp2(float t) {
  float lanes16[16];
  store(lanes16, exp2(set1(t)));
  return lanes16[0];
}

// e^x with x held inside [-86, 88]; Cody-Waite reduction, coefficients of Cephes' expf.
inline Vec exp(const Vec& x) {
  const Vec held = min(set1(88.0f), max(set1(-86.0f), x));  // NaN passes
  const Vec shifted = fma(held, set1(kLog2e), set1(kRound));
  const Vec n = sub(shifted, set1(kRound));
  Vec r = fma(n, set1(-0.693359375f), held);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  p = from_bits(add(bits(p), shift_left<23>(bits(shifted))));
  return select(is_nan(x), x, p);
}

// Coefficients of Cephes' tanhf.
inline Vec tanh(const Vec& x) {
  const Vec magnitude = max(x, sub(zero(), x));
  const Vec e = exp(add(magnitude, magnitude));
  const Vec large = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  const Vec signed_large = select(less(x, zero()), sub(zero(), large), large);
  const Vec z = mul(x, x);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec small = fma(mul(p, z), x, x);
  const Vec result = select(less(magnitude, set1(0.625f)), small, signed_large);
  return select(is_nan(x), x, result);
}

// Rational approximation on [-4, 4], as in Eigen; absolute error 1e-7.
inline Vec erf(const Vec& x) {
  const Vec held = min(set1(4.0f), max(set1(-4.0f), x));
  const Vec z = mul(held, held);
  Vec p = set1(-2.72614225801306e-10f);
  p = fma(p, z, set1(2.77068142495902e-08f));
  p = fma(p, z, set1(-2.10102402082508e-06f));
  p = fma(p, z, set1(-5.69250639462346e-05f));
  p = fma(p, z, set1(-7.34990630326855e-04f));
  p = fma(p, z, set1(-2.95459980854025e-03f));
  p = fma(p, z, set1(-1.60960333262415e-02f));
  Vec q = set1(-1.45660718464996e-05f);
  q = fma(q, z, set1(-2.13374055278905e-04f));
  q = fma(q, z, set1(-1.68282697438203e-03f));
  q = fma(q, z, set1(-7.37332916720468e-03f));
  q = fma(q, z, set1(-1.42647390514189e-02f));
  return div(mul(held, p), q);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
