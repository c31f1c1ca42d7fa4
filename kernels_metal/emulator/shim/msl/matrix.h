// simdgroup_matrix 8x8: two elements a lane, in the layout that runtime/simd.h documents.
#pragma once
namespace metal {
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup_matrix holds half, bfloat or float");
  typedef vec<T, 2> storage;
  storage e;
  simdgroup_matrix() thread = default;
  MSL_FN explicit simdgroup_matrix(T diagonal) thread {
    short r, c;
    coord(r, c);
    e = (storage)(T)0;
    if (r == c) e[0] = diagonal;
    if (r == c + 1) e[1] = diagonal;
  }
  MSL_FN thread storage &thread_elements() thread { return e; }
  MSL_FN const thread storage &thread_elements() const thread { return e; }
  MSL_FN static void coord(thread short &row, thread short &column) {
    uint l = MSL_LANE;
    row = (l >> 2 & 4) + (l >> 1 & 3);
    column = (l >> 2 & 2) * 2 + (l & 1) * 2;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

struct msl_tile { ulong address, row, transposed; };
MSL_FN void msl_same_in_all_lanes(ulong address, ulong row, bool transposed) {
  msl_tile mine = {address, row, transposed};
  msl_simd(msl_uniform, 7, &mine, &mine, sizeof(mine), 0);
}
#define MSL_TILE(SPACE)                                                                          \
  template <class T> MSL_FN void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &m,              \
      const SPACE T *source, ulong row = 8, ulong2 origin = (ulong2)0, bool transposed = false) { \
    const SPACE T *tile = source + origin.y * row + origin.x;                                     \
    msl_same_in_all_lanes((ulong)tile, row, transposed);                                          \
    short r, c;                                                                                   \
    m.coord(r, c);                                                                                \
    for (int i = 0; i < 2; i++) m.e[i] = transposed ? tile[(c + i) * row + r] : tile[r * row + c + i]; \
  }                                                                                               \
  template <class T> MSL_FN void simdgroup_store(thread const simdgroup_matrix<T, 8, 8> &m,       \
      SPACE T *target, ulong row = 8, ulong2 origin = (ulong2)0, bool transposed = false) {       \
    SPACE T *tile = target + origin.y * row + origin.x;                                           \
    msl_same_in_all_lanes((ulong)tile, row, transposed);                                          \
    short r, c;                                                                                   \
    m.coord(r, c);                                                                                \
    for (int i = 0; i < 2; i++) (transposed ? tile[(c + i) * row + r] : tile[r * row + c + i]) = m.e[i]; \
  }
MSL_TILE(device)
MSL_TILE(threadgroup)

struct msl_fragment { float a[2], b[2], c[2]; };
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &d,
    thread const simdgroup_matrix<A, 8, 8> &a, thread const simdgroup_matrix<B, 8, 8> &b,
    thread const simdgroup_matrix<C, 8, 8> &c) {
  msl_fragment mine = {{(float)a.e[0], (float)a.e[1]}, {(float)b.e[0], (float)b.e[1]},
                       {(float)c.e[0], (float)c.e[1]}};
  float sum[2];
  msl_simd(msl_matrix, 10, &mine, sum, sizeof(mine), 0);
  d.e[0] = (D)sum[0];
  d.e[1] = (D)sum[1];
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8> &d,
    thread const simdgroup_matrix<A, 8, 8> &a, thread const simdgroup_matrix<B, 8, 8> &b) {
  simdgroup_matrix<D, 8, 8> zero((D)0);
  simdgroup_multiply_accumulate(d, a, b, zero);
}
template <class T, int R = 8, int C = 8>
MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.e = (vec<T, 2>)value;
  return m;
}
} // namespace metal
