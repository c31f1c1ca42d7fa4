// Fibers give way only where they meet, so a plain read and write is atomic; the runtime is told.
#pragma once
extern "C" {
void msl_atomic(ulong address, uint bytes, uint load, uint store);
}
// OpenCL has types of these names, without a header.
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_bool msl_atomic_bool
#define atomic_float msl_atomic_float
#define atomic_ulong msl_atomic_ulong
namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, bool> ||
                    is_same_v<T, float> || is_same_v<T, ulong>,
                "atomic holds int, uint, bool, float or ulong");
  T v;
};
typedef atomic<int> msl_atomic_int;
typedef atomic<uint> msl_atomic_uint;
typedef atomic<bool> msl_atomic_bool;
typedef atomic<float> msl_atomic_float;
typedef atomic<ulong> msl_atomic_ulong;

struct msl_add_to { template <class T> static T of(T a, T b) { return a + b; } };
struct msl_subtract { template <class T> static T of(T a, T b) { return a - b; } };
struct msl_or_with { template <class T> static T of(T a, T b) { return a | b; } };
struct msl_and_with { template <class T> static T of(T a, T b) { return a & b; } };
struct msl_xor_with { template <class T> static T of(T a, T b) { return a ^ b; } };
struct msl_larger { template <class T> static T of(T a, T b) { return a < b ? b : a; } };
struct msl_smaller { template <class T> static T of(T a, T b) { return b < a ? b : a; } };
struct msl_second { template <class T> static T of(T, T b) { return b; } };

#define MSL_FETCH(SPACE, NAME, HOW, ALLOWED, WHY)                                                \
  template <class T> MSL_FN T atomic_##NAME##_explicit(volatile SPACE atomic<T> *a,               \
      typename msl_same<T>::type x, memory_order) {                                               \
    static_assert(ALLOWED, WHY);                                                                  \
    msl_atomic((ulong)a, sizeof(T), 1, 1);                                                        \
    return msl_update<HOW>(a, (T)x);                                                              \
  }
template <class T> struct msl_same { typedef T type; };
#define MSL_ATOMICS(SPACE, FLOATS)                                                               \
  template <class How, class T> MSL_UNSEEN T msl_update(volatile SPACE atomic<T> *a, T x) {       \
    T old = a->v;                                                                                 \
    a->v = How::of(old, x);                                                                       \
    return old;                                                                                   \
  }                                                                                               \
  template <class T> MSL_UNSEEN T msl_get(const volatile SPACE atomic<T> *a) { return a->v; }     \
  template <class T> MSL_UNSEEN void msl_set(volatile SPACE atomic<T> *a, T x) { a->v = x; }      \
  template <class T> MSL_FN T atomic_load_explicit(const volatile SPACE atomic<T> *a, memory_order) { \
    static_assert(FLOATS || !is_same_v<T, float>, "atomic<float> lives in device memory only");   \
    msl_atomic((ulong)a, sizeof(T), 1, 0);                                                        \
    return msl_get(a);                                                                            \
  }                                                                                               \
  template <class T> MSL_FN void atomic_store_explicit(volatile SPACE atomic<T> *a,               \
      typename msl_same<T>::type x, memory_order) {                                               \
    static_assert(FLOATS || !is_same_v<T, float>, "atomic<float> lives in device memory only");   \
    msl_atomic((ulong)a, sizeof(T), 0, 1);                                                        \
    msl_set(a, (T)x);                                                                             \
  }                                                                                               \
  template <class T> MSL_FN bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T> *a, \
      thread T *expected, typename msl_same<T>::type x, memory_order, memory_order) {             \
    static_assert(FLOATS || !is_same_v<T, float>, "atomic<float> lives in device memory only");   \
    msl_atomic((ulong)a, sizeof(T), 1, 1);                                                        \
    T old = msl_get(a);                                                                           \
    if (old == *expected) { msl_set(a, (T)x); return true; }                                      \
    *expected = old;                                                                              \
    return false;                                                                                 \
  }                                                                                               \
  MSL_FETCH(SPACE, exchange, msl_second, FLOATS || !(is_same_v<T, float>), "atomic<float> lives in device memory only") \
  MSL_FETCH(SPACE, fetch_add, msl_add_to, !(is_same_v<T, float>) || FLOATS, "atomic<float> lives in device memory only") \
  MSL_FETCH(SPACE, fetch_sub, msl_subtract, !(is_same_v<T, float>) || FLOATS, "atomic<float> lives in device memory only") \
  MSL_FETCH(SPACE, fetch_or, msl_or_with, !(is_same_v<T, float>), "atomic<float> has no or") \
  MSL_FETCH(SPACE, fetch_and, msl_and_with, !(is_same_v<T, float>), "atomic<float> has no and") \
  MSL_FETCH(SPACE, fetch_xor, msl_xor_with, !(is_same_v<T, float>), "atomic<float> has no xor") \
  MSL_FETCH(SPACE, fetch_max, msl_larger, !(is_same_v<T, float>), "atomic<float> has no max") \
  MSL_FETCH(SPACE, fetch_min, msl_smaller, !(is_same_v<T, float>), "atomic<float> has no min")
MSL_ATOMICS(device, true)
MSL_ATOMICS(threadgroup, false)
} // namespace metal
