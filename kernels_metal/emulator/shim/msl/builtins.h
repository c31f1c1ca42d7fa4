// What MLX's bf16_math.h calls of Apple's compiler.
#pragma once
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define MSL_BUILTIN1(N)                                                                          \
  template <class M> MSL_FN float __metal_##N(float x, M) { return metal::N(x); }
MSL_BUILTIN1(fabs) MSL_BUILTIN1(acos) MSL_BUILTIN1(acosh) MSL_BUILTIN1(asin) MSL_BUILTIN1(asinh)
MSL_BUILTIN1(atan) MSL_BUILTIN1(atanh) MSL_BUILTIN1(ceil) MSL_BUILTIN1(cos) MSL_BUILTIN1(cosh)
MSL_BUILTIN1(cospi) MSL_BUILTIN1(exp) MSL_BUILTIN1(exp10) MSL_BUILTIN1(exp2) MSL_BUILTIN1(floor)
MSL_BUILTIN1(fract) MSL_BUILTIN1(log) MSL_BUILTIN1(log10) MSL_BUILTIN1(log2) MSL_BUILTIN1(rint)
MSL_BUILTIN1(round) MSL_BUILTIN1(rsqrt) MSL_BUILTIN1(sin) MSL_BUILTIN1(sinh) MSL_BUILTIN1(sinpi)
MSL_BUILTIN1(sqrt) MSL_BUILTIN1(tan) MSL_BUILTIN1(tanh) MSL_BUILTIN1(tanpi) MSL_BUILTIN1(trunc)
#define MSL_BUILTIN2(N)                                                                          \
  template <class M> MSL_FN float __metal_##N(float x, float y, M) { return metal::N(x, y); }
MSL_BUILTIN2(atan2) MSL_BUILTIN2(divide) MSL_BUILTIN2(fmax) MSL_BUILTIN2(fmin) MSL_BUILTIN2(fmod)
MSL_BUILTIN2(pow) MSL_BUILTIN2(powr)
template <class M> MSL_FN float __metal_fmax3(float a, float b, float c, M) { return metal::max3(a, b, c); }
template <class M> MSL_FN float __metal_fmin3(float a, float b, float c, M) { return metal::min3(a, b, c); }
template <class M> MSL_FN float __metal_fmedian3(float a, float b, float c, M) { return metal::median3(a, b, c); }
MSL_FN float __metal_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class M> MSL_FN float __metal_ldexp(float x, int k, M) { return __builtin_ldexpf(x, k); }
MSL_FN float __metal_frexp(float x, thread int *e) { int k; float r = __builtin_frexpf(x, &k); *e = k; return r; }
MSL_FN float __metal_nextafter(float a, float b) { return __builtin_nextafterf(a, b); }
MSL_FN ushort __metal_get_simdgroup_size(ushort) { return 32; }
MSL_FN ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)MSL_LANE; }
#define MSL_LANES1(N) template <class T> MSL_FN T __metal_##N(T x) { return metal::N<T>(x); }
MSL_LANES1(simd_sum) MSL_LANES1(simd_product) MSL_LANES1(simd_max) MSL_LANES1(simd_min)
MSL_LANES1(simd_prefix_inclusive_sum) MSL_LANES1(simd_prefix_exclusive_sum)
MSL_LANES1(simd_prefix_inclusive_product) MSL_LANES1(simd_prefix_exclusive_product)
template <class T> MSL_FN T __metal_simd_xor(T x) { // bf16_math.h has it for bfloat, as float
  msl_fault(22, 0);
  return x;
}
#define MSL_LANES2(N)                                                                            \
  template <class T> MSL_FN T __metal_##N(T x, ushort k) { return metal::N<T>(x, k); }
MSL_LANES2(simd_shuffle) MSL_LANES2(simd_shuffle_xor) MSL_LANES2(simd_shuffle_up)
MSL_LANES2(simd_shuffle_down) MSL_LANES2(simd_broadcast) MSL_LANES2(simd_shuffle_rotate_up)
MSL_LANES2(simd_shuffle_rotate_down)
template <class T> MSL_FN T __metal_simd_shuffle_and_fill_down(T x, T f, ushort k, ushort) {
  return metal::simd_shuffle_and_fill_down<T>(x, f, k);
}
template <class T> MSL_FN T __metal_simd_shuffle_and_fill_up(T x, T f, ushort k, ushort) {
  return metal::simd_shuffle_and_fill_up<T>(x, f, k);
}
