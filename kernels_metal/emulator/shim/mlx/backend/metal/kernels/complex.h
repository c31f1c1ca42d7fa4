// In place of MLX's: no kernel of ours computes with complex numbers; utils.h names the type.
#pragma once
#include <metal_stdlib>
using namespace metal;
template <typename T> struct complex_t {
  T real, imag;
};
typedef complex_t<float> complex64_t;
#define complex64_t(...)                                                                         \
  complex64_t { __VA_ARGS__ }
