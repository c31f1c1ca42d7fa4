// The paged KV cache. Layers that keep the same positions are a group, with blocks of their own: a
// block holds `block` positions of every layer of its group, side by side, so that it can be copied
// or written to disk as one piece.
#pragma once

#include <vector>

#include "core/memory.h"
#include "simd/kernels.h"

namespace localllm {

// Throws std::invalid_argument unless bits is 32, 16, 8 or 4.
KvKind kv_kind(int bits);
KvLayout kv_layout(KvKind kind, int block, int head_dim);

struct KvLayer {
  int group, kv_heads, head_dim;
  int source = -1;  // the earlier layer whose cache this one attends to, -1: it has its own
};

class KvPool {
 public:
  // layers: in order. blocks: how many each group has. Memory is committed when first written.
  KvPool(KvKind kind, int block, const std::vector<KvLayer>& layers,
         const std::vector<int>& blocks);

  int block() const { return block_; }
  int groups() const { return static_cast<int>(groups_.size()); }
  int group_of(int layer) const { return layers_[static_cast<size_t>(layer)].group; }
  int blocks(int group) const { return groups_[static_cast<size_t>(group)].blocks; }
  size_t block_bytes(int group) const { return groups_[static_cast<size_t>(group)].block_bytes; }
  uint8_t* block_at(int group, int32_t block) const {
    const Group& g = groups_[static_cast<size_t>(group)];
    return g.memory.data() + g.block_bytes * static_cast<size_t>(block);
  }
  size_t bytes() const;
  // The cache of `layer`, from a kv head on, as the sequence with this block table sees it.
  KvHead head(int layer, int kv_head, const int32_t* table) const;
  // The piece that holds place `slot` of a block.
  uint8_t* piece_at(int layer, int kv_head, int32_t block, int slot) const;
  const KvLayout& layout(int layer) const { return layers_[static_cast<size_t>(layer)].layout; }

 private:
  struct Layer {
    KvLayout layout;
    int group;
    size_t tile_stride, offset;  // offset: of the layer in a block
  };
  struct Group {
    int blocks;
    size_t block_bytes;
    Region memory;
  };
  int block_;
  std::vector<Layer> layers_;
  std::vector<Group> groups_;
};

}  // namespace localllm
