// MLX's affine quantization of a head that lies over a simdgroup as in rope_head.metal: value =
// scale * code + bias, where a code stands exactly for the end of the range farther from 0.

template <int GROUP>
inline float group_min(float x) {
  for (ushort step = GROUP / 2; step > 0; step /= 2) x = min(x, simd_shuffle_xor(x, step));
  return x;
}

template <int GROUP>
inline float group_max(float x) {
  for (ushort step = GROUP / 2; step > 0; step /= 2) x = max(x, simd_shuffle_xor(x, step));
  return x;
}

// codes: [D * BITS / 32]; scales, biases: [D / GROUP].
template <int D, int BITS, int GROUP, typename T>
inline void quantize_head(
    const thread float* values,
    device uint32_t* codes,
    device T* scales,
    device T* biases,
    int lane) {
  constexpr float top = (1 << BITS) - 1;
  constexpr int per_word = 32 / BITS;
  #pragma clang loop unroll(full)
  for (int v = 0; v < (D + 31) / 32; v++) {
    const int i = lane + 32 * v;
    const float least = group_min<GROUP>(values[v]);
    const float most = group_max<GROUP>(values[v]);
    const bool negative = abs(least) > abs(most);
    const float edge = negative ? least : most;
    float scale = max((most - least) / top, 1e-7f);
    if (!negative) scale = -scale;
    const float steps = rint(edge / scale);
    const float bias = steps == 0.0f ? 0.0f : edge;
    if (steps != 0.0f) scale = edge / steps;

    const float code = clamp(rint((values[v] - bias) / scale), 0.0f, top);
    uint32_t word = uint32_t(code) << (BITS * (lane % per_word));
    for (ushort step = 1; step < per_word; step *= 2) word |= simd_shuffle_xor(word, step);
    if (i < D && lane % per_word == 0) codes[i / per_word] = word;
    if (i < D && lane % GROUP == 0) {
      scales[i / GROUP] = T(scale);
      biases[i / GROUP] = T(bias);
    }
  }
}
