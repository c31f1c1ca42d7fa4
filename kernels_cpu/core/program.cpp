#include "core/program.h"

#include <algorithm>
#include <stdexcept>

namespace localllm {

namespace {

// What a sink is to attention: one score (in units of log2) with a value of zeros.
std::vector<float> sink_states(const float* logits, const LayerConfig& c) {
  const int size = AttentionState::size((c.head_dim + kGroup - 1) / kGroup * kGroup);
  std::vector<float> states(static_cast<size_t>(c.heads) * static_cast<size_t>(size), 0.0f);
  for (int h = 0; h < c.heads; ++h) {
    float* state = states.data() + static_cast<ptrdiff_t>(h) * size;
    state[0] = 1.0f;
    state[AttentionState::kMaxAt] = logits[h] * 1.44269504088896340736f;
  }
  return states;
}

// Resolves one layer's weights and keeps account of the scratch they need.
class Resolver {
 public:
  Resolver(const WeightStore& store, Program* program) : store_(store), program_(program) {}

  const Matrix* matrix(const std::string& name, int rows, int cols) {
    const Matrix& w = store_.matrix(name, rows, cols);
    program_->scratch_bytes = std::max(program_->scratch_bytes, matmul_scratch(w));
    program_->widest = std::max(program_->widest, cols);
    return &w;
  }

  Norm norm(const std::string& name, const NormConfig& config, int n) const {
    if (!config.present) return {};
    return {true,
            {store_.vector(name + ".weight", n), store_.optional_vector(name + ".bias", n),
             config.eps, config.layer}};
  }

  Attention attention(const std::string& prefix, const LayerConfig& c, int width) {
    Attention a{};
    a.q_width = c.heads * c.head_dim;
    a.kv_width = c.kv_heads * c.head_dim;
    a.q = matrix(prefix + "q.weight", a.q_width, width);
    const bool own = c.kv_source < 0;
    if (own) a.k = matrix(prefix + "k.weight", a.kv_width, width);
    if (own && !c.v_from_k) a.v = matrix(prefix + "v.weight", a.kv_width, width);
    a.o = matrix(prefix + "o.weight", width, a.q_width);
    a.q_bias = store_.optional_vector(prefix + "q.bias", a.q_width);
    if (a.k) a.k_bias = store_.optional_vector(prefix + "k.bias", a.kv_width);
    if (a.v) a.v_bias = store_.optional_vector(prefix + "v.bias", a.kv_width);
    a.o_bias = store_.optional_vector(prefix + "o.bias", width);
    a.q_norm = norm(prefix + "q_norm", c.qk_norm, c.qk_norm_all ? a.q_width : c.head_dim);
    if (own) a.k_norm = norm(prefix + "k_norm", c.qk_norm, c.qk_norm_all ? a.kv_width : c.head_dim);
    if (c.v_norm.present) {
      a.ones.assign(static_cast<size_t>(c.head_dim), 1.0f);
      a.v_norm = {true, {a.ones.data(), nullptr, c.v_norm.eps, false}};
    }
    if (c.gate) {
      a.gate = matrix(prefix + "gate.weight", a.q_width, width);
      a.gate_bias = store_.optional_vector(prefix + "gate.bias", a.q_width);
    }
    if (c.sinks) a.sinks = sink_states(store_.vector(prefix + "sinks.weight", c.heads), c);
    return a;
  }

  Recurrent delta(const std::string& prefix, const LayerConfig& c, int width) {
    Recurrent r{};
    const int values = c.heads * c.head_dim;
    r.in = matrix(prefix + "qkv.weight", c.channels, width);
    r.z = matrix(prefix + "z.weight", values, width);
    r.beta = matrix(prefix + "beta.weight", c.heads, width);
    r.decay = matrix(prefix + "decay.weight", c.heads, width);
    r.out = matrix(prefix + "o.weight", width, values);
    r.taps = taps(prefix + "conv.weight", c);
    r.rate = store_.vector(prefix + "rate.weight", c.heads);
    r.step = store_.vector(prefix + "step.weight", c.heads);
    r.norm = norm(prefix + "norm", {true, false, c.delta_eps}, c.head_dim);
    return r;
  }

