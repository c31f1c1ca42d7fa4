#include "core/state.h"

namespace localllm {

size_t state_floats(const LayerConfig& c) {
  const auto heads = static_cast<size_t>(c.heads) * static_cast<size_t>(c.key_dim) *
                     static_cast<size_t>(c.head_dim);
  switch (c.mixer) {
    case Mixer::kAttention: return 0;
    case Mixer::kShortConv:
      return static_cast<size_t>(c.kernel - 1) * static_cast<size_t>(c.channels);
    case Mixer::kDelta:
      return static_cast<size_t>(c.kernel - 1) * static_cast<size_t>(c.channels) + heads;
  }
  return 0;
}

StatePool::StatePool(const std::vector<LayerConfig>& layers, int slots) : slots_(slots) {
  for (const LayerConfig& c : layers) {
    offsets_.push_back(floats_);
    floats_ += state_floats(c);
  }
  if (slots > 0 && floats_ > 0)
    memory_ = Region::allocate(slot_bytes() * static_cast<size_t>(slots));
}

}  // namespace localllm
