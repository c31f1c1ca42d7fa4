// A layer forward and back: norms, linears, attention, activation.
#include "train/trainer_parts.h"

namespace localllm::train {

void Trainer::attention(const Group& g, Workspace& w, int layer, bool backward) {
  const TrainedLayer& l = model_->layers[static_cast<size_t>(layer)];
  const Saved& s = w.saved[static_cast<size_t>(layer)];
  const LayerConfig& c = l.config;
  AttentionData a;
  a.spec = {c.heads, c.kv_heads, c.head_dim, c.scale, c.softcap, c.window};
  a.rows = g.rows;
  a.padded = g.padded;
  a.q = w.qh;
  a.k = w.kh;
  a.v = s.v;
  a.dout = w.dout;
  a.out = s.out;
  a.dq = w.dq;
  a.dk = w.dk;
  a.dv = w.dv;
  void** panels[8] = {&a.q_lanes, &a.q_sums, &a.k_lanes, &a.k_sums,
                      &a.v_lanes, &a.v_sums, &a.d_lanes, &a.d_sums};
  for (int i = 0; i < 8; ++i) *panels[i] = w.attention[i];
  a.lse = s.lse;
  a.dot = w.dot;
  const int sequences = static_cast<int>(g.sequences.size());
  pool_.parallel(sequences * c.heads, 1, [&](int first, int last, int) {
    for (int t = first; t < last; ++t)
      k_.attend_pack(a, g.sequences[static_cast<size_t>(t / c.heads)], t % c.heads, backward);
  });
  // One unit: a run of a head's rows. The last rows see most, and go first.
  std::vector<std::pair<int, int>> units;  // sequence, row
  for (int i = 0; i < sequences; ++i)
    for (int row = 0; row < g.sequences[static_cast<size_t>(i)].length; row += k_.query_rows)
      units.push_back({i, row});
  std::reverse(units.begin(), units.end());
  const int n = static_cast<int>(units.size());
  const auto over = [&](int heads, auto function, int from, int first, int last, int thread) {
    for (int t = first; t < last; ++t) {
      const auto [i, row] = units[static_cast<size_t>((t - from) / heads)];
      function(a, g.sequences[static_cast<size_t>(i)], (t - from) % heads, row,
               w.scratch[static_cast<size_t>(thread)]);
    }
  };
  if (!backward) {
    pool_.parallel(n * c.heads, 1, [&](int first, int last, int thread) {
      over(c.heads, k_.attend, 0, first, last, thread);
    });
    return;
  }
  const int keys = n * c.kv_heads;
  pool_.parallel(keys + n * c.heads, 1, [&](int first, int last, int thread) {
    over(c.kv_heads, k_.attend_back_kv, 0, std::min(first, keys), std::min(last, keys), thread);
    over(c.heads, k_.attend_back_q, keys, std::max(first, keys), std::max(last, keys), thread);
  });
}

namespace {

Heads heads_of(const TrainedLayer& l, bool query, const Workspace& w) {
  Heads h;
  h.heads = query ? l.config.heads : l.config.kv_heads;
  h.head_dim = l.config.head_dim;
  h.norm = query ? l.q_norm : l.k_norm;
  h.norm_all = l.config.qk_norm_all;
  if (l.config.rope >= 0) {
    h.table = w.ropes[static_cast<size_t>(l.config.rope)];
    h.half = l.config.rope_half;
  }
  h.interleaved = l.interleaved;
  return h;
}

}  // namespace

// From gradients at rotated queries or keys to those at what the linear gave.
void Trainer::heads_back(const TrainedLayer& l, bool query, const Workspace& w, const void* x,
                         const float* dy, int row0, int row1, void* dx, float* scratch,
                         float* sums) {
  const Heads h = heads_of(l, query, w);
  const Norm& norm = query ? l.q_norm : l.k_norm;
  const int width = h.heads * h.head_dim;
  if (norm.at < 0) {
    k_.heads_back(h, x, width, dy, row0, row1, dx, scratch, {});
    return;
  }
  for (int r = row0; r < row1; r += k_.tile_rows)
    k_.heads_back(h, x, width, dy, r, std::min(r + k_.tile_rows, row1), dx, scratch,
                  cleared_sums(norm, r / k_.tile_rows, sums));
}

// x[layer] to x[layer + 1], leaving the saved values; without `output` the last product is spared.
void Trainer::layer_forward(const Group& g, Workspace& w, int layer, bool output) {
  const size_t at = static_cast<size_t>(layer);
  const TrainedLayer& l = model_->layers[at];
  const Saved& s = w.saved[at];
  const int m = g.rows, hidden = model_->config.hidden;
  const float *x = w.x[at], scale = l.config.residual_scale;

  const auto into_h = [&](const NormSpec& norm, const float* from) {
    return [this, &w, &norm, from, hidden](int row0, int row1, int) {
      if (norm.weight)
        k_.norm(norm, from, row0, row1, w.h, hidden);
      else
        k_.to_elements(from, 1.0f, hidden, hidden, row0, row1, w.h, hidden);
    };
  };
  const auto plain = [](int, int, int) {};
  project(g, w, w.h, {{&l.q, s.inner[0], s.q}, {&l.k, s.inner[1], s.k}, {&l.v, s.inner[2], s.v}},
          into_h(l.attn_norm, x));
  rows(m, [&](int row0, int row1, int, int, int thread) {
    float* scratch = reinterpret_cast<float*>(w.scratch[static_cast<size_t>(thread)]);
    k_.heads(heads_of(l, true, w), s.q, l.q_width(), row0, row1, w.qh, scratch);
    k_.heads(heads_of(l, false, w), s.k, l.kv_width(), row0, row1, w.kh, scratch);
  });
  attention(g, w, layer, false);

  const bool post = l.attn_post_norm.weight != nullptr;
  project(g, w, s.out,
          {post ? Use{&l.o, s.inner[3], s.attn_y, false}
                : Use{&l.o, s.inner[3], s.middle, false, scale, x}},
          plain);
  if (post)
    rows(m, [&](int row0, int row1, int, int, int) {
      k_.norm_add(l.attn_post_norm, s.attn_y, scale, x, row0, row1, s.middle);
    });

  std::vector<Use> wide;
  if (l.config.gated) wide.push_back({&l.gate, s.inner[4], s.gate});
  wide.push_back({&l.up, s.inner[5], s.up});
  project(g, w, w.h, wide, into_h(l.ffn_norm, s.middle));
  const int ffn = l.config.hidden;
  const void* gate = l.config.gated ? s.gate : nullptr;
  const auto activated = [&](int row0, int row1, int) {
    k_.activate(l.config.activation, gate, s.up, ffn, ffn, row0, row1, w.wide);
  };
  const bool ffn_post = l.ffn_post_norm.weight != nullptr;
  if (!output && !ffn_post) {
    // Of the last linear only its adapter's inner values are needed.
    if (l.down.adapter < 0) return;
    const AdapterPlace& a = model_->adapters[static_cast<size_t>(l.down.adapter)];
    rows(m, [&](int row0, int row1, int block0, int block1, int thread) {
      activated(row0, row1, thread);
      const Dropout d = dropout(g, l.down.adapter);
      if (d.threshold) k_.drop(w.wide, ffn, ffn, row0, row1, d, w.dropped);
      k_.pack_rows(d.threshold ? w.dropped : w.wide, ffn, m, ffn, block0, block1, w.packed[0]);
      k_.low_rank({w.packed[0], k_.steps(ffn), a_panels_[static_cast<size_t>(l.down.adapter)],
                   a.rank, m, w.low[0], s.inner[6]},
                  block0, block1);
    });
    return;
  }
  project(g, w, w.wide,
          {ffn_post ? Use{&l.down, s.inner[6], s.ffn_y, false}
                    : Use{&l.down, s.inner[6], w.x[at + 1], false, scale, s.middle}},
          activated);
  if (ffn_post && output)
    rows(m, [&](int row0, int row1, int, int, int) {
      k_.norm_add(l.ffn_post_norm, s.ffn_y, scale, s.middle, row0, row1, w.x[at + 1]);
    });
}

// w.dx: from the gradient at x[layer + 1] to that at x[layer].
void Trainer::layer_backward(const Group& g, Workspace& w, int layer, float* gradient) {
  const size_t at = static_cast<size_t>(layer);
  const TrainedLayer& l = model_->layers[at];
  const Saved& s = w.saved[at];
  const int m = g.rows, hidden = model_->config.hidden, ffn = l.config.hidden;
  const float *x = w.x[at], scale = l.config.residual_scale;
  if (!w.keep) layer_forward(g, w, layer, false);

  // The gradient at a sublayer's last linear, as elements.
  const auto sublayer = [&](const Norm& post, const float* y, int row0, int row1) {
    if (post.weight) {
      norm_back(post, y, w.dx, scale, false, row0, row1, w.y, w.sums[1]);
      k_.to_elements(w.y, 1.0f, hidden, hidden, row0, row1, w.dy, hidden);
    } else {
      k_.to_elements(w.dx, scale, hidden, hidden, row0, row1, w.dy, hidden);
    }
  };
  const auto normed = [&](const NormSpec& norm, const float* from, int row0, int row1) {
    if (norm.weight)
      k_.norm(norm, from, row0, row1, w.h, hidden);
    else
      k_.to_elements(from, 1.0f, hidden, hidden, row0, row1, w.h, hidden);
  };
  const auto into_dx = [&](const Norm& norm, const float* from, int row0, int row1) {
    if (norm.weight) {
      norm_back(norm, from, w.dh, 1.0f, true, row0, row1, w.dx, w.sums[0]);
      return;
    }
    for (ptrdiff_t i = static_cast<ptrdiff_t>(row0) * hidden;
         i < static_cast<ptrdiff_t>(row1) * hidden; ++i)
      w.dx[i] += w.dh[i];
  };

  const void* gate = l.config.gated ? s.gate : nullptr;
  rows(m, [&](int row0, int row1, int, int, int) {
    sublayer(l.ffn_post_norm, s.ffn_y, row0, row1);
    k_.activate(l.config.activation, gate, s.up, ffn, ffn, row0, row1, w.wide);
    normed(l.ffn_norm, s.middle, row0, row1);
  });
  add_sums(l.ffn_post_norm, m, w.sums[1], gradient);
  back(g, w, w.wide, {{&l.down, s.inner[6], w.dy}}, w.dwide, false, nullptr, gradient);
  rows(m, [&](int row0, int row1, int, int, int) {
    k_.activate_back(l.config.activation, gate, s.up, w.dwide, ffn, ffn, row0, row1, w.dgate,
                     w.dup);
  });
  std::vector<Use> wide;
  if (l.config.gated) wide.push_back({&l.gate, s.inner[4], w.dgate});
  wide.push_back({&l.up, s.inner[5], w.dup});
  back(g, w, w.h, wide, w.dh, false, nullptr, gradient);

  rows(m, [&](int row0, int row1, int, int, int thread) {
    into_dx(l.ffn_norm, s.middle, row0, row1);
    sublayer(l.attn_post_norm, s.attn_y, row0, row1);
    normed(l.attn_norm, x, row0, row1);
    float* scratch = reinterpret_cast<float*>(w.scratch[static_cast<size_t>(thread)]);
    k_.heads(heads_of(l, true, w), s.q, l.q_width(), row0, row1, w.qh, scratch);
    k_.heads(heads_of(l, false, w), s.k, l.kv_width(), row0, row1, w.kh, scratch);
  });
  add_sums(l.ffn_norm, m, w.sums[0], gradient);
  add_sums(l.attn_post_norm, m, w.sums[1], gradient);
  back(g, w, s.out, {{&l.o, s.inner[3], w.dy}}, w.dq, true, w.dout, gradient);
  attention(g, w, layer, true);
  rows(m, [&](int row0, int row1, int, int, int thread) {
    float* scratch = reinterpret_cast<float*>(w.scratch[static_cast<size_t>(thread)]);
    heads_back(l, true, w, s.q, w.dq, row0, row1, w.dqe, scratch, w.sums[0]);
    heads_back(l, false, w, s.k, w.dk, row0, row1, w.dke, scratch, w.sums[1]);
    k_.to_elements(w.dv, 1.0f, l.kv_width(), l.kv_width(), row0, row1, w.dve, l.kv_width());
  });
  add_sums(l.q_norm, m, w.sums[0], gradient);
  add_sums(l.k_norm, m, w.sums[1], gradient);
  const bool last = layer == model_->lowest && !model_->whole;
  back(g, w, w.h, {{&l.q, s.inner[0], w.dqe}, {&l.k, s.inner[1], w.dke}, {&l.v, s.inner[2], w.dve}},
       last ? nullptr : w.dh, false, nullptr, gradient);
  if (last) return;
  rows(m, [&](int row0, int row1, int, int, int) { into_dx(l.attn_norm, x, row0, row1); });
  add_sums(l.attn_norm, m, w.sums[0], gradient);
}

}  // namespace localllm::train
