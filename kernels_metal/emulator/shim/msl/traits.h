#pragma once
namespace metal {
template <class T, T v> struct integral_constant {
  static constexpr __constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> static constexpr __constant bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class T> struct remove_cv { typedef __remove_cv(T) type; };
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_const { typedef __remove_const(T) type; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> struct remove_volatile { typedef __remove_volatile(T) type; };
template <class T> struct remove_reference { typedef __remove_reference_t(T) type; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct remove_addrspace { typedef T type; };
template <class T> struct remove_addrspace<__global T> { typedef T type; };
template <class T> struct remove_addrspace<__local T> { typedef T type; };
template <class T> struct remove_addrspace<__constant T> { typedef T type; };
template <class T> struct remove_addrspace<__private T> { typedef T type; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct remove_pointer { typedef T type; };
template <class T> struct remove_pointer<T *> { typedef T type; };

// half is no C++ floating-point type, and bfloat neither.
template <class T>
static constexpr __constant bool is_floating_point_v =
    __is_floating_point(T) || is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>;
template <class T> static constexpr __constant bool is_integral_v = __is_integral(T);
template <class T>
static constexpr __constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
static constexpr __constant bool is_signed_v = __is_signed(T) || is_floating_point_v<T>;
template <class T> static constexpr __constant bool is_unsigned_v = __is_unsigned(T);
template <class T> static constexpr __constant bool is_void_v = __is_void(T);
template <class A, class B> static constexpr __constant bool is_convertible_v =
    __is_convertible(A, B);
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class A, class B> struct is_convertible : bool_constant<is_convertible_v<A, B>> {};
template <class T> T declval();

template <class T> struct msl_vector { typedef T element; static constexpr __constant int size = 1; };
template <class E, int N> struct msl_vector<E __attribute__((ext_vector_type(N)))> {
  typedef E element;
  static constexpr __constant int size = N;
};
template <class T> using msl_element = typename msl_vector<T>::element;
template <class T> static constexpr __constant int msl_size = msl_vector<T>::size;
template <class T> static constexpr __constant bool msl_is_vector = (msl_vector<T>::size > 1);
template <class T> struct make_scalar { typedef msl_element<T> type; };
template <class T> using make_scalar_t = typename make_scalar<T>::type;
template <class T> struct is_vector : bool_constant<msl_is_vector<T>> {};
template <class T> static constexpr __constant bool is_vector_v = msl_is_vector<T>;
template <class T> struct is_scalar : is_arithmetic<T> {};
template <class T> static constexpr __constant bool is_scalar_v = is_arithmetic_v<T>;

template <class T, class U> MSL_FN constexpr T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: the sizes differ");
  return __builtin_bit_cast(T, u);
}
} // namespace metal
using metal::as_type;
