#include <metal_simdgroup>
#include <metal_stdlib>
#include "affine.metal"

constant constexpr int SIMDGROUPS = 4;  // share the sum over K
constant constexpr int RANKS = 4;       // of one row, that a threadgroup sums at a time

//: body
  threadgroup float parts[SIMDGROUPS][RANKS];
  const int K = x_shape[1], R = a_shape[1];
  const int row = threadgroup_position_in_grid.y, r0 = threadgroup_position_in_grid.x * RANKS;
  const int thread_index = thread_index_in_threadgroup, slot = adapter[row];
  if (slot < 0) {  // the whole threadgroup
    if (thread_index < RANKS) {
      h[row * R + r0 + thread_index] = 0;
    }
    return;
  }
  const device T* down = a + ((long)slot * R + r0) * K;
  float sums[RANKS] = {0};
  for (int k = thread_index * 8; k < K; k += SIMDGROUPS * 32 * 8) {
    float values[8], weights[8];
    load_values<8>(x + row * K + k, values);
    #pragma clang loop unroll(full)
    for (int r = 0; r < RANKS; r++) {
      load_values<8>(down + (long)r * K + k, weights);
      #pragma clang loop unroll(full)
      for (int i = 0; i < 8; i++) {
        sums[r] = fma(values[i], weights[i], sums[r]);
      }
    }
  }
  #pragma clang loop unroll(full)
  for (int r = 0; r < RANKS; r++) {
    const float sum = simd_sum(sums[r]);
    if (thread_index_in_simdgroup == 0) {
      parts[simdgroup_index_in_threadgroup][r] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < RANKS) {
    float sum = 0;
    for (int part = 0; part < SIMDGROUPS; part++) {
      sum += parts[part][thread_index];
    }
    h[row * R + r0 + thread_index] = sum;
  }
