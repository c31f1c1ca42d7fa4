#include <metal_simdgroup>
#include <metal_stdlib>
#include "affine.metal"

constant constexpr int LANES = 8;       // lanes that share an output row: 128 bytes of codes a step
constant constexpr int SIMDGROUPS = 2;  // in a threadgroup

//: body
  constexpr bool GATED = ACTIVATION != NO_ACTIVATION;
  constexpr int ROWS = GATED ? 1 : 2;      // output rows of one matrix that a lane works on
  constexpr int AT_ONCE = 32 / LANES;      // output rows that a simdgroup reads side by side
  constexpr int VALUES = 128 / BITS;       // codes in a uint4, all of one group
  const int K = x_shape[1], N = w_shape[0];
  const int lane = thread_index_in_simdgroup;
  const int simdgroup = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
  const int first = simdgroup * (ROWS * AT_ONCE) + lane / LANES;

  auto codes = as_uint4(w);
  auto codes_up = as_uint4(w_up);
  float sums[ROWS] = {0};
  float sums_up[ROWS] = {0};
  for (int k = (lane % LANES) * VALUES; k < K; k += LANES * VALUES) {
    float values[VALUES];
    load_values<VALUES>(x + k, values);
    float total = 0;
    #pragma clang loop unroll(full)
    for (int i = 0; i < VALUES; i++) {
      total += values[i];
    }
    #pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
      // Rows past the end read the last one again and are not stored.
      const int row = min(first + r * AT_ONCE, N - 1);
      const int at = row * (K / VALUES) + k / VALUES, group = row * (K / GROUP) + k / GROUP;
      float dot = dot_codes<BITS>(codes[at], values);
      sums[r] = fma(float(scales[group]), dot, fma(float(biases[group]), total, sums[r]));
      if (GATED) {
        dot = dot_codes<BITS>(codes_up[at], values);
        sums_up[r] = fma(float(scales_up[group]), dot, fma(float(biases_up[group]), total, sums_up[r]));
      }
    }
  }
  #pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    for (int step = LANES / 2; step > 0; step /= 2) {
      sums[r] += simd_shuffle_xor(sums[r], step);
      if (GATED) {
        sums_up[r] += simd_shuffle_xor(sums_up[r], step);
      }
    }
    const int row = first + r * AT_ONCE;
    if (lane % LANES == 0 && row < N) {
      float value = sums[r];
      if (HAS_BIAS) {
        value += float(bias[row]);
      }
      if (GATED) {
        float up = sums_up[r];
        if (HAS_BIAS) {
          up += float(bias_up[row]);
        }
        value = activate<ACTIVATION>(value) * up;
      }
      if (HAS_RESIDUAL) {
        value += float(residual[row]);
      }
      y[row] = T(value);
    }
  }
