// A low-rank adapter as the engine runs it: y = W x + B (scale * (A x)) in the linears it touches,
// with DoRA each row of it times a gain.
#pragma once

#include <array>
#include <vector>

#include "core/memory.h"
#include "core/program.h"
#include "simd/kernels.h"

namespace localllm {

// The linears of a layer that an adapter may touch.
// kIn, kZ, kOut: of a recurrent mixer.
enum class Target { kQ, kK, kV, kO, kGate, kUp, kDown, kHeadGate, kIn, kZ, kOut };
constexpr int kTargets = 11;

struct AdapterPair {
  AdapterMatrix a, b;
  float scale = 1.0f;
  const float* gains = nullptr;  // [out]; null: 1
  bool present() const { return a.data != nullptr; }
};

// A [rank, in] and B [out, rank] as they come, row by row.
struct AdapterSource {
  const void *a, *b;
  WeightKind a_kind, b_kind;
  int in, rank, out;
  float scale;
  const float* gains = nullptr;
};

class Adapter {
 public:
  // Bytes that a pair takes when packed.
  static size_t packed_bytes(WeightKind a, WeightKind b, int in, int rank, int out);

  // `bytes`: what all pairs together take. Throws std::bad_alloc.
  Adapter(int layers, size_t bytes);
  // Throws std::invalid_argument when the pair makes no sense, is there already, or has no room.
  void add(int layer, Target target, const AdapterSource& source);
  // The same for one of the layer's experts.
  void add_to_expert(int layer, int expert, Target target, const AdapterSource& source);

  // Null where the adapter leaves the linear as it is.
  const AdapterPair* find(size_t layer, Target target) const {
    return present(layers_[layer].own, target);
  }
  const AdapterPair* find_in_expert(size_t layer, size_t expert, Target target) const {
    const std::vector<Pairs>& experts = layers_[layer].experts;
    return expert < experts.size() ? present(experts[expert], target) : nullptr;
  }
  bool has_experts(size_t layer) const { return !layers_[layer].experts.empty(); }
  bool fits(const Program& program) const;
  int widest_rank() const { return widest_rank_; }
  size_t bytes() const { return region_.size(); }

 private:
  using Pairs = std::array<AdapterPair, kTargets>;
  struct Layer {
    Pairs own;
    std::vector<Pairs> experts;  // as far as the last one that is adapted
  };

  static const AdapterPair* present(const Pairs& pairs, Target target) {
    const AdapterPair& pair = pairs[static_cast<size_t>(target)];
    return pair.present() ? &pair : nullptr;
  }
  Layer& layer_at(int layer);
  void put(AdapterPair& pair, const AdapterSource& source);
  AdapterMatrix pack_down(const void* values, WeightKind kind, int rank, int in);
  AdapterMatrix pack_up(const void* values, WeightKind kind, int out, int rank);
  uint8_t* take(size_t bytes);

  Region region_;
  size_t used_ = 0;
  int widest_rank_ = 0;
  std::vector<std::vector<float>> gains_;
  std::vector<Layer> layers_;
};

}  // namespace localllm
