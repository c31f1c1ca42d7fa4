// A decoder resolved for training: frozen with low-rank adapters, or itself trained.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/program.h"
#include "train/store.h"

namespace localllm::train {

// Where an adapter's A [rank, in] and B [out, rank] lie in the flat parameters, and with DoRA the
// magnitudes [out]; -1: without.
struct AdapterPlace {
  int layer = 0;
  std::string linear;  // "q", "k", "v", "o", "gate", "up", "down"
  int rank = 0;
  float scale = 1.0f;
  int64_t a = 0, b = 0, magnitude = -1;
};

struct Norm : NormSpec {
  int64_t at = -1, bias_at = -1;  // among the parameters, -1: frozen
};

struct Linear {
  const Matrix* weight = nullptr;
  const float* bias = nullptr;
  int64_t at = -1, bias_at = -1;  // among the parameters, -1: frozen
  int in = 0, out = 0;
  const float* squares = nullptr;  // [out]: of each row's length in W; null without DoRA
  int adapter = -1;  // its place in the list of adapters, which numbers dropout's masks too
};

struct TrainedLayer {
  LayerConfig config;
  bool interleaved = false;
  Norm attn_norm, attn_post_norm, ffn_norm, ffn_post_norm, q_norm, k_norm;  // null: absent
  Linear q, k, v, o, gate, up, down;

  int q_width() const { return config.heads * config.head_dim; }
  int kv_width() const { return config.kv_heads * config.head_dim; }
};

struct Model {
  Model(std::shared_ptr<Store> store, const ModelConfig& config,
        const std::vector<LayerConfig>& layers, const std::vector<bool>& interleaved,
        const std::vector<AdapterPlace>& adapters, int64_t parameters);

  std::shared_ptr<Store> store;
  ModelConfig config;
  std::vector<TrainedLayer> layers;
  std::vector<AdapterPlace> adapters;
  std::vector<const Linear*> adapted;  // by adapter
  int64_t parameters = 0;
  const Matrix *embed = nullptr, *positions = nullptr, *head = nullptr;
  const float* head_bias = nullptr;
  int64_t embed_at = -1, positions_at = -1, head_at = -1, head_bias_at = -1;
  Norm final_norm;
  bool whole = false;  // all weights are trained: none of their places is -1
  int lowest = 0;      // the first layer with an adapter; below it nothing is differentiated
};

}  // namespace localllm::train
