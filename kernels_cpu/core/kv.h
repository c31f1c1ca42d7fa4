// The paged KV cache: for each layer, blocks of `block` positions for every kv head.
#pragma once

#include <vector>

#include "core/memory.h"
#include "simd/kernels.h"

namespace localllm {

// Throws std::invalid_argument unless bits is 32, 16, 8 or 4.
KvKind kv_kind(int bits);
KvLayout kv_layout(KvKind kind, int block, int head_dim);

class KvPool {
 public:
  KvPool(KvKind kind, int block, int blocks) : kind_(kind), block_(block), blocks_(blocks) {}

  // Memory is committed when first written.
  void add_layer(int kv_heads, int head_dim);

  int block() const { return block_; }
  int blocks() const { return blocks_; }
  size_t bytes() const;
  // The cache of `layer`, from a kv head on, as the sequence with this block table sees it.
  KvHead head(int layer, int kv_head, const int32_t* table) const;
  // The piece that holds place `slot` of a block.
  uint8_t* piece_at(int layer, int kv_head, int32_t block, int slot) const;
  const KvLayout& layout(int layer) const { return layers_[static_cast<size_t>(layer)].layout; }

 private:
  struct Layer {
    KvLayout layout;
    size_t tile_stride, block_stride;
    Region memory;
  };
  KvKind kind_;
  int block_, blocks_;
  std::vector<Layer> layers_;
};

}  // namespace localllm
