// Chunks of rows against the KV of their sequences, causal: tiled attention in one pass.
// A threadgroup takes one tile of rows and one KV head with up to SHARE of its query heads; each
// simdgroup has columns of its own and walks the positions that they see, from multiples of 32, so
// that a row's result does not depend on where its chunk or tile begins.

#include "paged_attention.metal"
//: body
  constexpr int COLUMNS = HT * 8;  // of a simdgroup
  constexpr int ROWS = SIMDGROUPS * COLUMNS / SHARE;
  constexpr int PARTS = (GROUP + SHARE - 1) / SHARE;
  constexpr int MATRICES = Cut<D>::MATRICES;
  constexpr int RUN = Cut<D>::RUN;
  threadgroup vec<T, 2> staged[SIMDGROUPS * COLUMNS * D / 2];

  const int tile = threadgroup_position_in_grid.x / PARTS;
  const int part = threadgroup_position_in_grid.x % PARTS;
  const int kv_head = threadgroup_position_in_grid.y, kv_heads = keys_shape[1];
  const int chunk = tiles[tile * 2], first_row = tiles[tile * 2 + 1];
  const int position = starts[chunk] + first_row - row_offsets[chunk];  // of the first row

  Group group;
  group.first_row = first_row;
  group.rows = min(ROWS, row_offsets[chunk + 1] - first_row);
  group.first_head = kv_head * GROUP + part * SHARE;
  group.heads = min(SHARE, GROUP - part * SHARE);
  group.all_heads = q_shape[1];
  const uint lane = thread_index_in_simdgroup;
  const int simdgroup = simdgroup_index_in_threadgroup;
  const int first_column = simdgroup * COLUMNS;
  if (first_column / SHARE >= group.rows) return;  // the whole simdgroup

  // A lane reads back what it wrote itself: no barrier.
  threadgroup vec<T, 2>* queries = staged + simdgroup * COLUMNS * D / 2;
  for (int m = 0; m < HT * MATRICES; m++) {
    queries[m * 32 + lane] = query_pair<T, D, SHARE>(
        q, group, first_column + m / MATRICES * 8, m % MATRICES, lane);
  }

  const Place at = place_of(lane);
  Attention<D, HT> state;
  clear(state);
  UNROLL for (int h = 0; h < HT; h++) {
    int2 first = int2(0, 0), last = int2(0, 0);
    UNROLL for (int e = 0; e < 2; e++) {
      const int column = first_column + h * 8 + at.col + e;
      if (holds<SHARE>(group, column)) {
        last[e] = position + column / SHARE + 1;
        first[e] = max(0, last[e] - window[0]);
      }
    }
    state.first[h] = first;
    state.last[h] = last;
  }
  const int last_row = min(group.rows - 1, (first_column + COLUMNS - 1) / SHARE);
  const int begin = max(0, position + first_column / SHARE + 1 - window[0]);
  const int end = position + last_row + 1;
  for (int base = begin / STEP * STEP; base < end; base += STEP) {
    attend<T, D, BITS, BLOCK, HT>(
        state, keys, key_scales, key_biases, values, value_scales, value_biases,
        tables + chunk * tables_shape[1], queries, kv_head, kv_heads, base, begin, end,
        settings[0], settings[1], lane);
  }

  UNROLL for (int h = 0; h < HT; h++) {
    const int column = first_column + h * 8 + at.row;
    const float reached = by_row(state.top[h], at);
    const float sum = by_row(sum_of_column(state.total[h]), at);
    if (holds<SHARE>(group, column)) {
      const float sink = sinks[group.first_head + column % SHARE] * LOG2E;
      const float top = max(reached, sink);
      const float weight = fast::exp2(reached - top);
      const float factor = weight / fma(weight, sum, fast::exp2(sink - top));
      const size_t vector = vector_of<SHARE>(group, column);
      UNROLL for (int c = 0; c < Cut<D>::CHUNKS; c++) {
        float run[RUN];
        UNROLL for (int m = 0; m < RUN / 2; m++) {
          run[m * 2] = state.out[h][c * (RUN / 2) + m].x;
          run[m * 2 + 1] = state.out[h][c * (RUN / 2) + m].y;
        }
        write_run<T, RUN>(out + vector * D + c * Cut<D>::WIDTH + (at.col / 2) * RUN, run, factor);
      }
    }
  }
