// A decoder as the engine runs it: settings as given, weights as resolved from the store.
#pragma once

#include <string>
#include <vector>

#include "core/store.h"
#include "simd/kernels.h"

namespace localllm {

struct NormConfig {
  bool present = false;
  bool layer = false;  // LayerNorm, else RMSNorm
  float eps = 0.0f;
};

// How a layer mixes tokens. In a delta net `heads` of `head_dim` are the values', `kv_heads` of
// `key_dim` the keys'.
enum class Mixer : int32_t { kAttention, kDelta, kShortConv };

struct LayerConfig {
  Mixer mixer = Mixer::kAttention;
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  int rope = -1;      // index of the step's RoPE tables, -1: none
  int rope_half = 0;  // half the rotated entries of a head
  int window = 0;
  int kv_group = 0;
  float softcap = 0.0f;
  NormConfig qk_norm;
  bool qk_norm_all = false;  // over the whole projection, else over each head
  bool sinks = false;        // one more logit a head, in the denominator alone
  NormConfig v_norm;         // of each head of the values, without a gain
  bool v_from_k = false;     // values are what k projects
  int kv_source = -1;        // the layer whose cache is attended to, -1: its own
  // Queries at position p are multiplied by 1 + query_growth * log(1 + floor(p / query_context)).
  float query_growth = 0.0f;
  int query_context = 1;
  bool gate = false;  // what heads give is multiplied by sigmoid(gate)

  int key_dim = 0;
  int kernel = 0, channels = 0;  // of the convolution
  float delta_eps = 0.0f;        // of the norm over each head

  int hidden = 0;
  Activation activation = Activation::kSilu;
  bool gated = true;
  int experts = 0, top_k = 0;  // experts 0: dense feed-forward
  bool renormalize = true;
  float renormalize_eps = 0.0f;
  bool sigmoid_scores = false;     // else a softmax
  bool selection_bias = false;     // chooses the experts, without weighing them
  int groups = 1, top_groups = 1;  // experts are chosen from the best of their groups
  float weight_scale = 1.0f;
  int shared = 0;  // hidden entries of an expert that every row goes through, 0: none
  bool shared_gate = false;
  bool own_norms = false;  // router, experts and shared expert have norms of their own
  float router_scale = 1.0f;
  bool expert_scale = false;

  NormConfig norm;  // what kind all norms of the layer are
  NormConfig pre_norm, post_norm;
  float residual_scale = 1.0f;
  bool scalar = false;  // what leaves the layer is multiplied by a weight
};

struct ModelConfig {
  int vocab = 0, hidden = 0;
  NormConfig final_norm;
  bool tied_head = false;
  float embed_scale = 1.0f;
  int learned_positions = 0;
  float logit_scale = 1.0f, logit_softcap = 0.0f;
  int per_layer = 0, per_layer_vocab = 0;  // entries of each layer's own embeddings, 0: none
  Activation per_layer_activation = Activation::kGeluTanh;
  bool float_activations = false;  // accuracy mode: activations are not quantized
};

// Resolved: pointers into a WeightStore that outlives the program.
struct Norm {
  bool present = false;
  NormParams params{};
};

struct Attention {
  const Matrix *q, *k, *v, *o, *gate;  // k and v null where the layer has none, gate too
  const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias;  // or null
  Norm q_norm, k_norm, v_norm;
  std::vector<float> ones;  // the gain of v_norm
  int q_width, kv_width;
  std::vector<float> sinks;  // attention states of the sinks alone, one a head, or empty
};

struct Recurrent {
  const Matrix *in, *out;
  const float *in_bias, *out_bias;  // or null
  std::vector<float> taps;          // [kernel][channels]
  const float* taps_bias;           // or null
  const Matrix *z, *beta, *decay;   // of a delta net, as all below
  const float *rate, *step;
  Norm norm;
};

struct FeedForward {
  const Matrix *gate, *up, *down;  // gate null when not gated
  const float *gate_bias, *up_bias, *down_bias;
};

struct Experts {
  const Matrix* router;
  const float* router_bias;     // or null
  const float* selection_bias;  // or null
  const float* expert_scale;    // or null
  Norm router_norm, expert_norm, expert_post_norm, shared_post_norm;
  std::vector<FeedForward> experts;
  FeedForward shared;         // its `up` null when there is none
  const Matrix* shared_gate;  // or null
};

struct Layer {
  LayerConfig config;
  Norm attn_norm, attn_post_norm, ffn_norm, ffn_post_norm;
  Attention attention;  // or
  Recurrent recurrent;
  FeedForward ffn;
  Experts moe;
  const Matrix *per_layer_gate, *per_layer_up;  // or null
  Norm per_layer_norm;
  float scalar = 1.0f;
};

struct Program {
  ModelConfig config;
  const Matrix* embed;
  const Matrix* positions;  // or null
  const Matrix* head;
  const float* head_bias;
  Norm final_norm;
  const Matrix *per_layer_embed, *per_layer_up;  // or null
  Norm per_layer_norm;
  std::vector<Layer> layers;
  size_t scratch_bytes;  // matmul scratch a thread needs
  int widest;            // widest row entering a matmul
};

// Throws std::invalid_argument naming the weight that is missing or of a wrong shape.
Program build_program(const ModelConfig& config, const std::vector<LayerConfig>& layers,
                      const WeightStore& store);

}  // namespace localllm
