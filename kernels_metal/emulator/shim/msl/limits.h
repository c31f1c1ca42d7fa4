#pragma once
namespace metal {
template <class T> struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, LOW, HIGH)                                                         \
  template <> struct numeric_limits<T> {                                                         \
    static constexpr __constant bool is_signed = (T)(-1) < (T)0;                                  \
    static constexpr __constant bool is_integer = true;                                           \
    static constexpr __constant int digits = (int)(sizeof(T) * 8) - (is_signed ? 1 : 0);          \
    static constexpr T max() { return (T)(HIGH); }                                                \
    static constexpr T min() { return (T)(LOW); }                                                 \
    static constexpr T lowest() { return (T)(LOW); }                                              \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(signed char, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, -32768, 32767)
MSL_INTEGER_LIMITS(ushort, 0, 65535)
MSL_INTEGER_LIMITS(int, -2147483647 - 1, 2147483647)
MSL_INTEGER_LIMITS(uint, 0, 4294967295u)
MSL_INTEGER_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
MSL_INTEGER_LIMITS(ulong, 0, 18446744073709551615ul)
#define MSL_FLOAT_LIMITS(T, HIGH, SMALL, EPSILON, DIGITS)                                        \
  template <> struct numeric_limits<T> {                                                         \
    static constexpr __constant bool is_signed = true;                                            \
    static constexpr __constant bool is_integer = false;                                          \
    static constexpr __constant int digits = DIGITS;                                              \
    static constexpr T max() { return (T)(HIGH); }                                                \
    static constexpr T min() { return (T)(SMALL); }                                               \
    static constexpr T lowest() { return (T)(-(HIGH)); }                                          \
    static constexpr T epsilon() { return (T)(EPSILON); }                                         \
    static constexpr T infinity() { return (T)__builtin_inff(); }                                 \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }                              \
  };
MSL_FLOAT_LIMITS(float, 0x1.fffffep127f, 0x1p-126f, 0x1p-23f, 24)
MSL_FLOAT_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f, 11)
MSL_FLOAT_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f, 8)
} // namespace metal
