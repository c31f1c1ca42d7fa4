// Runs small decoders by every kernel table of this machine, in many chunkings, batches and thread
// counts, checks that all agree bit for bit, and prints one line a model: its name and a hash of
// its logits. The lines of different machines must be equal.
//   fingerprint [quick] [MODEL ...]    quick: no chunkings; only the named models
//   fingerprint kernels                lists the tables of this machine
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "core/sampling.h"
#include "synthetic.h"

using namespace localllm;
using namespace localllm::synthetic;

namespace {

uint64_t hash(const std::vector<float>& values) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (const float v : values) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    h = (h ^ bits) * 0x100000001b3ull;
  }
  return h;
}

struct Case {
  const char* name;
  Shape shape;
  KvKind kv = KvKind::kFloat16;
  int block = 32;
  int tokens = 70;
  bool float_activations = false;
  int rank = 0;  // of the adapter that it runs with; 0: none
  WeightKind adapter = WeightKind::kFloat32;
};

LayerConfig layer(int heads, int kv_heads, int head_dim) {
  LayerConfig c;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.scale = 0.125f;
  c.rope = 0;
  c.rope_half = head_dim / 2;
  c.pre_norm = {true, false, 1e-5f};
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const LayerConfig llama = layer(6, 2, 32);
  const Shape base{300, 192, 2, 256, llama, Format::kQ4Bias};
  all.push_back({"q4-bias", base});
  const std::pair<const char*, Format> formats[] = {
      {"q4-zero", Format::kQ4Zero},          {"q5-group64", Format::kQ5Bias},
      {"q6-group16", Format::kQ6Halves},     {"q8", Format::kQ8Zero},
      {"q2-two-level", Format::kQ2TwoLevel}, {"float32", Format::kFloat32}};
  for (const auto& [name, format] : formats) {
    Shape s = base;
    s.format = format;
    all.push_back({name, s});
  }
  all.push_back({"float-activations", base, KvKind::kFloat32, 32, 40, true});
  all.push_back({"kv8", base, KvKind::kInt8, 32, 70});
  all.push_back({"kv4", base, KvKind::kInt4, 16, 70});
  all.push_back({"small-blocks", base, KvKind::kFloat16, 5, 70});
  Shape gemma = base;
  gemma.layer.window = 40;
  gemma.layer.softcap = 3.0f;
  gemma.layer.qk_norm = {true, false, 1e-6f};
  gemma.layer.post_norm = {true, false, 1e-6f};
  gemma.layer.activation = Activation::kGeluTanh;
  all.push_back({"window-softcap", gemma});
  Shape gpt = base;
  gpt.layer = layer(5, 5, 24);
  gpt.layer.gated = false;
  gpt.layer.activation = Activation::kGelu;
  gpt.layer.pre_norm.layer = true;
  gpt.width = 100;
  all.push_back({"layernorm-odd", gpt});
  const std::pair<const char*, KvKind> narrow[] = {{"8", KvKind::kInt8}, {"4", KvKind::kInt4}};
  static std::vector<std::string> names;
  names.reserve(16);
  for (const auto& [bits, kind] : narrow)
    for (const int dim : {24, 64, 128}) {
      Shape s = base;
      s.layers = 1;
      s.layer = layer(4, 2, dim);
      s.layer.window = dim == 64 ? 45 : 0;
      names.push_back(std::string("kv") + bits + "-head" + std::to_string(dim));
      all.push_back({names.back().c_str(), s, kind, dim == 24 ? 5 : dim == 64 ? 32 : 64, 150});
    }
  Shape moe = base;
  moe.layer.experts = 5;
  moe.layer.top_k = 2;
  moe.hidden = 96;
  all.push_back({"mixture", moe});
  // The linears of attention; and all, in a decoder whose sizes no vector divides.
  all.push_back({"adapter", base, KvKind::kFloat16, 32, 70, false, 8});
  all.push_back(
      {"adapter-bfloat16", gpt, KvKind::kFloat16, 32, 70, false, 3, WeightKind::kBfloat16});
  all.push_back(
      {"adapter-float16", gemma, KvKind::kFloat16, 32, 70, false, 17, WeightKind::kFloat16});
  all.push_back({"adapter-mixture", moe, KvKind::kFloat16, 32, 70, false, 4});
  Shape lone = base;
  lone.layers = 1;
  all.push_back({"long-context", lone, KvKind::kFloat16, 32, 1100});
  return all;
}

void expect_same(const Case& c, const char* way, const std::vector<float>& got,
                 const std::vector<float>& wanted) {
  if (got.size() == wanted.size() &&
      std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) == 0)
    return;
  std::fprintf(stderr, "%s: %s gives other bits\n", c.name, way);
  std::exit(1);
}

std::vector<int32_t> shuffled(int n, Random* random) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) order[static_cast<size_t>(i)] = i;
  for (int i = n - 1; i > 0; --i)
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random->below(i + 1))]);
  return order;
}