  Recurrent short_conv(const std::string& prefix, const LayerConfig& c, int width) {
    Recurrent r{};
    r.in = matrix(prefix + "in.weight", 3 * width, width);
    r.out = matrix(prefix + "out.weight", width, width);
    r.in_bias = store_.optional_vector(prefix + "in.bias", 3 * width);
    r.out_bias = store_.optional_vector(prefix + "out.bias", width);
    r.taps = taps(prefix + "taps.weight", c);
    r.taps_bias = store_.optional_vector(prefix + "taps.bias", width);
    return r;
  }

  static constexpr int kDense = -1, kShared = -2;
  // expert: of a mixture, whose biases lie one after the other; or one of the above.
  FeedForward feed_forward(const std::string& prefix, int expert, const LayerConfig& c, int width) {
    const std::string suffix = expert < 0 ? "" : "." + std::to_string(expert);
    const int count = expert < 0 ? 1 : c.experts, at = std::max(expert, 0);
    const int hidden = expert == kShared ? c.shared : c.hidden;
    const auto bias = [&](const char* name, int n) {
      const float* all = store_.optional_vector(prefix + name + ".bias", count * n);
      return all ? all + static_cast<ptrdiff_t>(at) * n : nullptr;
    };
    FeedForward f{};
    if (c.gated) f.gate = matrix(prefix + "gate.weight" + suffix, hidden, width);
    f.up = matrix(prefix + "up.weight" + suffix, hidden, width);
    f.down = matrix(prefix + "down.weight" + suffix, width, hidden);
    f.gate_bias = bias("gate", hidden);
    f.up_bias = bias("up", hidden);
    f.down_bias = bias("down", width);
    return f;
  }

 private:
  // [channels][kernel] as stored -> [kernel][channels].
  std::vector<float> taps(const std::string& name, const LayerConfig& c) const {
    const float* from = store_.vector(name, c.channels * c.kernel);
    std::vector<float> result(static_cast<size_t>(c.channels) * static_cast<size_t>(c.kernel));
    for (int i = 0; i < c.channels; ++i)
      for (int k = 0; k < c.kernel; ++k)
        result[static_cast<size_t>(k * c.channels + i)] = from[i * c.kernel + k];
    return result;
  }

