#include "train/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace localllm::train {

namespace {

uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

uint32_t target_seed(uint64_t seed, uint32_t target) {
  return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) ^ target));
}

constexpr int kRecomputedRows = 512;  // of a group that keeps nothing
constexpr int kFewestKept = 192;  // rows that keeping must at least allow: fewer unpack too often

}  // namespace

struct Trainer::Group {
  int first = 0, rows = 0, padded = 0, longest = 0;
  bool keep = false;
  std::vector<Sequence> sequences;  // `first` within the group
  uint32_t first_row = 0;           // of the step
  uint64_t seed = 0;
  double dropout = 0.0;
};

// A linear as used on rows: where its result goes, or where its gradient comes from.
struct Trainer::Use {
  const Linear* linear = nullptr;
  void* inner = nullptr;  // u^T of the saved values
  void* out = nullptr;    // forward: results; backward: the gradient at them, elements
  bool out_elements = true;
  float alpha = 1.0f;
  const float* add = nullptr;
};

Trainer::Trainer(std::unique_ptr<Model> model, const Kernels& kernels, int threads,
                 size_t keep_bytes)
    : model_(std::move(model)), k_(kernels), pool_(threads), keep_bytes_(keep_bytes) {}

size_t Trainer::kept_row_bytes() const {
  const Workspace with(*model_, k_, nullptr, 960, 960, 1, 1, true, true);
  const Workspace without(*model_, k_, nullptr, 960, 960, 1, 1, false, true);
  return (with.bytes - without.bytes) / 960 + 1;
}

bool Trainer::keeps(int rows) const {
  const size_t most = keep_bytes_ / kept_row_bytes();
  return most >= kFewestKept && static_cast<size_t>(rows) <= most;
}

int Trainer::group_rows() const {
  const size_t most = keep_bytes_ / kept_row_bytes();
  if (most < kFewestKept) return kRecomputedRows;
  return static_cast<int>(std::min<size_t>(most, kRecomputedRows));
}

std::vector<Trainer::Group> Trainer::groups(const Batch& batch) const {
  std::vector<Group> all;
  const int most = group_rows();
  for (int i = 0; i < batch.sequences; ++i) {
    const int at = batch.offsets[i], length = batch.offsets[i + 1] - at;
    if (length == 0) continue;
    if (all.empty() || all.back().rows + length > most) {
      all.emplace_back();
      all.back().first = at;
      all.back().first_row = batch.first_row + static_cast<uint32_t>(at);
      all.back().seed = batch.seed;
      all.back().dropout = batch.dropout;
    }
    Group& g = all.back();
    g.sequences.push_back({g.rows, length, g.padded});
    g.rows += length;
    g.padded += round_up(length, kPanel);
    g.longest = std::max(g.longest, length);
  }
  for (Group& g : all) g.keep = keeps(g.rows);
  return all;
}

size_t Trainer::group_bytes(const Group& g, bool gradients) const {
  return Workspace(*model_, k_, nullptr, g.rows, g.padded, g.longest, pool_.size(),
                   g.keep && gradients, gradients)
      .bytes;
}

size_t Trainer::prepared_bytes() const {
  size_t bytes = 0;
  for (size_t i = 0; i < model_->adapters.size(); ++i) {
    const Linear& l = *model_->adapted[i];
    const size_t rank = static_cast<size_t>(round_up(model_->adapters[i].rank, 16));
    bytes += rank * static_cast<size_t>(k_.steps(l.in) + k_.steps(l.out)) * 4;
  }
  return bytes;
}

size_t Trainer::working_bytes(const std::vector<int>& lengths) const {
  std::vector<int32_t> offsets{0};
  for (const int n : lengths) offsets.push_back(offsets.back() + n);
  Batch batch;
  batch.offsets = offsets.data();
  batch.sequences = static_cast<int>(lengths.size());
  size_t most = 0;
  for (const Group& g : groups(batch)) most = std::max(most, group_bytes(g, true));
  return most + prepared_bytes();
}

