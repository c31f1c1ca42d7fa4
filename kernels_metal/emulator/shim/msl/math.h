// Overloads for scalars, so that an ambiguous call is one here too; templates for vectors.
// Everything is computed in float and rounded once; fast:: and precise:: are the same.
#pragma once
namespace metal {
#define MSL_OVER_VECTOR(NAME)                                                                    \
  template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V NAME(V v) {                  \
    V r;                                                                                          \
    for (int i = 0; i < msl_size<V>; i++) r[i] = NAME((msl_element<V>)v[i]);                      \
    return r;                                                                                     \
  }
#define MSL_MATH1(NAME, EXPR)                                                                    \
  MSL_FN float NAME(float x) { return EXPR; }                                                     \
  MSL_FN half NAME(half xh) { float x = (float)xh; return (half)(EXPR); }                         \
  MSL_OVER_VECTOR(NAME)
MSL_MATH1(exp, __builtin_expf(x))
MSL_MATH1(exp2, __builtin_exp2f(x))
MSL_MATH1(exp10, __builtin_powf(10.0f, x))
MSL_MATH1(log, __builtin_logf(x))
MSL_MATH1(log2, __builtin_log2f(x))
MSL_MATH1(log10, __builtin_log10f(x))
MSL_MATH1(sin, __builtin_sinf(x))
MSL_MATH1(cos, __builtin_cosf(x))
MSL_MATH1(tan, __builtin_tanf(x))
MSL_MATH1(asin, __builtin_asinf(x))
MSL_MATH1(acos, __builtin_acosf(x))
MSL_MATH1(atan, __builtin_atanf(x))
MSL_MATH1(sinh, __builtin_sinhf(x))
MSL_MATH1(cosh, __builtin_coshf(x))
MSL_MATH1(tanh, __builtin_tanhf(x))
MSL_MATH1(asinh, __builtin_asinhf(x))
MSL_MATH1(acosh, __builtin_acoshf(x))
MSL_MATH1(atanh, __builtin_atanhf(x))
MSL_MATH1(sinpi, __builtin_sinf(x * M_PI_F))
MSL_MATH1(cospi, __builtin_cosf(x * M_PI_F))
MSL_MATH1(tanpi, __builtin_tanf(x * M_PI_F))
MSL_MATH1(sqrt, __builtin_sqrtf(x))
MSL_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_MATH1(fabs, __builtin_fabsf(x))
MSL_MATH1(floor, __builtin_floorf(x))
MSL_MATH1(ceil, __builtin_ceilf(x))
MSL_MATH1(trunc, __builtin_truncf(x))
MSL_MATH1(rint, __builtin_rintf(x))
MSL_MATH1(round, __builtin_roundf(x))
MSL_MATH1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
MSL_MATH1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f)
MSL_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))

#define MSL_OVER_VECTORS(NAME)                                                                   \
  template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V NAME(V a, V b) {             \
    V r;                                                                                          \
    for (int i = 0; i < msl_size<V>; i++)                                                         \
      r[i] = NAME((msl_element<V>)a[i], (msl_element<V>)b[i]);                                    \
    return r;                                                                                     \
  }                                                                                               \
  template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V NAME(V a, msl_element<V> b) { \
    return NAME(a, (V)b);                                                                         \
  }
#define MSL_MATH2(NAME, EXPR)                                                                    \
  MSL_FN float NAME(float x, float y) { return EXPR; }                                            \
  MSL_FN half NAME(half xh, half yh) { float x = (float)xh, y = (float)yh; return (half)(EXPR); } \
  MSL_OVER_VECTORS(NAME)
MSL_MATH2(pow, __builtin_powf(x, y))
MSL_MATH2(powr, __builtin_powf(x, y))
MSL_MATH2(fmod, __builtin_fmodf(x, y))
MSL_MATH2(atan2, __builtin_atan2f(x, y))
MSL_MATH2(fmax, __builtin_fmaxf(x, y))
MSL_MATH2(fmin, __builtin_fminf(x, y))
MSL_MATH2(fdim, __builtin_fdimf(x, y))
MSL_MATH2(copysign, __builtin_copysignf(x, y))
MSL_MATH2(divide, x / y)

