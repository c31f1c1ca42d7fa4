// One threadgroup a row of d values. Thread t holds quads t, t + threads, ... of four neighbours,
// so that the order of the sum depends on d alone.

template <int QUADS>
inline int place_of(int value, int thread_index, int threads) {
  return 4 * (thread_index + value / 4 * threads) + value % 4;
}

// 1 / sqrt(mean of squares + eps) of the row, the same in every thread. Values past d must be 0.
template <int QUADS>
inline float inverse_rms(
    const thread float* values,
    threadgroup float* partial,  // [32]
    int d,
    float eps,
    int lane,
    int simdgroup,
    int simdgroups) {
  float squares = 0.0f;
  #pragma clang loop unroll(full)
  for (int v = 0; v < 4 * QUADS; v++) squares += values[v] * values[v];
  squares = simd_sum(squares);
  if (lane == 0) partial[simdgroup] = squares;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  squares = simd_sum(lane < simdgroups ? partial[lane] : 0.0f);
  return precise::rsqrt(squares / float(d) + eps);
}
