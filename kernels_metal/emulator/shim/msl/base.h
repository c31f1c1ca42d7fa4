// Address spaces, scalar types, and what the runtime offers.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_khr_fp64 : disable
#pragma OPENCL EXTENSION __cl_clang_non_portable_kernel_param_types : enable
#pragma clang diagnostic ignored "-Wunknown-attributes"
#pragma clang diagnostic ignored "-Wduplicate-decl-specifier"

#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))

// Ours: inlined without lines of its own, so that an address in it has the line of the kernel.
#define MSL_FN inline __attribute__((always_inline, nodebug, no_sanitize("undefined")))
// Ours, and its accesses are not reported.
#define MSL_UNSEEN                                                                               \
  inline __attribute__((noinline, nodebug, no_sanitize("undefined"), no_sanitize("kernel-address")))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef __bf16 bfloat;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define MAXFLOAT 0x1.fffffep127f
#define MAXHALF ((half)65504.0f)
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)0x1p-14f)
#define M_E_F 2.71828174591064453125f
#define M_PI_F 3.14159274101257324219f
#define M_PI_2_F 1.57079637050628662109f
#define M_1_PI_F 0.318309873342514038086f
#define M_2_SQRTPI_F 1.12837922573089599609f
#define M_SQRT2_F 1.41421353816986083984f
#define M_SQRT1_2_F 0.707106769084930419922f
#define M_LOG2E_F 1.44269502162933349609f
#define M_LOG10E_F 0.434294492006301879883f
#define M_LN2_F 0.693147182464599609375f
#define M_LN10_F 2.30258512496948242188f

extern "C" {
void msl_simd(uint op, uint type, const __private void *mine, __private void *out, uint bytes,
              uint argument);
uint msl_active(void);
void msl_threadgroup_barrier(uint flags);
void msl_simdgroup_barrier(uint flags);
uint msl_builtin(uint which);
void msl_fault(uint kind, uint extra);
}
enum msl_op : uint { // runtime/simd.h has the same
  msl_add = 0, msl_mul, msl_min, msl_max, msl_and, msl_or, msl_xor,
  msl_scan_add = 16, msl_scan_add_before, msl_scan_mul, msl_scan_mul_before,
  msl_shuffle = 32, msl_shift_lanes, msl_first, msl_ballot, msl_uniform,
  msl_matrix = 48,
  msl_quad = 256,
};
#define MSL_LANE msl_builtin(22)
