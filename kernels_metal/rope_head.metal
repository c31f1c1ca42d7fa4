// One simdgroup a head of D values: its lane l holds elements l, l + 32, ..., so that 32 neighbours
// are one value of every lane. Values past D are 0.

template <int D, typename P>
inline void load_head(P x, thread float* values, int lane) {
  #pragma clang loop unroll(full)
  for (int v = 0; v < (D + 31) / 32; v++) {
    const int i = lane + 32 * v;
    values[v] = i < D ? float(x[i]) : 0.0f;
  }
}

// RMSNorm over the head; its gain is weight + offset.
template <int D, typename P>
inline void norm_head(thread float* values, P weight, float eps, float offset, int lane) {
  float squares = 0.0f;
  #pragma clang loop unroll(full)
  for (int v = 0; v < (D + 31) / 32; v++) squares += values[v] * values[v];
  const float factor = precise::rsqrt(simd_sum(squares) / float(D) + eps);
  #pragma clang loop unroll(full)
  for (int v = 0; v < (D + 31) / 32; v++) {
    const int i = lane + 32 * v;
    if (i < D) values[v] *= factor * (float(weight[i]) + offset);
  }
}

// Rotates the first DIM values: pairs (i, i + DIM / 2), or (2 i, 2 i + 1) if INTERLEAVED, by angle i.
// line: threadgroup memory of this simdgroup alone, [DIM].
template <int D, int DIM, bool INTERLEAVED, typename C, typename S>
inline void rotate_head(
    thread float* values, threadgroup float* line, C cosines, S sines, int lane) {
  constexpr int half_dim = DIM > 0 ? DIM / 2 : 1;  // never divides by 0, even where never called
  #pragma clang loop unroll(full)
  for (int v = 0; v < (DIM + 31) / 32; v++) {
    if (lane + 32 * v < DIM) line[lane + 32 * v] = values[v];
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  #pragma clang loop unroll(full)
  for (int v = 0; v < (DIM + 31) / 32; v++) {
    const int i = lane + 32 * v;
    if (i < DIM) {
      const int pair = INTERLEAVED ? i / 2 : i % half_dim;
      const bool second = INTERLEAVED ? i % 2 == 1 : i >= half_dim;
      const int other = INTERLEAVED ? i ^ 1 : (second ? i - half_dim : i + half_dim);
      const float turned = line[other] * sines[pair];
      values[v] = values[v] * cosines[pair] + (second ? turned : -turned);
    }
  }
}

template <int D, typename T>
inline void store_head(const thread float* values, device T* out, int lane) {
  #pragma clang loop unroll(full)
  for (int v = 0; v < (D + 31) / 32; v++) {
    const int i = lane + 32 * v;
    if (i < D) out[i] = T(values[v]);
  }
}
