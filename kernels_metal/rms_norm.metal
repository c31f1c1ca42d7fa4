// normed = x * rsqrt(mean(x^2) + eps) * (weight + offset), a row a threadgroup.
#include "rms_rows.metal"
//: body
  threadgroup float partial[32];
  const int d = x_shape[1];
  const int t = thread_position_in_threadgroup.x;
  const int threads = threads_per_threadgroup.x;
  const size_t row = size_t(threadgroup_position_in_grid.y) * d;
  const float eps = settings[0], offset = settings[1];

  float values[4 * QUADS];
  #pragma clang loop unroll(full)
  for (int v = 0; v < 4 * QUADS; v++) {
    const int i = place_of<QUADS>(v, t, threads);
    values[v] = i < d ? float(x[row + i]) : 0.0f;
  }
  const float factor = inverse_rms<QUADS>(
      values, partial, d, eps, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup);
  #pragma clang loop unroll(full)
  for (int v = 0; v < 4 * QUADS; v++) {
    const int i = place_of<QUADS>(v, t, threads);
    if (i < d) normed[row + i] = T(values[v] * factor * (float(weight[i]) + offset));
  }
