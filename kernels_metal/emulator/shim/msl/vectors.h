// Vectors of 2, 3 and 4, and their packed kin.
#pragma once
namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
#define MSL_VECTORS(T, P)                                                                        \
  typedef T P##2 __attribute__((ext_vector_type(2)));                                             \
  typedef T P##3 __attribute__((ext_vector_type(3)));                                             \
  typedef T P##4 __attribute__((ext_vector_type(4)));
#define MSL_EACH_VECTOR_TYPE(X)                                                                  \
  X(char, char) X(uchar, uchar) X(short, short) X(ushort, ushort) X(int, int) X(uint, uint)       \
  X(long, long) X(ulong, ulong) X(half, half) X(float, float) X(__bf16, bfloat)
MSL_EACH_VECTOR_TYPE(MSL_VECTORS)

// packed_T3 has the size of three; packed_T2 and packed_T4 differ from T2 and T4 in alignment.
template <class T> struct msl_packed3 {
  T x, y, z;
  typedef vec<T, 3> wide;
  msl_packed3() = default;
  MSL_FN msl_packed3(wide v) : x(v[0]), y(v[1]), z(v[2]) {}
  MSL_FN msl_packed3(T a, T b, T c) : x(a), y(b), z(c) {}
#define MSL_PACKED_IN(SPACE)                                                                     \
  MSL_FN operator wide() const SPACE { return (wide){x, y, z}; }                                  \
  MSL_FN T operator[](int i) const SPACE { return i == 0 ? x : i == 1 ? y : z; }
  MSL_PACKED_IN(device) MSL_PACKED_IN(threadgroup) MSL_PACKED_IN(constant) MSL_PACKED_IN(thread)
#define MSL_PACKED_FROM(SPACE)                                                                   \
  MSL_FN SPACE msl_packed3 &operator=(wide v) SPACE { x = v[0]; y = v[1]; z = v[2]; return *this; } \
  MSL_PACKED_COPY(SPACE, device) MSL_PACKED_COPY(SPACE, threadgroup)                              \
  MSL_PACKED_COPY(SPACE, constant) MSL_PACKED_COPY(SPACE, thread)
#define MSL_PACKED_COPY(SPACE, FROM)                                                             \
  MSL_FN SPACE msl_packed3 &operator=(const FROM msl_packed3 &v) SPACE {                          \
    x = v.x; y = v.y; z = v.z; return *this;                                                      \
  }
  MSL_PACKED_FROM(device) MSL_PACKED_FROM(threadgroup) MSL_PACKED_FROM(thread)
};
#define MSL_PACKED(T, P)                                                                         \
  typedef T packed_##P##2 __attribute__((ext_vector_type(2), aligned(sizeof(T))));                \
  typedef T packed_##P##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));                \
  typedef msl_packed3<T> packed_##P##3;
MSL_EACH_VECTOR_TYPE(MSL_PACKED)

// MSL has all of these in the global namespace too.
#define MSL_GLOBAL(T, P)                                                                         \
  } using metal::P##2; using metal::P##3; using metal::P##4; using metal::packed_##P##2;          \
  using metal::packed_##P##3; using metal::packed_##P##4; namespace metal {
MSL_EACH_VECTOR_TYPE(MSL_GLOBAL)

// float4(a, b) is a function-like macro (constructors.h) that calls this.
template <class V, class A> MSL_FN constexpr void msl_put(thread V &v, thread int &i, A a) {
  if constexpr (msl_is_vector<A>) {
    for (int j = 0; j < msl_size<A>; j++) v[i++] = (msl_element<V>)a[j];
  } else {
    v[i++] = (msl_element<V>)a;
  }
}
template <class V, class... A> MSL_FN constexpr V msl_make(A... a) {
  constexpr int given = (0 + ... + msl_size<A>);
  static_assert(sizeof...(A) == 0 || (sizeof...(A) == 1 && given == 1) || given == msl_size<V>,
                "vector constructor: wrong number of components");
  V v = (V)(msl_element<V>)0;
  if constexpr (sizeof...(A) == 1 && given == 1) {
    msl_element<V> e[1] = {(msl_element<V>)a...};
    v = (V)e[0];
  } else {
    int i = 0;
    (msl_put(v, i, a), ...);
  }
  return v;
}
} // namespace metal
using metal::msl_make;