#define MSL_ORDER(T)                                                                             \
  MSL_FN constexpr T max(T a, T b) { return a < b ? b : a; }                                      \
  MSL_FN constexpr T min(T a, T b) { return b < a ? b : a; }
MSL_ORDER(char) MSL_ORDER(signed char) MSL_ORDER(uchar) MSL_ORDER(short) MSL_ORDER(ushort)
MSL_ORDER(int) MSL_ORDER(uint) MSL_ORDER(long) MSL_ORDER(ulong)
#define MSL_ORDER_FLOAT(T)                                                                       \
  MSL_FN T max(T a, T b) { return (T)__builtin_fmaxf((float)a, (float)b); }                       \
  MSL_FN T min(T a, T b) { return (T)__builtin_fminf((float)a, (float)b); }
MSL_ORDER_FLOAT(float) MSL_ORDER_FLOAT(half)
MSL_OVER_VECTORS(max)
MSL_OVER_VECTORS(min)
#define MSL_THREE(T)                                                                             \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }                           \
  MSL_FN T max3(T a, T b, T c) { return max(a, max(b, c)); }                                      \
  MSL_FN T min3(T a, T b, T c) { return min(a, min(b, c)); }                                      \
  MSL_FN T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }
MSL_THREE(char) MSL_THREE(uchar) MSL_THREE(short) MSL_THREE(ushort) MSL_THREE(int) MSL_THREE(uint)
MSL_THREE(long) MSL_THREE(ulong) MSL_THREE(float) MSL_THREE(half)
template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V clamp(V x, V low, V high) {
  return min(max(x, low), high);
}
template <class V, class = enable_if_t<msl_is_vector<V>>>
MSL_FN V clamp(V x, msl_element<V> low, msl_element<V> high) {
  return min(max(x, (V)low), (V)high);
}

MSL_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_FN half fma(half a, half b, half c) { // a * b + c is exact in double; one rounding is left
  return (half)__builtin_fma((double)(float)a, (double)(float)b, (double)(float)c);
}
template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V fma(V a, V b, V c) {
  V r;
  for (int i = 0; i < msl_size<V>; i++)
    r[i] = fma((msl_element<V>)a[i], (msl_element<V>)b[i], (msl_element<V>)c[i]);
  return r;
}
MSL_FN float mix(float a, float b, float t) { return a + (b - a) * t; }
MSL_FN half mix(half a, half b, half t) { return a + (b - a) * t; }
template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V mix(V a, V b, V t) { return a + (b - a) * t; }
template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN V mix(V a, V b, msl_element<V> t) { return a + (b - a) * t; }
MSL_FN float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
MSL_FN half step(half edge, half x) { return x < edge ? (half)0.0f : (half)1.0f; }
MSL_FN float smoothstep(float low, float high, float x) {
  float t = saturate((x - low) / (high - low));
  return t * t * (3.0f - 2.0f * t);
}
MSL_FN float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
MSL_FN half ldexp(half x, int k) { return (half)__builtin_ldexpf((float)x, k); }
MSL_FN int ilogb(float x) { return __builtin_ilogbf(x); }
MSL_FN float frexp(float x, thread int &exponent) {
  int k;
  float r = __builtin_frexpf(x, &k);
  exponent = k;
  return r;
}
MSL_FN float modf(float x, thread float &whole) {
  whole = __builtin_truncf(x);
  return x - whole;
}
MSL_FN float sincos(float x, thread float &cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}
MSL_FN float nextafter(float a, float b) { return __builtin_nextafterf(a, b); }