// Both factors of every adapter as panels, for this call's parameters.
void Trainer::prepare(const float* parameters) {
  parameters_ = parameters;
  a_panels_.clear();
  b_panels_.clear();
  if (!parameters) return;
  uint8_t* at = prepared_.reserve(prepared_bytes());
  const int n = static_cast<int>(model_->adapters.size());
  for (int i = 0; i < n; ++i) {
    const Linear& l = *model_->adapted[static_cast<size_t>(i)];
    const size_t rank =
        static_cast<size_t>(round_up(model_->adapters[static_cast<size_t>(i)].rank, 16));
    a_panels_.push_back(at);
    at += rank * static_cast<size_t>(k_.steps(l.in)) * 4;
    b_panels_.push_back(at);
    at += rank * static_cast<size_t>(k_.steps(l.out)) * 4;
  }
  pool_.parallel(n, 1, [&](int first, int last, int) {
    for (int i = first; i < last; ++i) {
      const AdapterPlace& a = model_->adapters[static_cast<size_t>(i)];
      const Linear& l = *model_->adapted[static_cast<size_t>(i)];
      k_.factor_panel(parameters + a.a, a.rank, l.in, l.in, 1, 1.0f,
                      const_cast<void*>(a_panels_[static_cast<size_t>(i)]));
      k_.factor_panel(parameters + a.b, a.rank, l.out, 1, a.rank, a.scale,
                      const_cast<void*>(b_panels_[static_cast<size_t>(i)]));
    }
  });
}

Dropout Trainer::dropout(const Group& g, int adapter) const {
  Dropout d;
  if (g.dropout <= 0.0) return d;
  d.seed = target_seed(g.seed, static_cast<uint32_t>(adapter));
  d.threshold = static_cast<uint32_t>(std::min(std::ceil(g.dropout * 4294967296.0), 4294967295.0));
  d.first_row = g.first_row;
  d.scale = static_cast<float>(1.0 / (1.0 - g.dropout));
  return d;
}

template <class F>
void Trainer::rows(int m, const F& f) {
  pool_.parallel(k_.row_blocks(m), 1, [&](int first, int last, int thread) {
    f(first * k_.tile_rows, std::min(m, last * k_.tile_rows), first, last, thread);
  });
}

// Results of linears on the same rows x, which `prepare_rows` writes just before they are packed.
template <class Rows>
void Trainer::project(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
                      const Rows& prepare_rows) {
  const int m = g.rows, in = uses[0].linear->in, row_blocks = k_.row_blocks(m);
  rows(m, [&](int row0, int row1, int block0, int block1, int thread) {
    prepare_rows(row0, row1, thread);
    k_.pack_rows(x, in, m, in, block0, block1, w.packed[0]);
    for (size_t i = 0; i < uses.size(); ++i) {
      const int adapter = uses[i].linear->adapter;
      if (adapter < 0 || !parameters_) continue;
      const void* input = w.packed[0];
      const Dropout d = dropout(g, adapter);
      if (d.threshold) {
        k_.drop(x, in, in, row0, row1, d, w.dropped);
        k_.pack_rows(w.dropped, in, m, in, block0, block1, w.dropped_packed);
        input = w.dropped_packed;
      }
      k_.low_rank({input, k_.steps(in), a_panels_[static_cast<size_t>(adapter)],
                   model_->adapters[static_cast<size_t>(adapter)].rank, m, w.low[i], uses[i].inner},
                  block0, block1);
    }
  });
  std::vector<Product> jobs;
  std::vector<int> ends;
  for (size_t i = 0; i < uses.size(); ++i) {
    const Use& u = uses[i];
    Product p;
    p.rows = w.packed[0];
    p.steps = k_.steps(in);
    p.weight = u.linear->weight;
    p.m = m;
    p.columns = p.ld = u.linear->out;
    p.bias = u.linear->bias;
    p.alpha = u.alpha;
    p.add = u.add;
    p.out = u.out;
    p.out_elements = u.out_elements;
    if (u.linear->adapter >= 0 && parameters_) {
      const AdapterPlace& a = model_->adapters[static_cast<size_t>(u.linear->adapter)];
      p.low = w.low[i];
      p.low_steps = k_.low_steps(a.rank);
      p.rank = a.rank;
      p.factor = parameters_ + a.b;
      p.factor_r = 1;
      p.factor_c = a.rank;
      p.factor_scale = a.scale;
    }
    jobs.push_back(p);
    ends.push_back((ends.empty() ? 0 : ends.back()) + panels(p.columns));
  }
  pool_.parallel(ends.back(), 1, [&](int first, int last, int thread) {
    for (int t = first; t < last; ++t) {
      size_t j = 0;
      while (t >= ends[j]) ++j;
      const int before = j ? ends[j - 1] : 0;
      k_.product(jobs[j], t - before, 0, row_blocks, w.scratch[static_cast<size_t>(thread)]);
    }
  });
}

