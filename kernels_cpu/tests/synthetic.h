// Decoders with pseudo-random weights, the same on every machine.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/decoder.h"
#include "core/dispatch.h"
#include "random.h"

namespace localllm::synthetic {

enum class Format { kFloat32, kQ4Bias, kQ4Zero, kQ5Bias, kQ6Halves, kQ8Zero, kQ2TwoLevel };

inline uint32_t low_bits(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }

struct Shape {
  int vocab, width, layers, hidden;
  LayerConfig layer;
  Format format;
};

class Model {
 public:
  Model(const Shape& shape, uint64_t seed) : shape_(shape), random_(seed) {
    store_ = std::make_shared<WeightStore>();
    const LayerConfig& c = shape.layer;
    config_.vocab = shape.vocab;
    config_.hidden = shape.width;
    config_.final_norm = {true, false, 1e-5f};
    config_.tied_head = true;
    add("embed.weight", shape.vocab, shape.width);
    norm("final_norm", shape.width);
    for (int i = 0; i < shape.layers; ++i) {
      const std::string at = "layers." + std::to_string(i) + ".";
      add(at + "attn.q.weight", c.heads * c.head_dim, shape.width);
      add(at + "attn.k.weight", c.kv_heads * c.head_dim, shape.width);
      add(at + "attn.v.weight", c.kv_heads * c.head_dim, shape.width);
      add(at + "attn.o.weight", shape.width, c.heads * c.head_dim);
      if (c.pre_norm.present)
        norm(at + "attn_norm", shape.width), norm(at + "ffn_norm", shape.width);
      if (c.post_norm.present)
        norm(at + "attn_post_norm", shape.width), norm(at + "ffn_post_norm", shape.width);
      if (c.qk_norm.present)
        norm(at + "attn.q_norm", c.head_dim), norm(at + "attn.k_norm", c.head_dim);
      const std::string ffn = at + (c.experts ? "moe." : "ffn.");
      if (c.experts) add(ffn + "router.weight", c.experts, shape.width);
      for (int e = 0; e < std::max(1, c.experts); ++e) {
        const std::string suffix = c.experts ? "." + std::to_string(e) : "";
        if (c.gated) add(ffn + "gate.weight" + suffix, shape.hidden, shape.width);
        add(ffn + "up.weight" + suffix, shape.hidden, shape.width);
        add(ffn + "down.weight" + suffix, shape.width, shape.hidden);
      }
    }
    layers_.assign(static_cast<size_t>(shape.layers), c);
    for (LayerConfig& l : layers_) l.hidden = shape.hidden;
    const int half = c.rope_half;
    rope_.resize(8192 * 2 * static_cast<size_t>(half));
    for (int p = 0; p < 8192 && half; ++p)
      for (int i = 0; i < half; ++i) {
        // Any table will do for comparing kernels; this one needs no libm.
        const float angle = std::fmod(static_cast<float>(p) / static_cast<float>(1 + 3 * i), 1.0f);
        rope_[static_cast<size_t>(p) * 2 * half + i] = 1.0f - angle;
        rope_[static_cast<size_t>(p) * 2 * half + half + i] = angle;
      }
  }

  std::unique_ptr<Decoder> decoder(const Kernels& kernels, int threads, KvKind kv, int block,
                                   int blocks) const {
    return std::make_unique<Decoder>(store_, config_, layers_, kv, block, std::vector<int>{blocks},
                                     0, threads, kernels);
  }
  // Low-rank pairs of the given rank on the linears whose bit is set in `targets`.
  std::unique_ptr<Adapter> adapter(int rank, WeightKind kind, unsigned targets,
                                   uint64_t seed) const {
    Random random(seed);
    const LayerConfig& c = shape_.layer;
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim, width = shape_.width;
    const int sizes[kTargets][2] = {{width, q},
                                    {width, kv},
                                    {width, kv},
                                    {q, width},
                                    {width, shape_.hidden},
                                    {width, shape_.hidden},
                                    {shape_.hidden, width}};
    const size_t bytes_each = kind == WeightKind::kFloat32 ? 4 : 2;
    const auto matrix = [&](int rows, int cols) {
      std::vector<uint8_t> data(static_cast<size_t>(rows) * static_cast<size_t>(cols) * bytes_each);
      for (size_t i = 0; i < data.size(); i += bytes_each) {
        const float x = random.uniform() / std::sqrt(static_cast<float>(cols));
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        // The upper half of a float is a bfloat16; of a float16 any small number will do.
        const auto half = static_cast<uint16_t>(
            kind == WeightKind::kBfloat16 ? bits >> 16
                                          : 0x2000 | (bits >> 16 & 0x8000) | (bits & 0xfff));
        std::memcpy(data.data() + i,
                    kind == WeightKind::kFloat32 ? static_cast<const void*>(&bits) : &half,
                    bytes_each);
      }
      return data;
    };
    size_t bytes = 0;
    for (int t = 0; t < kTargets; ++t)
      if (targets >> t & 1)
        bytes += Adapter::packed_bytes(kind, kind, sizes[t][0], rank, sizes[t][1]);
    auto adapter =
        std::make_unique<Adapter>(shape_.layers, bytes * static_cast<size_t>(shape_.layers));
    for (int layer = 0; layer < shape_.layers; ++layer)
      for (int t = 0; t < kTargets; ++t) {
        if (!(targets >> t & 1)) continue;
        const auto a = matrix(rank, sizes[t][0]), b = matrix(sizes[t][1], rank);
        adapter->add(layer, static_cast<Target>(t),
                     {a.data(), b.data(), kind, kind, sizes[t][0], rank, sizes[t][1], 1.7f});
      }
    return adapter;
  }
  ModelConfig& config() { return config_; }
  const Shape& shape() const { return shape_; }

