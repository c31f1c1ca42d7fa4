// Attention of one simdgroup over a paged KV pool: what paged_decode and paged_prefill share.
//
// The simdgroup has HT x 8 columns, each one query head of one row, and walks positions in steps of
// 32. Scores are computed transposed, [position, column], so that keys and values are read alike:
// a lane takes a run of consecutive elements of one position, which are its elements of several
// 8x8 matrices at once. That permutes the head's elements, and the queries are laid out likewise.
// Which element of an 8x8 matrix is in which lane is as MLX's own kernels take it (BaseMMAFrag).

#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int TILES = 4;         // 8x8 score tiles in a step
constant constexpr int STEP = 8 * TILES;  // positions in a step
constant constexpr float LOG2E = 1.44269504088896340736f;
// The largest score of a column that has seen nothing: finite, so that no difference is a NaN.
constant constexpr float LOWEST = -3.0e38f;

// Row, and first of the two neighbouring columns, of a lane's elements in an 8x8 matrix.
struct Place {
  short row;
  short col;
};

inline Place place_of(uint lane) {
  Place at;
  at.row = short(((lane >> 2) & 4) | ((lane >> 1) & 3));
  at.col = short(((lane >> 1) & 4) | ((lane & 1) * 2));
  return at;
}

inline uint lane_of(int row, int col) {
  return uint(((row & 4) << 2) | ((row & 3) << 1) | ((col & 4) << 1) | ((col >> 1) & 1));
}

// d += a b, of 8x8 matrices.
inline void multiply_add(thread float2& d, float2 a, float2 b) {
  simdgroup_matrix<float, 8, 8> left, right, sum;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(sum.thread_elements()) = d;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  d = reinterpret_cast<thread float2&>(sum.thread_elements());
}

inline float2 transposed(float2 x, Place at) {
  const ushort low = ushort(lane_of(at.col, at.row));
  const ushort high = ushort(lane_of(at.col + 1, at.row));
  const float2 first = float2(simd_shuffle(x.x, low), simd_shuffle(x.y, low));
  const float2 second = float2(simd_shuffle(x.x, high), simd_shuffle(x.y, high));
  return (at.row & 1) ? float2(first.y, second.y) : float2(first.x, second.x);
}

// A value of each column, from the lanes that hold the column's scores to those with its output.
inline float by_row(float2 of_column, Place at) {
  const ushort from = ushort(lane_of(0, at.row));
  const float even = simd_shuffle(of_column.x, from), odd = simd_shuffle(of_column.y, from);
  return (at.row & 1) ? odd : even;
}

inline float2 max_of_column(float2 x) {
  x = max(x, simd_shuffle_xor(x, ushort(2)));
  x = max(x, simd_shuffle_xor(x, ushort(4)));
  return max(x, simd_shuffle_xor(x, ushort(16)));
}

inline float2 sum_of_column(float2 x) {
  x += simd_shuffle_xor(x, ushort(2));
  x += simd_shuffle_xor(x, ushort(4));
  return x + simd_shuffle_xor(x, ushort(16));
}

// How a head of D elements is cut: chunks of WIDTH, each quarter of one in a lane, two elements to
// a matrix. A quantization group is a chunk too.
template <int D>
struct Cut {
  static constant constexpr int WIDTH = D % 32 == 0 ? 32 : 16;
  static constant constexpr int RUN = WIDTH / 4;
  static constant constexpr int PAIRS = RUN / 2;
  static constant constexpr int CHUNKS = D / WIDTH;
  static constant constexpr int MATRICES = D / 8;
};

