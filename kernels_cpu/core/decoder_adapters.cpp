// What adapters add to the linears of a layer: rows of one adapter are taken together, so that its
// weights are read once a step, and rows of none are not looked at.
#include <algorithm>

#include "core/decoder.h"

namespace localllm {

namespace {

constexpr int kTileRows = 32;  // rows of an adapter that one thread takes at a time

ptrdiff_t rank_stride(int rank) {
  return (rank + kAdapterRanks - 1) / kAdapterRanks * kAdapterRanks;
}

}  // namespace

void Decoder::group_adapters(const Step& step) {
  adapter_rows_.clear();
  row_adapter_.assign(static_cast<size_t>(step.rows), nullptr);
  int widest = 0;
  for (const Chunk& chunk : step.chunks) {
    if (!chunk.adapter) continue;
    auto group = std::find_if(adapter_rows_.begin(), adapter_rows_.end(),
                              [&](const AdapterRows& g) { return g.adapter == chunk.adapter; });
    if (group == adapter_rows_.end())
      group = adapter_rows_.insert(group, AdapterRows{chunk.adapter, {}});
    for (int r = chunk.first_row; r < chunk.first_row + chunk.rows; ++r) {
      group->rows.push_back(r);
      row_adapter_[static_cast<size_t>(r)] = chunk.adapter;
    }
    widest = std::max(widest, chunk.adapter->widest_rank());
  }
  if (adapter_rows_.empty()) return;
  int width = program_.config.hidden, kv = 1, gate = 0, rows = step.rows;
  for (size_t i = 0; i < program_.layers.size(); ++i) {
    const Layer& layer = program_.layers[i];
    const LayerConfig& c = layer.config;
    const bool experts =
        std::any_of(adapter_rows_.begin(), adapter_rows_.end(),
                    [&](const AdapterRows& g) { return g.adapter->has_experts(i); });
    if (experts) rows = std::max(rows, step.rows * c.top_k);
    width = std::max({width, layer.attention.q_width, c.hidden});
    kv = std::max(kv, layer.attention.kv_width);
    if (c.mixer != Mixer::kAttention) width = std::max(width, layer.recurrent.in->rows);
    if (c.mixer == Mixer::kDelta) width = std::max(width, c.heads * c.head_dim);
    if (c.gate) gate = std::max(gate, layer.attention.q_width);
  }
  deltas_[0].reserve(rows, width);
  deltas_[1].reserve(rows, width);
  deltas_[2].reserve(step.rows, kv);
  if (gate > 0) deltas_[3].reserve(step.rows, gate);
  const auto ranks = static_cast<size_t>(rank_stride(widest));
  for (Scratch<uint8_t>& s : thread_scratch_) s.reserve(kTileRows * ranks * sizeof(float));
}

const FloatRows& Decoder::deltas_of(Target target) const {
  switch (target) {
    case Target::kK:
    case Target::kUp:
    case Target::kZ: return deltas_[1];
    case Target::kHeadGate: return deltas_[3];
    case Target::kV: return deltas_[2];
    default: return deltas_[0];
  }
}

void Decoder::add_delta(int layer, Target target, int row, int first, int n, float* y) const {
  if (adapter_rows_.empty()) return;
  const Adapter* adapter = row_adapter_[static_cast<size_t>(row)];
  const AdapterPair* pair = adapter ? adapter->find(static_cast<size_t>(layer), target) : nullptr;
  if (!pair) return;
  k_.add_scaled(deltas_of(target).row(row) + first, n, 1.0f, y);
  if (!pair->gains) return;
  for (int i = 0; i < n; ++i) y[i] *= pair->gains[first + i];
}

void Decoder::add_expert_delta(int layer, int expert, Target target, int slot, int first, int n,
                               float* y) const {
  if (adapter_rows_.empty()) return;
  const Adapter* adapter = slot_adapter_[static_cast<size_t>(slot)];
  if (adapter &&
      adapter->find_in_expert(static_cast<size_t>(layer), static_cast<size_t>(expert), target))
    k_.add_scaled(deltas_of(target).row(slot) + first, n, 1.0f, y);
}

void Decoder::adapt(int layer, const MatmulRows& in, std::initializer_list<Target> targets) {
  std::vector<AdapterItem> items;
  for (const AdapterRows& group : adapter_rows_)
    for (const Target target : targets)
      add_items(group.adapter->find(static_cast<size_t>(layer), target), group.rows.data(),
                static_cast<int>(group.rows.size()), target, &items);
  run_items(in, items);
}

void Decoder::adapt_experts(int layer, const std::vector<int>& experts,
                            const std::vector<int>& slots, const MatmulRows& in,
                            std::initializer_list<Target> targets) {
  if (adapter_rows_.empty()) return;
  std::vector<AdapterItem> items;
  size_t at = 0;
  for (const int e : experts) {
    const size_t end = at + static_cast<size_t>(expert_start_[static_cast<size_t>(e) + 1] -
                                                expert_start_[static_cast<size_t>(e)]);
    while (at < end) {  // runs of slots that have the same adapter
      const Adapter* adapter = slot_adapter_[static_cast<size_t>(slots[at])];
      const size_t first = at;
      while (at < end && slot_adapter_[static_cast<size_t>(slots[at])] == adapter) ++at;
      if (!adapter) continue;
      for (const Target target : targets)
        add_items(
            adapter->find_in_expert(static_cast<size_t>(layer), static_cast<size_t>(e), target),
            slots.data() + first, static_cast<int>(at - first), target, &items);
    }
  }
  run_items(in, items);
}

void Decoder::add_items(const AdapterPair* pair, const int* rows, int count, Target target,
                        std::vector<AdapterItem>* items) const {
  if (!pair) return;
  for (int at = 0; at < count; at += kTileRows)
    items->push_back({pair, rows + at, std::min(kTileRows, count - at), &deltas_of(target)});
}

void Decoder::run_items(const MatmulRows& in, const std::vector<AdapterItem>& items) {
  int64_t work = 0;
  for (const AdapterItem& item : items)
    work += static_cast<int64_t>(item.count) * item.pair->a.rank *
            (item.pair->a.size + item.pair->b.size);
  const int count = static_cast<int>(items.size());
  const int grain = work <= kInlineWork ? count : std::max(1, count / (8 * pool_.size()));
  pool_.parallel(count, grain, [&](int first, int last, int thread) {
    auto* t = reinterpret_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].data());
    for (int i = first; i < last; ++i) {
      const AdapterItem& item = items[static_cast<size_t>(i)];
      const AdapterPair& pair = *item.pair;
      const ptrdiff_t stride = rank_stride(pair.a.rank);
      const float* x[kTileRows];
      float* out[kTileRows];
      for (int r = 0; r < item.count; ++r) {
        x[r] = in.row(item.rows[r]);
        out[r] = item.out->row(item.rows[r]);
      }
      k_.adapter_down(pair.a, pair.scale, x, item.count, t, stride);
      k_.adapter_up(pair.b, t, stride, out, item.count);
    }
  });
}

}  // namespace localllm
