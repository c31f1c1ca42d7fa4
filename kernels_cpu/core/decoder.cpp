#include "core/decoder.h"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace localllm {

namespace {

// Bytes of weights a chunk of panels should at least cover for one row.
constexpr size_t kChunkBytes = size_t{16} << 10;

double seconds_of(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
// A recurrent layer keeps nothing in its group.
std::vector<KvLayer> kv_layers(const std::vector<LayerConfig>& layers) {
  std::vector<KvLayer> result;
  for (const LayerConfig& c : layers)
    result.push_back(
        {c.kv_group, c.mixer == Mixer::kAttention ? c.kv_heads : 0, c.head_dim, c.kv_source});
  return result;
}

double steady_seconds() { return seconds_of(CLOCK_MONOTONIC); }
double thread_seconds() { return seconds_of(CLOCK_THREAD_CPUTIME_ID); }  // on a processor

}  // namespace

Decoder::Decoder(std::shared_ptr<const WeightStore> store, const ModelConfig& config,
                 const std::vector<LayerConfig>& layers, KvKind kv, int block,
                 const std::vector<int>& blocks, int states, int threads, const Kernels& kernels,
                 size_t expert_bytes, const std::vector<float>& expert_uses)
    : store_(std::move(store)),
      program_(build_program(config, layers, *store_)),
      k_(kernels),
      kv_(kv, block, kv_layers(layers), blocks),
      states_of_sequences_(layers, states),
      pool_(threads),
      guesses_(layers.size()) {
  thread_scratch_.resize(static_cast<size_t>(pool_.size()));
  if (store_->leaves_experts())
    expert_cache_ =
        std::make_unique<ExpertCache>(*store_, program_, expert_bytes, expert_uses, &pool_);
}

bool Decoder::forward(const Step& step, const std::function<bool()>& stop) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const FlushDenormals flush;
  if (pool_.size() == 1) return run(step, stop);
  pool_.set_alone(governor_.alone(step.rows));
  const double start = steady_seconds(), processor = thread_seconds();
  const double reading = expert_cache_ ? expert_cache_->counts().seconds : 0.0;
  const bool done = run(step, stop);
  const double now = steady_seconds();
  // Waiting for the disk is no sign of a busy neighbour.
  const double read = expert_cache_ ? expert_cache_->counts().seconds - reading : 0.0;
  const double seconds = std::max(0.0, now - start - read);
  const double off_core = seconds - (thread_seconds() - processor);
  if (done) governor_.record(step.rows, seconds, std::max(off_core, pool_.take_waited()), now);
  return done;
}

bool Decoder::run(const Step& step, const std::function<bool()>& stop) {
  cancelled_ = false;
  const auto stopped = [&] { return cancelled_ || (stop && stop()); };
  reserve(step);
  group_adapters(step);
  embed(step);
  if (program_.config.per_layer > 0) per_layer_inputs(step);
  for (size_t i = 0; i < program_.layers.size(); ++i) {
    if (stopped()) return false;
    const Layer& layer = program_.layers[i];
    switch (layer.config.mixer) {
      case Mixer::kAttention: attention(step, static_cast<int>(i)); break;
      case Mixer::kDelta: delta_net(step, static_cast<int>(i)); break;
      case Mixer::kShortConv: short_conv(step, static_cast<int>(i)); break;
    }
    if (stopped()) return false;
    if (layer.config.experts > 0)
      mixture(step, static_cast<int>(i));
    else
      feed_forward(step, static_cast<int>(i));
    finish_layer(step, static_cast<int>(i));
  }
  logits(step);
  return true;
}

