#include <metal_simdgroup>
#include <metal_stdlib>
#include "affine.metal"

//: body
  const int N = y_shape[1], R = h_shape[1];
  const int row = threadgroup_position_in_grid.y, slot = adapter[row];
  int lanes = 1;  // that share a column, each with 8 ranks at a time
  while (lanes < 8 && lanes * 16 <= R) {
    lanes *= 2;
  }
  const int thread_index = thread_position_in_grid.x;
  const int column = thread_index / lanes, lane = thread_index % lanes;
  const int at = min(column, N - 1);
  float sum = 0;
  if (slot >= 0) {  // the same in all lanes of a row
    const device T* up = b + ((long)slot * N + at) * R;
    for (int r = lane * 8; r < R; r += lanes * 8) {
      float values[8], weights[8];
      load_values<8>(h + row * R + r, values);
      load_values<8>(up + r, weights);
      #pragma clang loop unroll(full)
      for (int i = 0; i < 8; i++) {
        sum = fma(values[i], weights[i], sum);
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      sum += simd_shuffle_xor(sum, step);
    }
  }
  if (lane == 0 && column < N) {
    const T before = y[row * N + column];
    added[row * N + column] = slot >= 0 ? T(float(before) + sum) : before;
  }
