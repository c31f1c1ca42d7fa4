// The buffers of one group of sequences, cut from one range of memory.
#pragma once

#include <cstdint>
#include <vector>

#include "train/model.h"

namespace localllm::train {

// Cuts aligned pieces from a range; without one it only measures.
class Cutter {
 public:
  explicit Cutter(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    uint8_t* p = base_ ? base_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 127) & ~size_t{63};
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// What a layer's forward leaves for its gradient. Elements where void.
struct Saved {
  void *q, *k, *v, *out, *gate, *up;
  float *lse, *middle;       // middle: [m, hidden] between attention and feed-forward
  float *attn_y, *ffn_y;     // what post-norms see, null without
  std::vector<void*> inner;  // by adapter of the layer (q k v o gate up down): u^T, packed
};

struct Workspace {
  Workspace(const Model& model, const Kernels& k, uint8_t* base, int m, int padded, int longest,
            int threads, bool keep, bool gradients);

  size_t bytes = 0;
  std::vector<float*> x;     // [m, hidden]: into each layer and out of the last
  std::vector<Saved> saved;  // of each layer, or one for all
  bool keep = false;
  std::vector<float*> ropes;  // [m, 2 half] by kind
  void *h = nullptr, *qh = nullptr, *kh = nullptr, *wide = nullptr, *dropped = nullptr;
  float *y = nullptr, *dx = nullptr, *dh = nullptr;
  float *dwide = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr, *dot = nullptr;
  void *dy = nullptr, *dgate = nullptr, *dup = nullptr, *dqe = nullptr, *dke = nullptr,
       *dve = nullptr, *dout = nullptr;
  // Where all weights are trained: rows as what is summed over, and by blocks of rows the sums of
  // two norms' gradients.
  void* columns[3] = {};
  float* sums[2] = {};
  void *packed[3] = {}, *dropped_packed = nullptr, *low[3] = {}, *low_t[3] = {};
  void* attention[8] = {};
  std::vector<uint8_t*> scratch;  // by thread
  // The head's.
  int tile = 0;
  float *hx = nullptr, *dhidden = nullptr, *logits = nullptr, *top = nullptr, *sum = nullptr,
        *target = nullptr, *slope = nullptr, *row_weights = nullptr;
  void *he = nullptr, *head_packed = nullptr, *probabilities = nullptr, *p_packed = nullptr;
  int32_t *rows = nullptr, *targets = nullptr;
};

}  // namespace localllm::train