// The RUN elements of one position that this lane has in a chunk. BITS 0: the pool is not
// quantized, and `codes` are its values.
template <typename T, int D, int BITS, typename Codes, typename Scales>
inline void read_run(
    Codes codes, Scales scales, Scales biases, size_t vector, int chunk, int quarter,
    thread float* run) {
  constexpr int RUN = Cut<D>::RUN;
  if constexpr (BITS == 0) {
    const device vec<T, 4>* from = reinterpret_cast<const device vec<T, 4>*>(
        codes + vector * D + chunk * Cut<D>::WIDTH + quarter * RUN);
    UNROLL for (int i = 0; i < RUN / 4; i++) {
      const vec<T, 4> four = from[i];
      UNROLL for (int k = 0; k < 4; k++) run[i * 4 + k] = float(four[k]);
    }
  } else {
    constexpr int PER_WORD = 32 / BITS;
    const float scale = float(scales[vector * Cut<D>::CHUNKS + chunk]);
    const float bias = float(biases[vector * Cut<D>::CHUNKS + chunk]);
    const int at = chunk * Cut<D>::WIDTH + quarter * RUN;
    UNROLL for (int i = 0; i < RUN; i += PER_WORD) {
      uint word = codes[vector * (D / PER_WORD) + (at + i) / PER_WORD];
      if (RUN < PER_WORD) word >>= (at % PER_WORD) * BITS;
      UNROLL for (int k = 0; k < PER_WORD && k < RUN; k++) {
        run[i + k] = fma(scale, float((word >> (k * BITS)) & ((1u << BITS) - 1u)), bias);
      }
    }
  }
}

// The queries that share a KV head: `rows` rows from first_row on, `heads` of all_heads query heads
// from first_head on. Column c is head c % SHARE of row c / SHARE.
struct Group {
  int first_row;
  int rows;
  int first_head;
  int heads;
  int all_heads;
};

template <int SHARE>
inline bool holds(Group group, int column) {
  return column / SHARE < group.rows && column % SHARE < group.heads;
}

template <int SHARE>
inline size_t vector_of(Group group, int column) {
  return size_t(group.first_row + column / SHARE) * group.all_heads + group.first_head +
      column % SHARE;
}

// The 8x8 matrix of queries [element, column], columns from first_column on, as a lane has it.
template <typename T, int D, int SHARE, typename Queries>
inline vec<T, 2> query_pair(
    Queries q, Group group, int first_column, int matrix, uint lane) {
  const Place at = place_of(lane);
  const int d = (matrix / Cut<D>::PAIRS) * Cut<D>::WIDTH + (at.row / 2) * Cut<D>::RUN +
      (matrix % Cut<D>::PAIRS) * 2 + at.row % 2;
  const int column = first_column + at.col;
  vec<T, 2> pair = vec<T, 2>(T(0));
  if (holds<SHARE>(group, column)) pair.x = q[vector_of<SHARE>(group, column) * D + d];
  if (holds<SHARE>(group, column + 1)) pair.y = q[vector_of<SHARE>(group, column + 1) * D + d];
  return pair;
}

// What a simdgroup knows so far of its columns. A lane has two columns of each of HT tiles in top
// (largest score, in powers of two), total (of this lane's positions alone), first and last (the
// positions first ... last - 1 are seen); and two elements of one column in each matrix of out.
template <int D, int HT>
struct Attention {
  float2 top[HT];
  float2 total[HT];
  int2 first[HT];
  int2 last[HT];
  float2 out[HT][D / 8];
};

template <int D, int HT>
inline void clear(thread Attention<D, HT>& state) {
  UNROLL for (int h = 0; h < HT; h++) {
    state.top[h] = float2(LOWEST);
    state.total[h] = float2(0.0f);
    UNROLL for (int m = 0; m < D / 8; m++) state.out[h][m] = float2(0.0f);
  }
}

// One step: positions base ... base + 31, of which begin ... end - 1 may be read. A column that sees
// none of them is left exactly as it was. queries: this simdgroup's matrices, one after another.
template <typename T, int D, int BITS, int BLOCK, int HT, typename Codes, typename Scales,
          typename Table>
