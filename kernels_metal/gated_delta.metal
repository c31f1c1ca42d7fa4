// The gated delta rule over the rows of a run. A simdgroup carries COLUMNS entries of a value head:
// of S [value_dim, key_dim] so many rows, each lane every 32nd entry of them, in registers from the
// first row of the run to the last. The order of a sum depends on key_dim alone.
#include "sigmoid.metal"

constant constexpr int COLUMNS = 4;

// log(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)) with u = e^-|x|, to float32's precision where it
// is near 0, too.
inline float softplus(float x) {
  const float u = precise::exp(-fabs(x)), s = u / (u + 2.0f), z = s * s;  // s up to 1/3
  float p = 1.0f / 15.0f;
  p = fma(p, z, 1.0f / 13.0f);
  p = fma(p, z, 1.0f / 11.0f);
  p = fma(p, z, 1.0f / 9.0f);
  p = fma(p, z, 1.0f / 7.0f);
  p = fma(p, z, 1.0f / 5.0f);
  p = fma(p, z, 1.0f / 3.0f);
  p = fma(p, z, 1.0f);
  return fma(s + s, p, max(x, 0.0f));
}

//: body
  const device float* const states[] = {STATES};
  device float* const afters[] = {AFTERS};
  const int number = threadgroup_position_in_grid.z;
  const device float* state = states[number];
  device float* after = afters[number];
  const int first = runs[3 * number], count = runs[3 * number + 1], sure = runs[3 * number + 2];
  const int place = first - runs[0];  // of the first row in qkv and y

  const int heads = state_0_shape[0], value_dim = state_0_shape[1], key_dim = state_0_shape[2];
  const int channels = qkv_shape[1], values = heads * value_dim, keys = (channels - values) / 2;
  const int lane = thread_index_in_simdgroup, head = threadgroup_position_in_grid.y;
  const int column = COLUMNS * (threadgroup_position_in_grid.x * simdgroups_per_threadgroup +
                                simdgroup_index_in_threadgroup);
  if (column >= value_dim) return;  // the whole simdgroup
  const int key = head / (heads * key_dim / keys) * key_dim;  // where the head's q and k begin
  const float fastest = -precise::exp(rate[head]), shift = step[head];

  float s[COLUMNS][KEYS];
  #pragma clang loop unroll(full)
  for (int c = 0; c < COLUMNS; c++) {
    const size_t at = (size_t(head) * value_dim + min(column + c, value_dim - 1)) * key_dim;
    #pragma clang loop unroll(full)
    for (int i = 0; i < KEYS; i++) {
      const int entry = i * 32 + lane;
      s[c][i] = entry < key_dim ? state[at + entry] : 0.0f;
    }
  }
  for (int row = 0; row < count; row++) {
    const size_t in = size_t(place + row) * channels;
    float q[KEYS], k[KEYS], qq = 0.0f, kk = 0.0f;
    #pragma clang loop unroll(full)
    for (int i = 0; i < KEYS; i++) {
      const int entry = i * 32 + lane;
      q[i] = entry < key_dim ? qkv[in + key + entry] : 0.0f;
      k[i] = entry < key_dim ? qkv[in + keys + key + entry] : 0.0f;
      qq = fma(q[i], q[i], qq);
      kk = fma(k[i], k[i], kk);
    }
    const float k_unit = precise::rsqrt(simd_sum(kk) + 1e-6f);
    const float q_unit = precise::rsqrt((simd_sum(qq) + 1e-6f) * float(key_dim));
    const size_t gate = size_t(first + row) * heads + head;
    const float share = sigmoid(float(beta[gate]));
    const float kept = precise::exp(fastest * softplus(float(decay[gate]) + shift));
    #pragma clang loop unroll(full)
    for (int i = 0; i < KEYS; i++) {
      q[i] *= q_unit;
      k[i] *= k_unit;
    }
    #pragma clang loop unroll(full)
    for (int c = 0; c < COLUMNS; c++) {
      const int value = head * value_dim + min(column + c, value_dim - 1);
      float known = 0.0f, out = 0.0f;
      #pragma clang loop unroll(full)
      for (int i = 0; i < KEYS; i++) {
        s[c][i] *= kept;
        known = fma(s[c][i], k[i], known);
      }
      const float change = share * (qkv[in + 2 * keys + value] - simd_sum(known));
      #pragma clang loop unroll(full)
      for (int i = 0; i < KEYS; i++) {
        s[c][i] = fma(k[i], change, s[c][i]);
        out = fma(s[c][i], q[i], out);
      }
      out = simd_sum(out);
      if (lane == 0 && column + c < value_dim) y[size_t(place + row) * values + value] = out;
    }
    if (row + 1 == sure) {
      #pragma clang loop unroll(full)
      for (int c = 0; c < COLUMNS; c++) {
        const size_t at = (size_t(head) * value_dim + column + c) * key_dim;
        #pragma clang loop unroll(full)
        for (int i = 0; i < KEYS; i++) {
          const int entry = i * 32 + lane;
          if (column + c < value_dim && entry < key_dim) after[at + entry] = s[c][i];
        }
      }
    }
  }
