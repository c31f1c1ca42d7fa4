#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
#include "affine.metal"

constant constexpr int PARTS = 4;    // simdgroups that share the sum over K
constant constexpr int SIDES = 2;    // simdgroups that share N
constant constexpr int TILES = 2;    // 8x8 tiles of y^T that a simdgroup holds
constant constexpr int STEP = 128;   // of K, in which a lane decodes 32 codes of a row
constant constexpr int STAGE = PARTS * STEP;
constant constexpr int COLUMNS = SIDES * TILES * 8;
constant constexpr int PITCH = COLUMNS + 4;  // padded, so that rows start in different banks

// Sums need no order along K, so tile t of a step takes from lane column c (0-3) the codes
// 32 c + 2 t and 32 c + 2 t + 1: each lane decodes what it read itself, 32 codes in a row, and
// weights never pass through threadgroup memory. x is laid out to match:
// tile [8 of K, 8 rows of x], K's 2 c + i holding x[m][32 c + 2 t + i].

// 16 values of one row of x into their places. Two lane columns write the pair the other way
// round, so that the 32 lanes of a write meet 32 banks.
template <typename T>
inline void stage_x(const device T* from, bool inside, int m, int c, threadgroup float* tiles) {
  float values[16] = {0};
  if (inside) {
    load_values<16>(from, values);
  }
  const int flip = c >> 1;
  #pragma clang loop unroll(full)
  for (int t = 0; t < 8; t++) {
    const float a = values[2 * t], b = values[2 * t + 1];
    threadgroup float* tile = tiles + t * 64 + m;
    tile[(2 * c + flip) * 8] = flip ? b : a;
    tile[(2 * c + 1 - flip) * 8] = flip ? a : b;
  }
}

//: body
  constexpr bool GATED = ACTIVATION != NO_ACTIVATION;
  constexpr int WIDTH = GATED ? COLUMNS / 2 : COLUMNS;  // columns of y that a threadgroup makes
  constexpr int WORDS = BITS;                           // uint32 words of 32 codes
  threadgroup float shared[STAGE * 8];                  // x by tiles; at the end, sums by parts

  const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int thread_index = thread_index_in_threadgroup;
  const int part = simdgroup / SIDES, side = simdgroup % SIDES;
  const int n0 = threadgroup_position_in_grid.x * WIDTH;

  // What a lane holds of an 8x8 matrix: row `tile_row`, columns 2 c and 2 c + 1.
  const int tile_row = ((lane / 4) & 4) + (lane / 2) % 4, c = ((lane / 4) & 2) + lane % 2;
  int rows[TILES];
  #pragma clang loop unroll(full)
  for (int j = 0; j < TILES; j++) {
    const int row = GATED ? side * 8 : (side * TILES + j) * 8;
    rows[j] = min(n0 + row + tile_row, N - 1);  // past the end: the last row, not stored
  }
  auto codes = as_uint4(w);
  auto codes_up = as_uint4(w_up);

  simdgroup_matrix<float, 8, 8> sums[TILES];
  #pragma clang loop unroll(full)
  for (int j = 0; j < TILES; j++) {
    sums[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int k0 = 0; k0 < K; k0 += STAGE) {
    const int k = k0 + part * STEP + c * 32;
    uint words[TILES][WORDS] = {{0}};
    float scale[TILES] = {0}, zero[TILES] = {0};
    if (k < K) {
      #pragma clang loop unroll(full)
      for (int j = 0; j < TILES; j++) {
        const bool second = GATED && j > 0;
        const int group = rows[j] * (K / GROUP) + k / GROUP;
        const int at = (rows[j] * (K / 32) + k / 32) * (WORDS / 4);
        scale[j] = second ? float(scales_up[group]) : float(scales[group]);
        zero[j] = second ? float(biases_up[group]) : float(biases[group]);
        #pragma clang loop unroll(full)
        for (int i = 0; i < WORDS; i += 4) {
          const uint4 four = second ? codes_up[at + i / 4] : codes[at + i / 4];
          #pragma clang loop unroll(full)
          for (int word = 0; word < 4; word++) {
            words[j][i + word] = four[word];
          }
        }
      }
    }
    if (k0 > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the stage before has been read
    }
    {
      const int m = lane % 8, column = lane / 8, half_row = side * 16;
      const int from = k0 + part * STEP + column * 32 + half_row;
      stage_x(x + m * K + from, m < M && from < K, m, column,
              shared + (part * STEP + half_row * 4) * 8);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (k0 + part * STEP < K) {
      threadgroup const float* tiles = shared + part * STEP * 8;
      simdgroup_matrix<float, 8, 8> values, weights;
      #pragma clang loop unroll(full)
      for (int t = 0; t < STEP / 8; t++) {
        simdgroup_load(values, tiles + t * 64, 8);
        #pragma clang loop unroll(full)
        for (int j = 0; j < TILES; j++) {
          #pragma clang loop unroll(full)
          for (int i = 0; i < 2; i++) {
            const int at = 2 * t + i;
            const float code = code_at<BITS>(words[j][at / (32 / BITS)], at % (32 / BITS));
            weights.thread_elements()[i] = fma(scale[j], code, zero[j]);
          }
          simdgroup_multiply_accumulate(sums[j], weights, values, sums[j]);
        }
      }
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  #pragma clang loop unroll(full)
  for (int j = 0; j < TILES; j++) {
    const int column = GATED ? j * WIDTH + side * 8 : (side * TILES + j) * 8;
    simdgroup_store(sums[j], shared + part * 8 * PITCH + column, PITCH, ulong2(0, 0), true);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int m = thread_index / WIDTH, column = thread_index % WIDTH, n = n0 + column;
  if (m < M && n < N) {
    float value = 0, up = 0;
    for (int p = 0; p < PARTS; p++) {
      value += shared[(p * 8 + m) * PITCH + column];
      if (GATED) {
        up += shared[(p * 8 + m) * PITCH + WIDTH + column];
      }
    }
    if (HAS_BIAS) {
      value += float(bias[n]);
      up += GATED ? float(bias_up[n]) : 0.0f;
    }
    if (GATED) {
      value = activate<ACTIVATION>(value) * up;
    }
    if (HAS_RESIDUAL) {
      value += float(residual[m * N + n]);
    }
    y[m * N + n] = T(value);
  }
