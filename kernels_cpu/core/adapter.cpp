#include "core/adapter.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace localllm {

namespace {

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

size_t width_of(WeightKind kind) { return kind == WeightKind::kFloat32 ? 4 : 2; }

size_t down_bytes(WeightKind kind, int rank, int in) {
  return round_up(static_cast<size_t>(rank), kAdapterRanks) *
         round_up(static_cast<size_t>(in), kLanes) * width_of(kind);
}

size_t up_bytes(WeightKind kind, int out, int rank) {
  const size_t lanes = round_up(static_cast<size_t>(out), kLanes);
  return round_up(lanes * static_cast<size_t>(rank) * width_of(kind), 64);
}

void check(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

}  // namespace

size_t Adapter::packed_bytes(WeightKind a, WeightKind b, int in, int rank, int out) {
  return down_bytes(a, rank, in) + up_bytes(b, out, rank);
}

Adapter::Adapter(int layers, size_t bytes)
    : region_(Region::allocate(bytes)), layers_(static_cast<size_t>(layers)) {}

void Adapter::add(int layer, Target target, const AdapterSource& source) {
  put(layer_at(layer).own[static_cast<size_t>(target)], source);
}

void Adapter::add_to_expert(int layer, int expert, Target target, const AdapterSource& source) {
  check(expert >= 0, "no such expert");
  std::vector<Pairs>& experts = layer_at(layer).experts;
  if (experts.size() <= static_cast<size_t>(expert))
    experts.resize(static_cast<size_t>(expert) + 1);
  put(experts[static_cast<size_t>(expert)][static_cast<size_t>(target)], source);
}

Adapter::Layer& Adapter::layer_at(int layer) {
  check(layer >= 0 && layer < static_cast<int>(layers_.size()), "no such layer");
  return layers_[static_cast<size_t>(layer)];
}

void Adapter::put(AdapterPair& pair, const AdapterSource& s) {
  check(s.in > 0 && s.rank > 0 && s.out > 0, "empty adapter matrix");
  check(s.a_kind <= WeightKind::kBfloat16 && s.b_kind <= WeightKind::kBfloat16,
        "adapter matrices are dense");
  check(!pair.present(), "an adapter names a linear twice");
  check(used_ + packed_bytes(s.a_kind, s.b_kind, s.in, s.rank, s.out) <= region_.size(),
        "the adapter is larger than was said");
  pair.a = pack_down(s.a, s.a_kind, s.rank, s.in);
  pair.b = pack_up(s.b, s.b_kind, s.out, s.rank);
  pair.scale = s.scale;
  if (s.gains) pair.gains = gains_.emplace_back(s.gains, s.gains + s.out).data();
  widest_rank_ = std::max(widest_rank_, s.rank);
}

bool Adapter::fits(const Program& program) const {
  if (layers_.size() != program.layers.size()) return false;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Attention& attention = program.layers[i].attention;
    const FeedForward& ffn = program.layers[i].ffn;  // all null in a layer of experts
    const Recurrent& recurrent = program.layers[i].recurrent;
    const Matrix* const linears[kTargets] = {
        attention.q, attention.k,    attention.v,  attention.o, ffn.gate,     ffn.up,
        ffn.down,    attention.gate, recurrent.in, recurrent.z, recurrent.out};
    const auto fit = [](const Pairs& pairs, const Matrix* const* to) {
      for (int t = 0; t < kTargets; ++t) {
        const AdapterPair* pair = present(pairs, static_cast<Target>(t));
        if (pair && !(to[t] && to[t]->cols == pair->a.size && to[t]->rows == pair->b.size))
          return false;
      }
      return true;
    };
    if (!fit(layers_[i].own, linears)) return false;
    if (!has_experts(i)) continue;
    const std::vector<FeedForward>& experts = program.layers[i].moe.experts;
    if (layers_[i].experts.size() > experts.size()) return false;
    const Matrix* of_expert[kTargets] = {};
    of_expert[static_cast<int>(Target::kGate)] = experts[0].gate;  // all are of one size
    of_expert[static_cast<int>(Target::kUp)] = experts[0].up;
    of_expert[static_cast<int>(Target::kDown)] = experts[0].down;
    for (const Pairs& pairs : layers_[i].experts)
      if (!fit(pairs, of_expert)) return false;
  }
  return true;
}

// What no rank or input fills stays zero, as the region came.
AdapterMatrix Adapter::pack_down(const void* values, WeightKind kind, int rank, int in) {
  const size_t width = width_of(kind), blocks = round_up(static_cast<size_t>(in), kLanes) / kLanes;
  uint8_t* data = take(down_bytes(kind, rank, in));
  const auto* from = static_cast<const uint8_t*>(values);
  for (size_t j = 0; j < static_cast<size_t>(rank); ++j)
    for (size_t v = 0; v < blocks; ++v) {
      const size_t at = ((j / kAdapterRanks * blocks + v) * kAdapterRanks + j % kAdapterRanks);
      const size_t first = v * kLanes,
                   n = std::min<size_t>(kLanes, static_cast<size_t>(in) - first);
      std::memcpy(data + at * kLanes * width, from + (j * static_cast<size_t>(in) + first) * width,
                  n * width);
    }
  return {kind, rank, in, data};
}

AdapterMatrix Adapter::pack_up(const void* values, WeightKind kind, int out, int rank) {
  const size_t width = width_of(kind), ranks = static_cast<size_t>(rank);
  uint8_t* data = take(up_bytes(kind, out, rank));
  const auto* from = static_cast<const uint8_t*>(values);
  for (size_t i = 0; i < static_cast<size_t>(out); ++i)
    for (size_t j = 0; j < ranks; ++j)
      std::memcpy(data + ((i / kLanes * ranks + j) * kLanes + i % kLanes) * width,
                  from + (i * ranks + j) * width, width);
  return {kind, rank, out, data};
}

uint8_t* Adapter::take(size_t bytes) {
  uint8_t* data = region_.data() + used_;
  used_ += bytes;
  return data;
}

}  // namespace localllm