inline void attend(
    thread Attention<D, HT>& state, Codes keys, Scales key_scales, Scales key_biases, Codes values,
    Scales value_scales, Scales value_biases, Table table, const threadgroup vec<T, 2>* queries,
    int kv_head, int kv_heads, int base, int begin, int end, float scale, float softcap,
    uint lane) {
  const Place at = place_of(lane);
  size_t vectors[TILES];
  bool read[TILES];
  UNROLL for (int t = 0; t < TILES; t++) {
    const int position = base + t * 8 + at.row;
    read[t] = position >= begin && position < end;
    const int block = read[t] ? int(table[position / BLOCK]) : 0;
    vectors[t] = (size_t(block) * kv_heads + kv_head) * BLOCK + position % BLOCK;
  }

  float2 scores[TILES][HT];
  UNROLL for (int t = 0; t < TILES; t++) {
    UNROLL for (int h = 0; h < HT; h++) scores[t][h] = float2(0.0f);
  }
  for (int chunk = 0; chunk < Cut<D>::CHUNKS; chunk++) {
    float2 query[HT][Cut<D>::PAIRS];
    UNROLL for (int h = 0; h < HT; h++) {
      UNROLL for (int m = 0; m < Cut<D>::PAIRS; m++) {
        const int matrix = h * Cut<D>::MATRICES + chunk * Cut<D>::PAIRS + m;
        const vec<T, 2> pair = queries[matrix * 32 + lane];
        query[h][m] = float2(float(pair.x), float(pair.y));
      }
    }
    UNROLL for (int t = 0; t < TILES; t++) {
      float run[Cut<D>::RUN] = {0};
      if (read[t]) {
        read_run<T, D, BITS>(
            keys, key_scales, key_biases, vectors[t], chunk, at.col / 2, run);
      }
      UNROLL for (int m = 0; m < Cut<D>::PAIRS; m++) {
        const float2 key = float2(run[m * 2], run[m * 2 + 1]);
        UNROLL for (int h = 0; h < HT; h++) multiply_add(scores[t][h], key, query[h][m]);
      }
    }
  }

  UNROLL for (int h = 0; h < HT; h++) {
    float2 top = float2(LOWEST);
    bool seen[TILES][2];
    UNROLL for (int t = 0; t < TILES; t++) {
      const int position = base + t * 8 + at.row;
      float2 score = scores[t][h] * scale;
      if (softcap > 0.0f) {
        score = softcap * float2(
            precise::tanh(score.x / softcap), precise::tanh(score.y / softcap));
      }
      scores[t][h] = score * LOG2E;
      seen[t][0] = position >= state.first[h].x && position < state.last[h].x;
      seen[t][1] = position >= state.first[h].y && position < state.last[h].y;
      top.x = seen[t][0] ? max(top.x, scores[t][h].x) : top.x;
      top.y = seen[t][1] ? max(top.y, scores[t][h].y) : top.y;
    }
    top = max(state.top[h], max_of_column(top));
    const float2 shrink = float2(
        fast::exp2(state.top[h].x - top.x), fast::exp2(state.top[h].y - top.y));
    float2 total = state.total[h] * shrink;
    UNROLL for (int t = 0; t < TILES; t++) {
      float2 weight;
      weight.x = seen[t][0] ? fast::exp2(scores[t][h].x - top.x) : 0.0f;
      weight.y = seen[t][1] ? fast::exp2(scores[t][h].y - top.y) : 0.0f;
      total += weight;
      scores[t][h] = transposed(weight, at);  // [column, position] from here on
    }
    state.top[h] = top;
    state.total[h] = total;
    const float shrink_row = by_row(shrink, at);
    UNROLL for (int m = 0; m < Cut<D>::MATRICES; m++) state.out[h][m] *= shrink_row;
  }

  UNROLL for (int chunk = 0; chunk < Cut<D>::CHUNKS; chunk++) {
    UNROLL for (int t = 0; t < TILES; t++) {
      float run[Cut<D>::RUN] = {0};
      if (read[t]) {
        read_run<T, D, BITS>(
            values, value_scales, value_biases, vectors[t], chunk, at.col / 2, run);
      }
      UNROLL for (int m = 0; m < Cut<D>::PAIRS; m++) {
        const float2 value = float2(run[m * 2], run[m * 2 + 1]);
        UNROLL for (int h = 0; h < HT; h++) {
          multiply_add(state.out[h][chunk * Cut<D>::PAIRS + m], scores[t][h], value);
        }
      }
    }
  }
}

// RUN consecutive elements of a result, times `factor`.
template <typename O, int RUN, typename Out>
inline void write_run(Out out, const thread float* run, float factor) {
  UNROLL for (int i = 0; i < RUN; i += 4) {
    vec<O, 4> four;
    UNROLL for (int k = 0; k < 4; k++) four[k] = static_cast<O>(run[i + k] * factor);
    *reinterpret_cast<device vec<O, 4>*>(out + i) = four;
  }
}
