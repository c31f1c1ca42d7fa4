// The splits of paged_decode, merged in their order: one threadgroup a row and head.

constant constexpr float LOG2E = 1.44269504088896340736f;
//: body
  const int heads = sinks_shape[0];
  const int row = threadgroup_position_in_grid.y, head = threadgroup_position_in_grid.x;
  const int length = lengths[row];
  const int count = (length + SPLIT - 1) / SPLIT - max(0, length - window[0]) / SPLIT;
  const int splits = extent[0];
  const size_t vector = size_t(row) * heads + head;
  const size_t pairs = size_t(threadgroups_per_grid.y) * heads * splits * D + vector * splits * 2;

  const float sink = sinks[head] * LOG2E;
  float top = sink;
  for (int s = 0; s < count; s++) top = max(top, partial[pairs + s * 2]);
  for (int d = thread_position_in_threadgroup.x; d < D; d += threads_per_threadgroup.x) {
    float total = fast::exp2(sink - top), sum = 0.0f;
    for (int s = 0; s < count; s++) {
      const float weight = fast::exp2(partial[pairs + s * 2] - top);
      total = fma(weight, partial[pairs + s * 2 + 1], total);
      sum = fma(weight, partial[(vector * splits + s) * D + d], sum);
    }
    out[vector * D + d] = static_cast<T>(sum / total);
  }