  const WeightStore& store_;
  Program* program_;
};

bool good_mixer(const LayerConfig& c, int width) {
  const bool heads = c.heads > 0 && c.kv_heads > 0 && c.heads % c.kv_heads == 0 && c.head_dim > 0 &&
                     c.head_dim <= 4096;
  if (c.mixer == Mixer::kAttention) return heads;
  const bool kernel = c.kernel > 1 && c.kernel <= 64;
  if (c.mixer == Mixer::kShortConv) return kernel && c.channels == width && c.heads == 0;
  return kernel && heads && c.key_dim > 0 && c.key_dim <= 4096 &&
         c.channels == 2 * c.kv_heads * c.key_dim + c.heads * c.head_dim;
}

bool good_mixture(const LayerConfig& c) {
  if (c.groups < 1 || c.top_groups < 1 || c.top_groups > c.groups || c.experts % c.groups != 0)
    return false;
  const int each = c.experts / c.groups;
  if (c.groups > 1 && each < 2) return false;  // a group counts by its two best
  return c.top_k > 0 && c.top_k <= each * c.top_groups && c.gated && c.shared >= 0 &&
         (c.shared > 0 || !c.shared_gate);
}

void check(const LayerConfig& c, int width) {
  const bool good = good_mixer(c, width) && c.hidden > 0 && c.rope_half >= 0 &&
                    2 * c.rope_half <= c.head_dim && c.window >= 0 && c.experts >= 0 &&
                    (c.experts == 0 || good_mixture(c)) &&
                    (c.gated || c.activation != Activation::kClampedSwiglu) && c.query_context > 0;
  if (!good) throw std::invalid_argument("layer settings contradict each other");
}

}  // namespace

// Whether a layer can attend to the keys of the one it names.
bool shares_well(const std::vector<LayerConfig>& layers, size_t index) {
  const LayerConfig& c = layers[index];
  if (c.kv_source < 0) return true;
  if (c.kv_source >= static_cast<int>(index)) return false;
  const LayerConfig& owner = layers[static_cast<size_t>(c.kv_source)];
  return owner.kv_source < 0 && owner.kv_heads == c.kv_heads && owner.head_dim == c.head_dim &&
         owner.window == c.window && owner.kv_group == c.kv_group;
}

Program build_program(const ModelConfig& config, const std::vector<LayerConfig>& layers,
                      const WeightStore& store) {
  if (config.vocab <= 0 || config.hidden <= 0)
    throw std::invalid_argument("model settings contradict each other");
  Program p{};
  p.config = config;
  Resolver resolve(store, &p);
  const int width = config.hidden;
  p.embed = resolve.matrix("embed.weight", config.vocab, width);
  if (config.learned_positions > 0)
    p.positions = resolve.matrix("pos_embed.weight", config.learned_positions, width);
  p.head = config.tied_head ? p.embed : resolve.matrix("head.weight", config.vocab, width);
  p.head_bias = store.optional_vector("head.bias", config.vocab);
  p.final_norm = resolve.norm("final_norm", config.final_norm, width);

  const int own = config.per_layer;
  if (own > 0) {
    const int all = own * static_cast<int>(layers.size());
    p.per_layer_embed =
        resolve.matrix("per_layer_inputs.embed.weight", config.per_layer_vocab, all);
    p.per_layer_up = resolve.matrix("per_layer_inputs.up.weight", all, width);
    p.per_layer_norm = resolve.norm("per_layer_inputs.norm", config.final_norm, own);
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerConfig& c = layers[i];
    check(c, width);
    if (!shares_well(layers, i)) throw std::invalid_argument("a layer cannot share those keys");
    const std::string at = "layers." + std::to_string(i) + ".";
    Layer layer{};
    layer.config = c;
    const auto norm = [&](const char* name, bool wanted) {
      return wanted ? resolve.norm(at + name, c.norm, width) : Norm{};
    };
    layer.attn_norm = resolve.norm(at + "attn_norm", c.pre_norm, width);
    layer.attn_post_norm = resolve.norm(at + "attn_post_norm", c.post_norm, width);
    layer.ffn_norm = resolve.norm(at + "ffn_norm", c.pre_norm, width);
    layer.ffn_post_norm = resolve.norm(at + "ffn_post_norm", c.post_norm, width);
    if (own > 0) {
      layer.per_layer_gate = resolve.matrix(at + "per_layer.gate.weight", own, width);
      layer.per_layer_up = resolve.matrix(at + "per_layer.up.weight", width, own);
      layer.per_layer_norm = norm("per_layer_norm", true);
    }
    if (c.scalar) layer.scalar = *store.vector(at + "scalar.weight", 1);
    switch (c.mixer) {
      case Mixer::kAttention: layer.attention = resolve.attention(at + "attn.", c, width); break;
      case Mixer::kDelta: layer.recurrent = resolve.delta(at + "delta.", c, width); break;
      case Mixer::kShortConv: layer.recurrent = resolve.short_conv(at + "conv.", c, width); break;
    }
    if (c.experts == 0) {
      layer.ffn = resolve.feed_forward(at + "ffn.", Resolver::kDense, c, width);
    } else {
      layer.moe.router = resolve.matrix(at + "moe.router.weight", c.experts, width);
      layer.moe.router_bias = store.optional_vector(at + "moe.router.bias", c.experts);
      for (int e = 0; e < c.experts; ++e)
        layer.moe.experts.push_back(resolve.feed_forward(at + "moe.", e, c, width));
      if (c.selection_bias)
        layer.moe.selection_bias = store.vector(at + "moe.selection_bias.weight", c.experts);
      if (c.shared > 0)
        layer.moe.shared = resolve.feed_forward(at + "moe.shared.", Resolver::kShared, c, width);
      if (c.expert_scale)
        layer.moe.expert_scale = store.vector(at + "moe.expert_scale.weight", c.experts);
      layer.moe.router_norm = norm("moe.router_norm", c.own_norms);
      layer.moe.expert_norm = norm("moe.expert_norm", c.own_norms);
      layer.moe.expert_post_norm = norm("moe.expert_post_norm", c.own_norms);
      layer.moe.shared_post_norm = norm("moe.shared_post_norm", c.own_norms && c.shared > 0);
      if (c.shared_gate)
        layer.moe.shared_gate = resolve.matrix(at + "moe.shared_gate.weight", 1, width);
    }
    p.layers.push_back(std::move(layer));
  }
  return p;
}

}  // namespace localllm