void Decoder::reserve(const Step& step) {
  const int width = program_.config.hidden;
  int q = 1, kv = 1, hidden = 1, experts = 0, top_k = 0, expert_hidden = 1;
  int channels = 0, convolved = 0, heads = 0, values = 0, gate = 0;
  size_t scratch = program_.scratch_bytes;
  for (const Layer& layer : program_.layers) {
    const LayerConfig& c = layer.config;
    q = std::max(q, layer.attention.q_width);
    kv = std::max(kv, layer.attention.kv_width);
    if (c.experts > 0) {
      experts = std::max(experts, c.experts);
      top_k = std::max(top_k, c.top_k);
      expert_hidden = std::max(expert_hidden, c.hidden);
      hidden = std::max(hidden, c.shared);
    } else {
      hidden = std::max(hidden, c.hidden);
    }
    if (c.mixer == Mixer::kAttention) {
      scratch = std::max(scratch, attention_scratch(c));
      if (c.gate) gate = std::max(gate, layer.attention.q_width);
      continue;
    }
    channels = std::max(channels, c.channels);
    convolved = std::max(convolved, c.mixer == Mixer::kDelta ? c.channels : 3 * c.channels);
    q = std::max(q, c.mixer == Mixer::kDelta ? c.heads * c.head_dim : c.channels);
    if (c.mixer != Mixer::kDelta) continue;
    heads = std::max(heads, c.heads);
    values = std::max(values, c.heads * c.head_dim);
    scratch = std::max(
        scratch, static_cast<size_t>(c.key_dim) * static_cast<size_t>(c.head_dim) * sizeof(float));
  }
  const int rows = step.rows, own = program_.config.per_layer;
  if (own > 0) {
    hidden = std::max(hidden, own);
    own_.reserve(rows, own * static_cast<int>(program_.layers.size()));
    own_row_.reserve(rows, own * static_cast<int>(program_.layers.size()));
  }
  x_.reserve(rows, width);
  y_.reserve(rows, width);
  q_.reserve(rows, q);
  key_.reserve(rows, kv);
  value_.reserve(rows, kv);
  normed_.reserve(rows, width);
  mixed_.reserve(rows, q);
  up_.reserve(std::max(rows, rows * top_k), std::max(hidden, expert_hidden));
  inner_.reserve(rows, hidden);
  if (experts > 0) {
    router_.reserve(rows, experts);
    shared_weight_.reserve(rows, 1);
    expert_in_.reserve(rows * top_k, width);
    expert_inner_.reserve(rows * top_k, expert_hidden);
    expert_out_.reserve(rows * top_k, width);
  }
  if (gate > 0) head_gate_.reserve(rows, gate);
  if (channels > 0) {
    conv_in_.reserve(rows, channels);
    conv_out_.reserve(rows, convolved);
    nothing_.assign(static_cast<size_t>(channels), 0.0f);
    first_guess_.clear();
    guessed_ = 0;
    for (const Chunk& chunk : step.chunks) {
      first_guess_.push_back(guessed_);
      guessed_ += chunk.guesses;
    }
    first_guess_.push_back(guessed_);
  }
  if (heads > 0) {
    gates_.reserve(rows, 2 * heads);
    delta_out_.reserve(rows, values);
    z_.reserve(rows, values);
  }
  for (Scratch<uint8_t>& s : thread_scratch_) s.reserve(scratch);
}

void Decoder::embed(const Step& step) {
  const ModelConfig& c = program_.config;
  each_row(step.rows, 4 * c.hidden, [&](int r) {
    float* x = x_.row(r);
    if (step.embeddings)
      std::memcpy(x, step.embeddings + static_cast<ptrdiff_t>(r) * c.hidden,
                  static_cast<size_t>(c.hidden) * sizeof(float));
    else
      embed_rows(step.tokens + r, 1, x);
    if (!program_.positions) return;
    float* p = y_.row(r);
    read_row(*program_.positions, step.positions[r], p);
    k_.add_scaled(p, c.hidden, 1.0f, x);
  });
}

// own_ = (norm(up x / sqrt(width)) + embedding * sqrt(size)) / sqrt(2), layer after layer.
void Decoder::per_layer_inputs(const Step& step) {
  const ModelConfig& c = program_.config;
  const int all = program_.per_layer_up->rows;
  each_row(step.rows, 4 * c.hidden, [&](int r) { enter(Norm{}, x_.row(r), &normed_, r); });
  multiply(normed_.input(0, step.rows, !c.float_activations),
           {{program_.per_layer_up, own_.row(0), own_.stride()}});
  const float to_x = 1.0f / std::sqrt(static_cast<float>(c.hidden));
  const float to_token = std::sqrt(static_cast<float>(c.per_layer));
  each_row(step.rows, 4 * all, [&](int r) {
    float *own = own_.row(r), *token = own_row_.row(r);
    k_.scale(own, all, to_x);
    for (int at = 0; at < all; at += c.per_layer)
      k_.norm(own + at, c.per_layer, program_.per_layer_norm.params, own + at);
    read_row(*program_.per_layer_embed, step.tokens[r], token);
    k_.add_scaled(token, all, to_token, own);
    k_.scale(own, all, 0.70710678118654752f);
  });
}

