// The states of recurrent layers: one slot for each state, in it all layers side by side.
#pragma once

#include <vector>

#include "core/memory.h"
#include "core/program.h"

namespace localllm {

// Floats that a layer keeps of a sequence: the convolution's last inputs [kernel - 1][channels],
// the oldest first, then each value head's S [key_dim][value_dim]. 0: the layer attends.
size_t state_floats(const LayerConfig& c);

class StatePool {
 public:
  // Memory is committed when first written. Throws std::bad_alloc.
  StatePool(const std::vector<LayerConfig>& layers, int slots);

  int slots() const { return slots_; }
  size_t slot_bytes() const { return floats_ * sizeof(float); }
  float* slot(int index) const {
    return reinterpret_cast<float*>(memory_.data()) + static_cast<size_t>(index) * floats_;
  }
  float* at(int slot_index, int layer) const {
    return slot(slot_index) + offsets_[static_cast<size_t>(layer)];
  }

 private:
  int slots_;
  size_t floats_ = 0;
  std::vector<size_t> offsets_;
  Region memory_;
};

}  // namespace localllm
