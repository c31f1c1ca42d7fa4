// Rows of queries against the KV of their sequences, cut into splits of a fixed number of positions.
// A threadgroup takes one row, or a few of one sequence, one KV head (with up to SHARE of its query
// heads) and one split; its simdgroups take steps of 32 positions in turn and are merged in a fixed order.
// DIRECT: there is but one split, and the result is written at once; otherwise the unnormalized
// outputs [row, head, split, D] and then pairs (top, total) [row, head, split] for
// paged_decode_combine.

#include "paged_attention.metal"

constant constexpr int SIMDGROUPS = 8;
//: body
  constexpr int COLUMNS = HT * 8;
  constexpr int PARTS = (GROUP + SHARE - 1) / SHARE;
  constexpr int MATRICES = Cut<D>::MATRICES;
  constexpr int RUN = Cut<D>::RUN;
  threadgroup vec<T, 2> queries[COLUMNS * D / 2];
  threadgroup float2 merged[COLUMNS * D / 2];
  threadgroup float tops[SIMDGROUPS * COLUMNS], totals[SIMDGROUPS * COLUMNS];
  threadgroup float column_top[COLUMNS], column_total[COLUMNS];

  const int heads = q_shape[1], kv_heads = keys_shape[1];
  const int part = threadgroup_position_in_grid.x % PARTS;
  const int kv_head = threadgroup_position_in_grid.y;
  Group group;
  group.first_row = groups[threadgroup_position_in_grid.x / PARTS * 2];
  group.rows = groups[threadgroup_position_in_grid.x / PARTS * 2 + 1];
  group.first_head = kv_head * GROUP + part * SHARE;
  group.heads = min(SHARE, GROUP - part * SHARE);
  group.all_heads = heads;

  int begin = lengths[group.first_row], end = 0;
  for (int r = 0; r < group.rows; r++) {
    const int length = lengths[group.first_row + r];
    begin = min(begin, max(0, length - window[0]));
    end = max(end, length);
  }
  const int split = begin / SPLIT + int(threadgroup_position_in_grid.z);
  if (split * SPLIT >= end) return;  // the whole threadgroup
  begin = max(begin, split * SPLIT);
  end = min(end, (split + 1) * SPLIT);

  const uint thread_index = thread_index_in_threadgroup;
  const uint lane = thread_index_in_simdgroup;
  const int simdgroup = simdgroup_index_in_threadgroup;
  for (uint i = thread_index; i < COLUMNS * D / 2; i += SIMDGROUPS * 32) {
    const int matrix = i / 32;
    queries[i] = query_pair<T, D, SHARE>(
        q, group, matrix / MATRICES * 8, matrix % MATRICES, i % 32);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  Attention<D, HT> state;
  clear(state);
  const Place at = place_of(lane);
  UNROLL for (int h = 0; h < HT; h++) {
    int2 first = int2(0, 0), last = int2(0, 0);
    UNROLL for (int e = 0; e < 2; e++) {
      const int column = h * 8 + at.col + e;
      if (holds<SHARE>(group, column)) {
        last[e] = lengths[group.first_row + column / SHARE];
        first[e] = max(0, last[e] - window[0]);
      }
    }
    state.first[h] = first;
    state.last[h] = last;
  }
  constexpr int ROUND = SIMDGROUPS * STEP;
  for (int base = begin / ROUND * ROUND + simdgroup * STEP; base < end; base += ROUND) {
    if (base + STEP <= begin) continue;
    attend<T, D, BITS, BLOCK, HT>(
        state, keys, key_scales, key_biases, values, value_scales, value_biases,
        tables + group.first_row * tables_shape[1], queries, kv_head, kv_heads, base, begin, end,
        settings[0], settings[1], lane);
  }

  UNROLL for (int h = 0; h < HT; h++) {
    const float2 total = sum_of_column(state.total[h]);
    if (at.row == 0) {
      const int slot = simdgroup * COLUMNS + h * 8 + at.col;
      tops[slot] = state.top[h].x;
      tops[slot + 1] = state.top[h].y;
      totals[slot] = total.x;
      totals[slot + 1] = total.y;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < COLUMNS) {
    float top = LOWEST, total = 0.0f;
    for (int s = 0; s < SIMDGROUPS; s++) top = max(top, tops[s * COLUMNS + thread_index]);
    for (int s = 0; s < SIMDGROUPS; s++) {
      const int slot = s * COLUMNS + thread_index;
      total = fma(fast::exp2(tops[slot] - top), totals[slot], total);
    }
    column_top[thread_index] = top;
    column_total[thread_index] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Each simdgroup adds every eighth matrix at a time, another eighth than the others.
  for (int turn = 0; turn < SIMDGROUPS; turn++) {
    UNROLL for (int h = 0; h < HT; h++) {
      const int column = h * 8 + at.row;
      const float weight = fast::exp2(tops[simdgroup * COLUMNS + column] - column_top[column]);
      UNROLL for (int m = 0; m < MATRICES; m++) {
        if ((simdgroup + turn) % SIMDGROUPS == m % SIMDGROUPS) {
          const int slot = (h * MATRICES + m) * 32 + lane;
          const float2 sofar = turn == 0 ? float2(0.0f) : merged[slot];
          merged[slot] = fma(float2(weight), state.out[h][m], sofar);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  const int splits = threadgroups_per_grid.z;
  for (uint i = thread_index; i < COLUMNS * D / RUN; i += SIMDGROUPS * 32) {
    const int column = i / (D / RUN), chunk = i % (D / RUN) / 4, quarter = i % 4;
    if (!holds<SHARE>(group, column)) continue;
    float run[RUN];
    UNROLL for (int m = 0; m < RUN / 2; m++) {
      const int matrix = column / 8 * MATRICES + chunk * (RUN / 2) + m;
      const float2 pair = merged[matrix * 32 + lane_of(column % 8, quarter * 2)];
      run[m * 2] = pair.x;
      run[m * 2 + 1] = pair.y;
    }
    const size_t vector = vector_of<SHARE>(group, column);
    const int d = chunk * Cut<D>::WIDTH + quarter * RUN;
    if (DIRECT) {
      const float sink = sinks[group.first_head + column % SHARE] * LOG2E;
      const float top = max(column_top[column], sink);
      const float weight = fast::exp2(column_top[column] - top);
      const float total = fma(weight, column_total[column], fast::exp2(sink - top));
      UNROLL for (int k = 0; k < RUN; k++) run[k] = fma(weight, run[k], 0.0f) / total;
      write_run<OUT, RUN>(out + vector * D + d, run, 1.0f);
    } else {
      const int length = lengths[group.first_row + column / SHARE];
      const int nth = split - max(0, length - window[0]) / SPLIT;  // among the row's own splits
      if (nth < 0 || split * SPLIT >= length) continue;
      const size_t slot = vector * splits + nth;
      write_run<OUT, RUN>(out + slot * D + d, run, 1.0f);
      if (chunk == 0 && quarter == 0) {
        const size_t pairs = size_t(q_shape[0]) * heads * splits * D;
        out[pairs + slot * 2] = static_cast<OUT>(column_top[column]);
        out[pairs + slot * 2 + 1] = static_cast<OUT>(column_total[column]);
      }
    }
  }