  // Runs rows [start, start + n) of each sequence; block tables must cover them. `done` becomes
  // false when the step was cancelled.
  struct Part {
    const int32_t* tokens;
    int start, n;
    const int32_t* table;
    const Adapter* adapter = nullptr;
  };
  std::vector<float> run(Decoder& decoder, const std::vector<Part>& parts,
                         bool* done = nullptr) const {
    Step step;
    std::vector<int32_t> tokens, positions, rows;
    for (const Part& p : parts) {
      step.chunks.push_back({static_cast<int>(tokens.size()), p.n, p.start, p.table, 0, p.adapter});
      for (int i = 0; i < p.n; ++i) {
        rows.push_back(static_cast<int32_t>(tokens.size()));
        tokens.push_back(p.tokens[i]);
        positions.push_back(p.start + i);
      }
    }
    std::vector<float> out(rows.size() * static_cast<size_t>(shape_.vocab));
    step.rows = step.logits = static_cast<int>(rows.size());
    step.tokens = tokens.data();
    step.positions = positions.data();
    step.logit_rows = rows.data();
    step.ropes = {{rope_.data(), positions.data(), shape_.layer.rope_half}};
    step.out = out.data();
    const bool whole = decoder.forward(step);
    if (done) *done = whole;
    return out;
  }

 private:
  void norm(const std::string& name, int n) {
    std::vector<float> gain(static_cast<size_t>(n));
    for (float& g : gain) g = 1.0f + 0.25f * random_.uniform();
    store_->add_vector(name + ".weight", gain.data(), n);
  }

  void add(const std::string& name, int rows, int cols) {
    const auto count = static_cast<size_t>(rows) * static_cast<size_t>(cols);
    const float size = 2.0f / std::sqrt(static_cast<float>(cols));
    if (shape_.format == Format::kFloat32 || cols % 32) {
      std::vector<float> w(count);
      for (float& x : w) x = size * random_.uniform();
      store_->add_dense(name, w.data(), WeightKind::kFloat32, rows, cols);
      return;
    }
    AffineSource s;
    s.rows = rows;
    s.cols = cols;
    s.group = 32;
    bool bias = false, two_level = false;
    switch (shape_.format) {
      case Format::kQ4Bias: s.bits = 4, bias = true; break;
      case Format::kQ4Zero: s.bits = 4, s.zero_point = 8; break;
      case Format::kQ5Bias: s.bits = 5, bias = true, s.group = cols % 64 ? 32 : 64; break;
      case Format::kQ6Halves: s.bits = 6, s.zero_point = 32, s.group = 16; break;
      case Format::kQ8Zero: s.bits = 8, s.zero_point = 128; break;
      default: s.bits = 2, bias = two_level = true, s.group = 16; break;
    }
    std::vector<uint32_t> codes(static_cast<size_t>(rows) *
                                ((static_cast<size_t>(cols) * s.bits + 31) / 32));
    for (uint32_t& c : codes) c = random_.bits();
    s.codes = codes.data();
    const int groups = cols / s.group;
    const float unit = size / static_cast<float>(1 << (s.bits - 1));
    std::vector<float> scales, biases;
    std::vector<uint8_t> multipliers;
    for (int i = 0; i < rows * groups; ++i) {
      const float spread = 1.0f + 0.5f * random_.uniform();
      if (!two_level || i % 2 == 0) {
        scales.push_back(unit * spread);
        biases.push_back(-size * spread);
      }
      multipliers.push_back(static_cast<uint8_t>(1 + random_.below(3)));
    }
    const int values = two_level ? groups / 2 : groups;
    const void* m = two_level ? multipliers.data() : nullptr;
    s.scales = {scales.data(), false, values, m, false, groups};
    if (bias) s.biases = {biases.data(), false, values, m, false, groups};
    store_->add_affine(name, s);
  }

  Shape shape_;
  Random random_;
  std::shared_ptr<WeightStore> store_;
  ModelConfig config_;
  std::vector<LayerConfig> layers_;
  std::vector<float> rope_;
};

}  // namespace localllm::synthetic
