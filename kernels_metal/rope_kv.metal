// QK-norm and RoPE of query and key heads, a simdgroup a head; values need neither.
#include "rope_head.metal"
//: body
  threadgroup float lines[HEADS_A_GROUP * D];
  const int lane = thread_index_in_simdgroup;
  const int q_heads = q_shape[1] / D, k_heads = k_shape[1] / D;
  const int head = thread_position_in_grid.y;
  const size_t row = thread_position_in_grid.z;
  const bool is_query = head < q_heads;
  const size_t at = is_query ? row * q_heads + head : row * k_heads + (head - q_heads);
  const float eps = settings[0], offset = settings[1];

  float values[(D + 31) / 32];
  if (is_query) load_head<D>(q + at * D, values, lane);
  else load_head<D>(k + at * D, values, lane);
  if (Q_NORM && is_query) norm_head<D>(values, q_weight, eps, offset, lane);
  if (K_NORM && !is_query) norm_head<D>(values, k_weight, eps, offset, lane);
  if (DIM > 0) {
    threadgroup float* line = lines + simdgroup_index_in_threadgroup * D;
    rotate_head<D, DIM, INTERLEAVED>(
        values, line, cosines + row * (DIM / 2), sines + row * (DIM / 2), lane);
  }
  if (is_query) store_head<D>(values, q_out + at * D, lane);
  else store_head<D>(values, k_out + at * D, lane);