MSL_FN float abs(float x) { return __builtin_fabsf(x); }
MSL_FN half abs(half x) { return (half)__builtin_fabsf((float)x); }
#define MSL_ABS(T) MSL_FN T abs(T x) { return x < 0 ? (T)-x : x; }
MSL_ABS(char) MSL_ABS(short) MSL_ABS(int) MSL_ABS(long)
MSL_OVER_VECTOR(abs)

#define MSL_CLASS(T)                                                                             \
  MSL_FN bool isnan(T x) { return x != x; }                                                       \
  MSL_FN bool isinf(T x) { return __builtin_fabsf((float)x) == __builtin_inff(); }                \
  MSL_FN bool isfinite(T x) { return __builtin_fabsf((float)x) < __builtin_inff(); }              \
  MSL_FN bool isnormal(T x) {                                                                     \
    return isfinite(x) && __builtin_fabsf((float)x) >= (float)numeric_limits<T>::min();           \
  }                                                                                               \
  MSL_FN bool signbit(T x) { return as_type<uint>((float)x) >> 31; }
MSL_CLASS(float) MSL_CLASS(half)

template <class T> MSL_FN T select(T no, T yes, bool c) { return c ? yes : no; }
template <class V, class M, class = enable_if_t<msl_is_vector<V> && msl_is_vector<M>>>
MSL_FN V select(V no, V yes, M c) { // comparisons of vectors give 0 and -1 here
  V r;
  for (int i = 0; i < msl_size<V>; i++) r[i] = c[i] ? yes[i] : no[i];
  return r;
}
template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN bool any(V v) {
  bool r = false;
  for (int i = 0; i < msl_size<V>; i++) r = r || v[i] != 0;
  return r;
}
template <class V, class = enable_if_t<msl_is_vector<V>>> MSL_FN bool all(V v) {
  bool r = true;
  for (int i = 0; i < msl_size<V>; i++) r = r && v[i] != 0;
  return r;
}
MSL_FN bool any(bool x) { return x; }
MSL_FN bool all(bool x) { return x; }

template <class V> MSL_FN msl_element<V> dot(V a, V b) {
  msl_element<V> s = 0;
  for (int i = 0; i < msl_size<V>; i++) s += a[i] * b[i];
  return s;
}
template <class V> MSL_FN msl_element<V> length_squared(V v) { return dot(v, v); }
template <class V> MSL_FN msl_element<V> length(V v) { return sqrt(dot(v, v)); }
template <class V> MSL_FN msl_element<V> distance(V a, V b) { return length(a - b); }
template <class V> MSL_FN V normalize(V v) { return v * rsqrt(dot(v, v)); }
template <class V> MSL_FN V cross(V a, V b) {
  return (V){a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}

#define MSL_ALIASES                                                                              \
  using metal::exp; using metal::exp2; using metal::exp10; using metal::log; using metal::log2;   \
  using metal::log10; using metal::sin; using metal::cos; using metal::tan; using metal::asin;    \
  using metal::acos; using metal::atan; using metal::sinh; using metal::cosh; using metal::tanh;  \
  using metal::asinh; using metal::acosh; using metal::atanh; using metal::sinpi;                 \
  using metal::cospi; using metal::tanpi; using metal::sqrt; using metal::rsqrt;                  \
  using metal::fabs; using metal::abs; using metal::floor; using metal::ceil; using metal::trunc; \
  using metal::rint; using metal::round; using metal::fract; using metal::sign;                   \
  using metal::saturate; using metal::pow; using metal::powr; using metal::fmod;                  \
  using metal::atan2; using metal::fmax; using metal::fmin; using metal::fdim;                    \
  using metal::copysign; using metal::divide; using metal::max; using metal::min;                 \
  using metal::clamp; using metal::max3; using metal::min3; using metal::fma; using metal::mix;   \
  using metal::ldexp; using metal::sincos; using metal::length; using metal::normalize;           \
  using metal::dot; using metal::distance;
namespace fast { MSL_ALIASES }
namespace precise { MSL_ALIASES }
} // namespace metal