// From gradients at the results of linears on x (`Use::out`, elements): the adapters' gradients,
// and the gradient at x into `dx` or as elements into `out` (neither: not wanted).
void Trainer::back(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
                   float* dx, bool dx_elements, void* out, float* gradient) {
  const int m = g.rows, in = uses[0].linear->in, row_blocks = k_.row_blocks(m);
  const bool wanted = dx || out;
  rows(m, [&](int, int, int block0, int block1, int) {
    for (size_t i = 0; i < uses.size(); ++i) {
      const Linear& l = *uses[i].linear;
      if (!wanted && l.adapter < 0) continue;
      k_.pack_rows(uses[i].out, l.out, m, l.out, block0, block1, w.packed[i]);
      if (l.adapter < 0) continue;
      k_.low_rank({w.packed[i], k_.steps(l.out), b_panels_[static_cast<size_t>(l.adapter)],
                   model_->adapters[static_cast<size_t>(l.adapter)].rank, m, w.low[i], w.low_t[i]},
                  block0, block1);
    }
  });

  std::vector<Product> chain;  // in this order on each panel
  std::vector<Gradient> gradients;
  const auto add_to_dx = [&](Product p) {
    p.m = m;
    p.columns = p.ld = in;
    p.add = chain.empty() ? nullptr : dx;
    p.out = dx;
    chain.push_back(p);
  };
  for (size_t i = 0; i < uses.size() && wanted; ++i) {
    const Linear& l = *uses[i].linear;
    Product p;
    p.rows = w.packed[i];
    p.steps = k_.steps(l.out);
    p.weight = l.weight;
    p.backward = true;
    p.count = l.out;
    Product low;
    if (l.adapter >= 0) {
      const AdapterPlace& a = model_->adapters[static_cast<size_t>(l.adapter)];
      low.low = w.low[i];
      low.low_steps = k_.low_steps(a.rank);
      low.rank = a.rank;
      low.factor = parameters_ + a.a;
      low.factor_r = in;
      low.factor_c = 1;
      low.dropout = dropout(g, l.adapter);
    }
    if (low.dropout.threshold) {
      add_to_dx(p);
      add_to_dx(low);
      continue;
    }
    p.low = low.low;
    p.low_steps = low.low_steps;
    p.rank = low.rank;
    p.factor = low.factor;
    p.factor_r = low.factor_r;
    p.factor_c = low.factor_c;
    add_to_dx(p);
  }
  if (!chain.empty() && dx_elements) {
    chain.back().out = out;
    chain.back().out_elements = true;
  }
  const bool dropping = g.dropout > 0.0;
  const auto input_gradient = [&](const Use& u, const void* from, size_t i) {
    const AdapterPlace& a = model_->adapters[static_cast<size_t>(u.linear->adapter)];
    Gradient j;
    j.transposed = w.low_t[i];
    j.rank = a.rank;
    j.m = m;
    j.x = from;
    j.ld = j.columns = in;
    j.out = gradient + a.a;
    j.out_r = in;
    j.out_c = 1;
    return j;
  };
  for (size_t i = 0; i < uses.size(); ++i) {
    const Linear& l = *uses[i].linear;
    if (l.adapter < 0) continue;
    const AdapterPlace& a = model_->adapters[static_cast<size_t>(l.adapter)];
    Gradient j;
    j.transposed = uses[i].inner;
    j.rank = a.rank;
    j.m = m;
    j.x = uses[i].out;
    j.ld = j.columns = l.out;
    j.scale = a.scale;
    j.out = gradient + a.b;
    j.out_r = 1;
    j.out_c = a.rank;
    gradients.push_back(j);
    if (!dropping) gradients.push_back(input_gradient(uses[i], x, i));
  }
  const int dx_tasks = chain.empty() ? 0 : panels(in);
  std::vector<int> ends;
  int tasks = dx_tasks;
  for (const Gradient& j : gradients) ends.push_back(tasks += panels(j.columns));
  pool_.parallel(tasks, 1, [&](int first, int last, int thread) {
    void* scratch = w.scratch[static_cast<size_t>(thread)];
    for (int t = first; t < last; ++t) {
      if (t < dx_tasks) {
        for (const Product& p : chain) k_.product(p, t, 0, row_blocks, scratch);
        continue;
      }
      size_t j = 0;
      while (t >= ends[j]) ++j;
      k_.gradient(gradients[j], t - (j ? ends[j - 1] : dx_tasks), scratch);
    }
  });
  // With dropout each adapter has an input of its own.
  for (size_t i = 0; i < uses.size() && dropping; ++i) {
    const int adapter = uses[i].linear->adapter;
    if (adapter < 0) continue;
    rows(m, [&](int row0, int row1, int, int, int) {
      k_.drop(x, in, in, row0, row1, dropout(g, adapter), w.dropped);
    });
    const Gradient j = input_gradient(uses[i], w.dropped, i);
    pool_.parallel(panels(in), 1, [&](int first, int last, int thread) {
      for (int t = first; t < last; ++t) k_.gradient(j, t, w.scratch[static_cast<size_t>(thread)]);
    });
  }
}