std::vector<float> check(const Case& c, bool thorough) {
  Model model(c.shape, 7);
  model.config().float_activations = c.float_activations;
  Random random(11);
  std::vector<int32_t> tokens;
  for (int i = 0; i < c.tokens; ++i) tokens.push_back(random.below(c.shape.vocab));
  const int needed = (c.tokens + c.block - 1) / c.block;
  const std::vector<int32_t> order = shuffled(2 * needed, &random);
  const int32_t *table = order.data(), *other = order.data() + needed;

  const unsigned linears = c.shape.layer.experts ? 0xf : c.shape.layer.gated ? 0x7f : 0x6f;
  std::unique_ptr<Adapter> own, others;
  if (c.rank > 0) {
    own = model.adapter(c.rank, c.adapter, linears, 3);
    others = model.adapter(c.rank + 5, c.adapter, linears & 0x25, 4);
  }

  std::vector<float> wanted;
  for (const std::string& name : usable_kernels())
    for (const int threads : {1, 3}) {
      auto decoder = model.decoder(*find_kernels(name), threads, c.kv, c.block, 2 * needed);
      const auto whole = model.run(*decoder, {{tokens.data(), 0, c.tokens, table, own.get()}});
      if (wanted.empty()) wanted = whole;
      expect_same(c, name.c_str(), whole, wanted);
      if (!thorough) continue;
      // Uneven chunks, beside another sequence that runs ahead.
      std::vector<float> pieces;
      int at = 0, ahead = 0;
      while (at < c.tokens) {
        const int n = std::min(c.tokens - at, 1 + random.below(20));
        std::vector<Model::Part> parts{{tokens.data() + at, at, n, table, own.get()}};
        if (ahead < c.tokens && random.below(3)) {
          const int m = std::min(c.tokens - ahead, 1 + random.below(4));
          parts.push_back({tokens.data() + ahead, ahead, m, other, others.get()});
          ahead += m;
        }
        const auto part = model.run(*decoder, parts);
        pieces.insert(pieces.end(), part.begin(),
                      part.begin() + static_cast<ptrdiff_t>(n) * c.shape.vocab);
        at += n;
      }
      expect_same(c, "chunking", pieces, wanted);
    }
  return wanted;
}

// Tokens drawn from random rows in every way that the native sampler has.
std::vector<float> draws() {
  constexpr int vocab = 5000;
  const Case c{"sampling", {}};
  std::vector<float> wanted;
  for (const std::string& name : usable_kernels()) {
    Random random(13);
    RowSampler sampler(*find_kernels(name), vocab);
    std::vector<float> logits(vocab), got;
    const std::vector<int32_t> ids{3, 64, 4999};
    const std::vector<double> values{5.0, -1.0, 20.0};
    std::vector<uint32_t> allowed((vocab + 31) / 32);
    for (int i = 0; i < 60; ++i) {
      for (float& x : logits) x = static_cast<float>(random.below(1 << 20)) / (1 << 16);
      for (uint32_t& bits : allowed) bits = static_cast<uint32_t>(random.below(1 << 30));
      SampleRow row;
      row.logits = logits.data();
      row.temperature = i % 5 == 0 ? 0.0 : 0.5 * (i % 4 + 1);
      row.top_k = i % 3 == 0 ? 20 : 0;
      row.top_p = i % 2 == 0 ? 0.7 : 1.0;
      row.log_min_p = i % 7 == 0 ? -2.0 : -std::numeric_limits<double>::infinity();
      row.seed = uint64_t{0x9E3779B97F4A7C15} * static_cast<uint64_t>(i);
      row.position = static_cast<uint32_t>(i);
      if (i % 4 == 1) {
        row.edits = 3;
        row.edit_ids = ids.data();
        row.edit_values = values.data();
      }
      if (i % 4 == 2) row.allowed = allowed.data();
      got.push_back(static_cast<float>(sampler.sample(row)));
      row.top_k = 40;
      row.temperature = 0.7;
      for (const auto& kept : *sampler.cut(row)) got.push_back(static_cast<float>(kept.scaled));
    }
    if (wanted.empty()) wanted = got;
    expect_same(c, name.c_str(), got, wanted);
  }
  return wanted;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() == 1 && words[0] == "kernels") {
    for (const std::string& name : usable_kernels()) std::printf("%s\n", name.c_str());
    return 0;
  }
  const bool thorough = words.empty() || words[0] != "quick";
  if (!thorough) words.erase(words.begin());
  for (const Case& c : cases()) {
    if (!words.empty() && std::find(words.begin(), words.end(), c.name) == words.end()) continue;
    const auto logits = check(c, thorough);
    std::printf("%s %016llx\n", c.name, static_cast<unsigned long long>(hash(logits)));
    std::fflush(stdout);
  }
  if (words.empty() || std::find(words.begin(), words.end(), "sampling") != words.end())
    std::printf("sampling %016llx\n", static_cast<unsigned long long>(hash(draws())));
}
