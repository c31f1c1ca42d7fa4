#include "train/workspace.h"

#include <algorithm>

namespace localllm::train {

namespace {

struct Widest {
  int q = 0, kv = 0, ffn = 0, any = 0, heads = 0, dims = 0, rank = 0, panels = 0, norm = 0;
};

Widest widest(const Model& model) {
  Widest w;
  w.any = model.config.hidden;
  for (const TrainedLayer& l : model.layers) {
    w.q = std::max(w.q, l.q_width());
    w.kv = std::max(w.kv, l.kv_width());
    w.ffn = std::max(w.ffn, l.config.hidden);
    w.heads = std::max(w.heads, l.config.heads);
    w.dims = std::max(w.dims, round_up(l.config.head_dim, kBlock));
    w.panels = std::max(w.panels, l.config.heads * round_up(l.config.head_dim, kBlock));
  }
  w.any = std::max({w.any, w.q, w.kv, w.ffn});
  w.norm = std::max({model.config.hidden, w.q, w.kv});
  for (const AdapterPlace& a : model.adapters) w.rank = std::max(w.rank, a.rank);
  return w;
}

}  // namespace

Workspace::Workspace(const Model& model, const Kernels& k, uint8_t* base, int m, int padded,
                     int longest, int threads, bool keeps, bool gradients)
    : keep(keeps) {
  Cutter cut(base);
  const auto size = [](int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); };
  const size_t e = static_cast<size_t>(k.element);
  const Widest w = widest(model);
  const int hidden = model.config.hidden, n = static_cast<int>(model.layers.size());
  const auto elements = [&](int width) {
    return static_cast<void*>(cut.take<uint8_t>(size(m, width) * e));
  };
  const auto floats = [&](int width) { return cut.take<float>(size(m, width)); };
  const auto packed_rows = [&](int width) {
    return static_cast<void*>(cut.take<uint8_t>(k.packed_bytes(m, k.steps(width))));
  };

  // Without gradients two rows of hidden states take turns.
  float* turn[2] = {nullptr, nullptr};
  if (!gradients)
    for (float*& t : turn) t = floats(hidden);
  for (int i = 0; i <= n; ++i)
    x.push_back(gradients && i >= model.lowest ? floats(hidden) : nullptr);
  // Below the lowest adapter nothing is kept either.
  if (gradients && model.lowest > 0) {
    for (float*& t : turn) t = floats(hidden);
  }
  for (int i = 0; i <= n; ++i)
    if (!gradients || i < model.lowest) x[static_cast<size_t>(i)] = turn[i % 2];

  const auto save = [&](const TrainedLayer* l) {
    Saved s;
    const int q = l ? l->q_width() : w.q, kv = l ? l->kv_width() : w.kv;
    const int ffn = l ? l->config.hidden : w.ffn, heads = l ? l->config.heads : w.heads;
    s.q = elements(q);
    s.k = elements(kv);
    s.v = elements(kv);
    s.out = elements(q);
    s.gate = elements(ffn);
    s.up = elements(ffn);
    s.lse = floats(heads);
    s.middle = floats(hidden);
    const bool post = !l || l->config.post_norm.present;
    s.attn_y = post ? floats(hidden) : nullptr;
    s.ffn_y = post ? floats(hidden) : nullptr;
    const Linear* linears[7] = {};
    if (l) {
      const Linear* all[7] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
      std::copy_n(all, 7, linears);
    }
    for (const Linear* linear : linears) {
      int rank = l ? 0 : w.rank;
      if (linear && linear->adapter >= 0)
        rank = model.adapters[static_cast<size_t>(linear->adapter)].rank;
      const size_t bytes = size(round_up(rank, k.tile_rows), k.column_steps(m)) * 4;
      s.inner.push_back(rank > 0 ? cut.take<uint8_t>(bytes) : nullptr);
    }
    return s;
  };
  const Saved shared = save(nullptr);
  for (int i = 0; i < n; ++i)
    saved.push_back(keep && i >= model.lowest ? save(&model.layers[static_cast<size_t>(i)])
                                              : shared);

  for (const TrainedLayer& l : model.layers) {
    const size_t rope = static_cast<size_t>(l.config.rope < 0 ? 0 : l.config.rope);
    if (l.config.rope < 0) continue;
    if (ropes.size() <= rope) ropes.resize(rope + 1, nullptr);
  }
  for (size_t i = 0; i < ropes.size(); ++i) {
    int half = 0;
    for (const TrainedLayer& l : model.layers)
      if (l.config.rope == static_cast<int>(i)) half = l.config.rope_half;
    ropes[i] = floats(2 * half);
  }

  h = elements(hidden);
  qh = elements(w.q);
  kh = elements(w.kv);
  wide = elements(w.ffn);
  dropped = elements(w.any);
  dropped_packed = packed_rows(w.any);
  y = floats(hidden);
  for (void*& p : packed) p = packed_rows(w.any);
  for (void*& p : low) p = cut.take<uint8_t>(k.packed_bytes(m, k.low_steps(std::max(1, w.rank))));
  for (int i = 0; i < 8; ++i)
    if (gradients || i == 2 || i == 5) attention[i] = cut.take<uint8_t>(size(padded, w.panels) * e);
  if (gradients) {
    dx = floats(hidden);
    dh = floats(hidden);
    dwide = floats(w.ffn);
    dq = floats(w.q);
    dk = floats(w.kv);
    dv = floats(w.kv);
    dot = floats(w.heads);
    dy = elements(hidden);
    dgate = elements(w.ffn);
    dup = elements(w.ffn);
    dqe = elements(w.q);
    dke = elements(w.kv);
    dve = elements(w.kv);
    dout = elements(w.q);
    for (void*& p : low_t)
      p = cut.take<uint8_t>(size(round_up(std::max(1, w.rank), k.tile_rows), k.column_steps(m)) *
                            4);
  }

  tile = std::min(round_up(model.config.vocab, kBlock), 32 * kPanel);
  if (gradients && model.whole) {
    for (void*& p : columns) p = cut.take<uint8_t>(k.column_bytes(m, std::max(w.any, tile)));
    for (float*& p : sums) p = cut.take<float>(size(k.row_blocks(m), 2 * w.norm));
  }

  // Of a thread: a panel with its adapter's steps, or a unit of attention.
  const size_t panel = size(std::max({k.steps(w.any), k.steps(tile), k.column_steps(m) + 1}) +
                                k.low_steps(std::max(1, w.rank)),
                            kPanel) *
                       4;
  const size_t length = static_cast<size_t>(round_up(longest, kPanel));
  const size_t attention_bytes =
      kPanel * (length * (8 + 2 * e) + static_cast<size_t>(w.dims) * (8 + 2 * e)) + 1024;
  const size_t heads_bytes = size(2, std::max(w.q, w.kv) + 16) * 4;
  for (int i = 0; i < threads; ++i)
    scratch.push_back(cut.take<uint8_t>(std::max({panel, attention_bytes, heads_bytes}) + 256));

  hx = floats(hidden);
  he = elements(hidden);
  head_packed = packed_rows(hidden);
  logits = floats(tile);
  for (float** p : {&top, &sum, &target, &slope, &row_weights}) *p = floats(1);
  rows = cut.take<int32_t>(static_cast<size_t>(m));
  targets = cut.take<int32_t>(static_cast<size_t>(m));
  if (gradients) {
    dhidden = floats(hidden);
    probabilities = elements(tile);
    p_packed = packed_rows(tile);
  }
  bytes = cut.used();
}

}  // namespace localllm::train