Workspace Trainer::begin(const Batch& batch, const Group& g, bool gradients) {
  const size_t bytes = group_bytes(g, gradients);
  Workspace w(*model_, k_, memory_.reserve(bytes), g.rows, g.padded, g.longest, pool_.size(),
              g.keep && gradients, gradients);
  rows(g.rows, [&](int row0, int row1, int, int, int) {
    for (const TrainedLayer& l : model_->layers) {
      if (l.config.rope < 0) continue;
      const Rope& rope = batch.ropes[static_cast<size_t>(l.config.rope)];
      const ptrdiff_t width = 2 * l.config.rope_half;
      for (int r = row0; r < row1; ++r)
        std::copy_n(rope.table + rope.index[g.first + r] * width, width,
                    w.ropes[static_cast<size_t>(l.config.rope)] + r * width);
    }
  });
  embed(batch, g, w);
  return w;
}

void Trainer::embed(const Batch& batch, const Group& g, Workspace& w) {
  const int hidden = model_->config.hidden;
  const int sequences = static_cast<int>(g.sequences.size());
  const uint32_t seed = target_seed(batch.seed, 0xFFFFFFFFu);
  for (int s = 0; s < sequences; ++s) {
    const Sequence& q = g.sequences[static_cast<size_t>(s)];
    const double noise =
        batch.neftune / std::sqrt(static_cast<double>(q.length) * static_cast<double>(hidden));
    pool_.parallel(q.length, 16, [&](int first, int last, int) {
      std::vector<float> position(static_cast<size_t>(model_->positions ? hidden : 0));
      for (int p = first; p < last; ++p) {
        const int row = q.first + p;
        float* x = w.x[0] + static_cast<ptrdiff_t>(row) * hidden;
        k_.weight_row(*model_->embed, batch.tokens[g.first + row], x);
        for (int i = 0; i < hidden; ++i) x[i] *= model_->config.embed_scale;
        if (batch.neftune > 0.0) {
          const uint32_t of_row = mix(seed + (g.first_row + static_cast<uint32_t>(row)));
          for (int i = 0; i < hidden; ++i) {
            const uint32_t hash = mix(of_row + static_cast<uint32_t>(i) * 0x9E3779B9u);
            x[i] += static_cast<float>((static_cast<double>(hash) / 2147483648.0 - 1.0) * noise);
          }
        }
        if (model_->positions) {
          k_.weight_row(*model_->positions, p, position.data());
          for (int i = 0; i < hidden; ++i) x[i] += position[static_cast<size_t>(i)];
        }
      }
    });
  }
}

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
  const auto sublayer = [&](const NormSpec& post, const float* y, int row0, int row1) {
    if (post.weight) {
      k_.norm_back(post, y, w.dx, scale, false, row0, row1, w.y);
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
  const auto into_dx = [&](const NormSpec& norm, const float* from, int row0, int row1) {
    if (norm.weight) {
      k_.norm_back(norm, from, w.dh, 1.0f, true, row0, row1, w.dx);
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
  back(g, w, s.out, {{&l.o, s.inner[3], w.dy}}, w.dq, true, w.dout, gradient);
  attention(g, w, layer, true);
  rows(m, [&](int row0, int row1, int, int, int thread) {
    float* scratch = reinterpret_cast<float*>(w.scratch[static_cast<size_t>(thread)]);
    k_.heads_back(heads_of(l, true, w), s.q, l.q_width(), w.dq, row0, row1, w.dqe, scratch);
    k_.heads_back(heads_of(l, false, w), s.k, l.kv_width(), w.dk, row0, row1, w.dke, scratch);
    k_.to_elements(w.dv, 1.0f, l.kv_width(), l.kv_width(), row0, row1, w.dve, l.kv_width());
  });
  const bool last = layer == model_->lowest;
  back(g, w, w.h, {{&l.q, s.inner[0], w.dqe}, {&l.k, s.inner[1], w.dke}, {&l.v, s.inner[2], w.dve}},
       last ? nullptr : w.dh, false, nullptr, gradient);
  if (!last)
    rows(m, [&](int row0, int row1, int, int, int) { into_dx(l.attn_norm, x, row0, row1); });
}

// Over the vocabulary tile by tile, in one pass: the softmax's sum and its product with the head
// are kept relative to the largest logit so far.
double Trainer::head(const Batch& batch, const Group& g, Workspace& w, const float* weights,
                     float* log_probs) {
  const ModelConfig& c = model_->config;
  const int hidden = c.hidden;
  const float* x = w.x.back();
  int m = 0;
  for (int r = 0; r < g.rows; ++r) {
    if (weights && weights[g.first + r] == 0.0f) continue;
    w.rows[m] = r;
    w.targets[m] = batch.targets[g.first + r];
    w.row_weights[m++] = weights ? weights[g.first + r] : 0.0f;
  }
  if (weights) std::fill_n(w.dx, static_cast<size_t>(g.rows) * static_cast<size_t>(hidden), 0.0f);
  if (m == 0) return 0.0;
  rows(m, [&](int row0, int row1, int block0, int block1, int) {
    for (int r = row0; r < row1; ++r) {
      std::copy_n(x + static_cast<ptrdiff_t>(w.rows[r]) * hidden, hidden,
                  w.hx + static_cast<ptrdiff_t>(r) * hidden);
      w.top[r] = -3.0e38f;
      w.sum[r] = w.target[r] = w.slope[r] = 0.0f;
      if (weights) std::fill_n(w.dhidden + static_cast<ptrdiff_t>(r) * hidden, hidden, 0.0f);
    }
    k_.norm(model_->final_norm, w.hx, row0, row1, w.he, hidden);
    k_.pack_rows(w.he, hidden, m, hidden, block0, block1, w.head_packed);
  });
  const int row_blocks = k_.row_blocks(m);
  for (int v0 = 0; v0 < c.vocab; v0 += w.tile) {
    const int width = std::min(w.tile, c.vocab - v0);
    Product p;
    p.rows = w.head_packed;
    p.steps = k_.steps(hidden);
    p.weight = model_->head;
    p.m = m;
    p.columns = v0 + width;
    p.column0 = v0;
    p.bias = model_->head_bias;
    p.out = w.logits;
    p.ld = w.tile;
    pool_.parallel(panels(width), 1, [&](int first, int last, int thread) {
      for (int t = first; t < last; ++t)
        k_.product(p, v0 / kPanel + t, 0, row_blocks, w.scratch[static_cast<size_t>(thread)]);
    });
    HeadTile t;
    t.logits = w.logits;
    t.m = m;
    t.width = width;
    t.ld = w.tile;
    t.column0 = v0;
    t.targets = w.targets;
    t.scale = c.logit_scale;
    t.softcap = c.logit_softcap;
    t.top = w.top;
    t.sum = w.sum;
    t.target = w.target;
    t.target_slope = w.slope;
    t.probabilities = weights ? w.probabilities : nullptr;
    t.dhidden = weights ? w.dhidden : nullptr;
    t.hidden = hidden;
    rows(m, [&](int row0, int row1, int block0, int block1, int) {
      k_.head_tile(t, row0, row1);
      if (weights) k_.pack_rows(w.probabilities, w.tile, m, width, block0, block1, w.p_packed);
    });
    if (!weights) continue;
    Product d;
    d.rows = w.p_packed;
    d.steps = k_.steps(width);
    d.weight = model_->head;
    d.backward = true;
    d.first = v0;
    d.count = width;
    d.m = m;
    d.columns = d.ld = hidden;
    d.add = w.dhidden;
    d.out = w.dhidden;
    pool_.parallel(panels(hidden), 1, [&](int first, int last, int thread) {
      for (int i = first; i < last; ++i)
        k_.product(d, i, 0, row_blocks, w.scratch[static_cast<size_t>(thread)]);
    });
  }
  double loss = 0.0;
  for (int r = 0; r < m; ++r) {
    const float value = w.target[r] - w.top[r] - std::log(w.sum[r]);
    if (log_probs) log_probs[g.first + w.rows[r]] = value;
    loss -= static_cast<double>(w.row_weights[r]) * static_cast<double>(value);
  }
  if (!weights) return loss;
  // d loss / d hidden = weight * (sum of p E / sum of p - E[target]).
  pool_.parallel(m, 16, [&](int first, int last, int) {
    std::vector<float> row(static_cast<size_t>(hidden));
    for (int r = first; r < last; ++r) {
      k_.weight_row(*model_->head, w.targets[r], row.data());
      float* d = w.dhidden + static_cast<ptrdiff_t>(r) * hidden;
      const float inverse = 1.0f / w.sum[r], weight = w.row_weights[r];
      for (int i = 0; i < hidden; ++i)
        d[i] = weight * (d[i] * inverse - w.slope[r] * row[static_cast<size_t>(i)]);
    }
    k_.norm_back(model_->final_norm, w.hx, w.dhidden, 1.0f, false, first, last, w.dhidden);
    for (int r = first; r < last; ++r)
      std::copy_n(w.dhidden + static_cast<ptrdiff_t>(r) * hidden, hidden,
                  w.dx + static_cast<ptrdiff_t>(w.rows[r]) * hidden);
  });
  return loss;
}

void Trainer::log_probs(const Batch& batch, const float* parameters, float* out) {
  const FlushDenormals flush;
  prepare(parameters);
  for (const Group& g : groups(batch)) {
    Workspace w = begin(batch, g, false);
    for (size_t i = 0; i < model_->layers.size(); ++i)
      layer_forward(g, w, static_cast<int>(i), true);
    head(batch, g, w, nullptr, out);
  }
}

double Trainer::gradients(const Batch& batch, const float* weights, const float* parameters,
                          float* gradient) {
  const FlushDenormals flush;
  prepare(parameters);
  double loss = 0.0;
  for (const Group& g : groups(batch)) {
    const float* first = weights + g.first;
    if (std::all_of(first, first + g.rows, [](float x) { return x == 0.0f; })) continue;
    Workspace w = begin(batch, g, true);
    const int layers = static_cast<int>(model_->layers.size());
    for (int i = 0; i < layers; ++i) layer_forward(g, w, i, true);
    loss += head(batch, g, w, weights, nullptr);
    for (int i = layers - 1; i >= model_->lowest; --i) layer_backward(g, w, i, gradient);
  }
  return loss;
}

}  // namespace localllm::train
