#include "train/model.h"

#include <stdexcept>

namespace localllm::train {

namespace {

// Biases are there or not, as the weights have them.
const float* optional(const Store& store, const std::string& name, int n) {
  return store.has_vector(name) ? store.vector(name, n) : nullptr;
}

Norm norm(const Store& store, const std::string& name, const NormConfig& config, int n) {
  Norm s;
  if (!config.present) return s;
  s.weight = store.vector(name + ".weight", n);
  s.bias = optional(store, name + ".bias", n);
  s.at = store.place(name + ".weight");
  s.bias_at = store.place(name + ".bias");
  s.n = n;
  s.eps = config.eps;
  s.layer = config.layer;
  return s;
}

Linear linear(const Store& store, const std::string& name, int in, int out) {
  Linear l;
  l.weight = store.matrix(name + ".weight", out, in);
  l.bias = optional(store, name + ".bias", out);
  l.at = store.place(name + ".weight");
  l.bias_at = store.place(name + ".bias");
  l.in = in;
  l.out = out;
  return l;
}

}  // namespace

Model::Model(std::shared_ptr<Store> weights, const ModelConfig& model_config,
             const std::vector<LayerConfig>& configs, const std::vector<bool>& interleaved,
             const std::vector<AdapterPlace>& places, int64_t size)
    : store(std::move(weights)), config(model_config), adapters(places), parameters(size) {
  const Store& s = *store;
  const int hidden = config.hidden;
  embed = s.matrix("embed.weight", config.vocab, hidden);
  if (config.learned_positions > 0)
    positions = s.matrix("pos_embed.weight", config.learned_positions, hidden);
  head = config.tied_head ? embed : s.matrix("head.weight", config.vocab, hidden);
  head_bias = optional(s, "head.bias", config.vocab);
  final_norm = norm(s, "final_norm", config.final_norm, hidden);
  whole = s.trains();
  embed_at = s.place("embed.weight");
  positions_at = s.place("pos_embed.weight");
  head_at = config.tied_head ? embed_at : s.place("head.weight");
  head_bias_at = s.place("head.bias");
  if (whole && !adapters.empty())
    throw std::invalid_argument("adapters beside weights that are trained themselves");
  if (s.trained_end() > parameters)
    throw std::invalid_argument("trained weights outside the parameters");
  for (size_t i = 0; i < configs.size(); ++i) {
    const LayerConfig& c = configs[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    TrainedLayer l;
    l.config = c;
    l.interleaved = interleaved[i];
    l.attn_norm = norm(s, at + "attn_norm", c.pre_norm, hidden);
    l.attn_post_norm = norm(s, at + "attn_post_norm", c.post_norm, hidden);
    l.ffn_norm = norm(s, at + "ffn_norm", c.pre_norm, hidden);
    l.ffn_post_norm = norm(s, at + "ffn_post_norm", c.post_norm, hidden);
    const int qn = c.qk_norm_all ? l.q_width() : c.head_dim;
    const int kn = c.qk_norm_all ? l.kv_width() : c.head_dim;
    l.q_norm = norm(s, at + "attn.q_norm", c.qk_norm, qn);
    l.k_norm = norm(s, at + "attn.k_norm", c.qk_norm, kn);
    l.q = linear(s, at + "attn.q", hidden, l.q_width());
    l.k = linear(s, at + "attn.k", hidden, l.kv_width());
    l.v = linear(s, at + "attn.v", hidden, l.kv_width());
    l.o = linear(s, at + "attn.o", l.q_width(), hidden);
    if (c.gated) l.gate = linear(s, at + "ffn.gate", hidden, c.hidden);
    l.up = linear(s, at + "ffn.up", hidden, c.hidden);
    l.down = linear(s, at + "ffn.down", c.hidden, hidden);
    layers.push_back(l);
  }
  lowest = whole ? 0 : static_cast<int>(layers.size());
  for (size_t i = 0; i < adapters.size(); ++i) {
    const AdapterPlace& a = adapters[i];
    if (a.layer < 0 || a.layer >= static_cast<int>(layers.size()))
      throw std::invalid_argument("an adapter of no layer");
    TrainedLayer& l = layers[static_cast<size_t>(a.layer)];
    Linear* target = a.linear == "q"      ? &l.q
                     : a.linear == "k"    ? &l.k
                     : a.linear == "v"    ? &l.v
                     : a.linear == "o"    ? &l.o
                     : a.linear == "gate" ? &l.gate
                     : a.linear == "up"   ? &l.up
                     : a.linear == "down" ? &l.down
                                          : nullptr;
    if (!target || !target->weight || target->adapter >= 0)
      throw std::invalid_argument("an adapter of no linear, or a second one");
    const auto fits = [&](int64_t at, int n) {
      return at >= 0 && at + static_cast<int64_t>(a.rank) * n <= parameters;
    };
    if (a.rank < 1 || !fits(a.a, target->in) || !fits(a.b, target->out))
      throw std::invalid_argument("an adapter outside the parameters");
    if (a.magnitude >= 0) {
      if (a.magnitude + target->out > parameters)
        throw std::invalid_argument("magnitudes outside the parameters");
      const std::string stem = a.linear.size() == 1 ? "attn." : "ffn.";
      target->squares = s.vector(
          "layers." + std::to_string(a.layer) + "." + stem + a.linear + ".squares", target->out);
    }
    target->adapter = static_cast<int>(i);
    adapted.push_back(target);
    if (a.layer < lowest) lowest = a.layer;
  }
}

}  // namespace localllm::train
