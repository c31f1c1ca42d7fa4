// Affine codes as MLX packs them: value = scale * code + bias, codes little end first.

// MLX binds an array of fewer than 8 elements as `constant`, others as `device`; take both.
inline const device uint4* as_uint4(const device uint* p) {
  return (const device uint4*)p;
}
inline const constant uint4* as_uint4(const constant uint* p) {
  return (const constant uint4*)p;
}

template <int BITS>
inline float code_at(uint word, int i) {
  return float((word >> (BITS * i)) & ((1u << BITS) - 1));
}

// sum of code * x over the 128 / BITS codes of `p`, one fused multiply-add after another.
template <int BITS>
inline float dot_codes(uint4 p, const thread float* x) {
  constexpr int PER_WORD = 32 / BITS;
  float sum = 0;
  #pragma clang loop unroll(full)
  for (int word = 0; word < 4; word++) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < PER_WORD; i++) {
      sum = fma(code_at<BITS>(p[word], i), x[word * PER_WORD + i], sum);
    }
  }
  return sum;
}

// COUNT values from x on, COUNT a multiple of 4 and x aligned to 4 values.
template <int COUNT, typename T>
inline void load_values(const device T* x, thread float* values) {
  #pragma clang loop unroll(full)
  for (int i = 0; i < COUNT; i += 4) {
    vec<T, 4> four = *(const device vec<T, 4>*)(x + i);
    #pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
      values[i + j] = float(four[j]);
    }
  }
}

constant constexpr int NO_ACTIVATION = 0, SILU = 1, GELU_TANH = 2;

// Both by way of a sigmoid whose exponential cannot overflow:
// 0.5 * x * (1 + tanh(u)) = x * sigmoid(2 * u).
template <int ACTIVATION>
inline float activate(float x) {
  float u = x;
  if (ACTIVATION == GELU_TANH) {
    u = 1.5957691216057308f * x * fma(0.044715f * x, x, 1.0f);
  }
  float t = precise::exp(-fabs(u));
  return x * (u < 0 ? t : 1.0f) / (1.0f + t);
}