// What comes after the feed-forward: the layer's own embeddings, and its scalar.
void Decoder::finish_layer(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const int width = program_.config.hidden, size = program_.config.per_layer;
  const bool quantized = !program_.config.float_activations;
  if (size > 0) {
    each_row(step.rows, 4 * width, [&](int r) { enter(Norm{}, x_.row(r), &normed_, r); });
    multiply(normed_.input(0, step.rows, quantized),
             {{layer.per_layer_gate, inner_.row(0), inner_.stride()}});
    each_row(step.rows, 4 * size, [&](int r) {
      float* gate = inner_.row(r);
      k_.activate(program_.config.per_layer_activation, gate, own_.row(r) + index * size, size,
                  gate);
      quantize(&inner_, r, size);
    });
    multiply(inner_.input(0, step.rows, quantized), {{layer.per_layer_up, y_.row(0), y_.stride()}});
    each_row(step.rows, 4 * width, [&](int r) {
      float* y = y_.row(r);
      k_.norm(y, width, layer.per_layer_norm.params, y);
      k_.add_scaled(y, width, 1.0f, x_.row(r));
    });
  }
  if (layer.config.scalar)
    each_row(step.rows, width, [&](int r) { k_.scale(x_.row(r), width, layer.scalar); });
}

void Decoder::embed_rows(const int32_t* tokens, int rows, float* out) const {
  const ModelConfig& c = program_.config;
  for (int r = 0; r < rows; ++r) {
    float* x = out + static_cast<ptrdiff_t>(r) * c.hidden;
    read_row(*program_.embed, tokens[r], x);
    if (c.embed_scale != 1.0f) k_.scale(x, c.hidden, c.embed_scale);
  }
}

void Decoder::quantize(MatmulRows* rows, int row, int width) {
  if (!program_.config.float_activations)
    k_.quantize(rows->row(row), width, rows->q(row), rows->info(row));
}

void Decoder::enter(const Norm& norm, const float* x, MatmulRows* to, int row) {
  const int width = program_.config.hidden;
  if (norm.present)
    k_.norm(x, width, norm.params, to->row(row));
  else
    std::memcpy(to->row(row), x, static_cast<size_t>(width) * sizeof(float));
  quantize(to, row, width);
}

void Decoder::add_residual(const Layer& layer, const Norm& post, const float* bias, int row) {
  const int width = program_.config.hidden;
  float* y = y_.row(row);
  if (bias) k_.add_scaled(bias, width, 1.0f, y);
  if (post.present) k_.norm(y, width, post.params, y);
  k_.add_scaled(y, width, layer.config.residual_scale, x_.row(row));
}

int Decoder::panel_grain(const Matrix& w, int panels, int rows) const {
  if (pool_.size() == 1) return panels;
  const size_t work = w.panel_bytes * static_cast<size_t>(std::max(1, rows / 2));
  const int smallest = static_cast<int>(std::max<size_t>(1, kChunkBytes / work));
  return std::max(smallest, panels / (8 * pool_.size()));
}

void Decoder::multiply(const Input& in, std::initializer_list<Product> products) {
  int panels = 0;
  for (const Product& p : products) panels += p.w->panels();
  const int grain = panel_grain(*products.begin()->w, panels, in.rows);
  pool_.parallel(panels, grain, [&](int first, int last, int thread) {
    int start = 0;
    for (const Product& p : products) {
      const int end = start + p.w->panels();
      const int from = std::max(first, start), to = std::min(last, end);
      if (from < to)
        k_.matmul(*p.w, in, p.out, p.stride, from - start, to - start,
                  thread_scratch_[static_cast<size_t>(thread)].data());
      start = end;
    }
  });
}

// Panels [first, last) of act(gate) * up, in place in `gate` (in `up` when not gated).
void Decoder::hidden_panels(const LayerConfig& c, const FeedForward& f, const Input& in,
                            float* gate, float* up, ptrdiff_t stride, int first, int last,
                            void* scratch, int adapted_layer, int expert, int first_slot) {
  if (f.gate) k_.matmul(*f.gate, in, gate, stride, first, last, scratch);
  k_.matmul(*f.up, in, up, stride, first, last, scratch);
  const int at = first * kLanes, n = std::min(last * kLanes, f.up->rows) - at;
  for (int r = 0; r < in.rows; ++r) {
    float* g = gate + r * stride + at;
    float* u = up + r * stride + at;
    if (expert >= 0) {
      add_expert_delta(adapted_layer, expert, Target::kUp, first_slot + r, at, n, u);
      add_expert_delta(adapted_layer, expert, Target::kGate, first_slot + r, at, n, g);
    } else if (adapted_layer >= 0) {
      add_delta(adapted_layer, Target::kUp, r, at, n, u);
      if (f.gate) add_delta(adapted_layer, Target::kGate, r, at, n, g);
    }
    if (f.up_bias) k_.add_scaled(f.up_bias + at, n, 1.0f, u);
    if (!f.gate) {
      k_.activate(c.activation, u, nullptr, n, g);
      continue;
    }
    if (f.gate_bias) k_.add_scaled(f.gate_bias + at, n, 1.0f, g);
    k_.activate(c.activation, g, u, n, g);
  }
}

void Decoder::feed_forward(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const LayerConfig& c = layer.config;
  const FeedForward& f = layer.ffn;
  const int width = program_.config.hidden;
  const bool quantized = !program_.config.float_activations;
  const Input in = normed_.input(0, step.rows, quantized);
  each_row(step.rows, 4 * width, [&](int r) { enter(layer.ffn_norm, x_.row(r), &normed_, r); });
  adapt(index, normed_, {Target::kGate, Target::kUp});
  pool_.parallel(f.up->panels(), panel_grain(*f.up, f.up->panels(), step.rows),
                 [&](int first, int last, int thread) {
                   hidden_panels(c, f, in, inner_.row(0), up_.row(0), inner_.stride(), first, last,
                                 thread_scratch_[static_cast<size_t>(thread)].data(), index);
                 });
  each_row(step.rows, 2 * c.hidden, [&](int r) { quantize(&inner_, r, c.hidden); });
  adapt(index, inner_, {Target::kDown});
  multiply(inner_.input(0, step.rows, quantized), {{f.down, y_.row(0), y_.stride()}});
  each_row(step.rows, 4 * width, [&](int r) {
    add_delta(index, Target::kDown, r, 0, width, y_.row(r));
    add_residual(layer, layer.ffn_post_norm, f.down_bias, r);
  });
}

void Decoder::logits(const Step& step) {
  const ModelConfig& c = program_.config;
  const auto width = static_cast<size_t>(c.hidden);
  if (step.hidden)
    each_row(step.rows, 4 * c.hidden, [&](int r) {
      float* out = step.hidden + static_cast<size_t>(r) * width;
      if (program_.final_norm.present)
        k_.norm(x_.row(r), c.hidden, program_.final_norm.params, out);
      else
        std::memcpy(out, x_.row(r), width * sizeof(float));
    });
  if (step.logits == 0) return;
  each_row(step.logits, 4 * c.hidden, [&](int i) {
    const int r = step.logit_rows[i];
    if (step.hidden)
      enter(Norm{}, step.hidden + static_cast<size_t>(r) * width, &normed_, i);
    else
      enter(program_.final_norm, x_.row(r), &normed_, i);
  });
  run_head(step.logits, *program_.head, program_.head_bias, step.out);
}

void Decoder::project(const float* hidden, int rows, float* out) {
  project_with(hidden, rows, *program_.head, program_.head_bias, out);
}

void Decoder::project(const float* hidden, int rows, const Matrix& head, float* out) {
  project_with(hidden, rows, head, nullptr, out);
}

void Decoder::project_with(const float* hidden, int rows, const Matrix& head, const float* bias,
                           float* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const FlushDenormals flush;
  const int width = program_.config.hidden;
  normed_.reserve(rows, width);
  for (Scratch<uint8_t>& s : thread_scratch_) s.reserve(program_.scratch_bytes);
  for (int r = 0; r < rows; ++r)
    enter(Norm{}, hidden + static_cast<ptrdiff_t>(r) * width, &normed_, r);
  run_head(rows, head, bias, out);
}

void Decoder::copy_block(int group, int32_t from, int32_t to) {
  std::memcpy(kv_.block_at(group, to), kv_.block_at(group, from), kv_.block_bytes(group));
}

void Decoder::run_head(int rows, const Matrix& head, const float* bias, float* out) {
  const ModelConfig& c = program_.config;
  const Input in = normed_.input(0, rows, !c.float_activations);
  pool_.parallel(head.panels(), panel_grain(head, head.panels(), rows),
                 [&](int first, int last, int thread) {
                   k_.matmul(head, in, out, head.rows, first, last,
                             thread_scratch_[static_cast<size_t>(thread)].data());
                   const int at = first * kLanes, n = std::min(last * kLanes, head.rows) - at;
                   for (int i = 0; i < rows; ++i) {
                     float* row = out + static_cast<ptrdiff_t>(i) * head.rows + at;
                     if (bias) k_.add_scaled(bias + at, n, 1.0f, row);
                     k_.finish_logits(row, n, c.logit_scale, c.logit_softcap);
                   }
                 });
}

}  // namespace localllm
