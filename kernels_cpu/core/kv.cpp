#include "core/kv.h"

namespace localllm {

namespace {

size_t align64(size_t n) { return (n + 63) / 64 * 64; }

}  // namespace

KvLayout kv_layout(KvKind kind, int block, int head_dim) {
  KvLayout l;
  l.kind = kind;
  l.block = block;
  l.head_dim = head_dim;
  l.padded_dim = (head_dim + 15) / 16 * 16;
  const auto tokens = static_cast<size_t>(block);
  const auto dim = static_cast<size_t>(head_dim), padded = static_cast<size_t>(l.padded_dim);
  const size_t groups = (dim + kGroup - 1) / kGroup;
  switch (kind) {
    case KvKind::kFloat32:
    case KvKind::kFloat16: {
      const size_t width = kind == KvKind::kFloat32 ? 4 : 2;
      l.values_at = align64(dim * tokens * width);
      l.head_bytes = align64(l.values_at + tokens * padded * width);
      return l;
    }
    case KvKind::kInt8:
      l.values_at = align64(dim * tokens);
      l.key_scales_at = align64(l.values_at + tokens * padded);
      break;
    case KvKind::kInt4:
      l.values_at = align64((dim + 1) / 2 * tokens);
      l.key_scales_at = align64(l.values_at + tokens * padded / 2);
      break;
  }
  l.value_scales_at = l.key_scales_at + align64(groups * tokens * 2);
  l.head_bytes = l.value_scales_at + align64(groups * tokens * 2);
  return l;
}

void KvPool::add_layer(int kv_heads, int head_dim) {
  Layer layer{kv_layout(kind_, block_, head_dim), 0, {}};
  layer.block_stride = layer.layout.head_bytes * static_cast<size_t>(kv_heads);
  layer.memory = Region::allocate(layer.block_stride * static_cast<size_t>(blocks_));
  layers_.push_back(std::move(layer));
}

size_t KvPool::bytes() const {
  size_t total = 0;
  for (const Layer& l : layers_) total += l.memory.size();
  return total;
}

KvHead KvPool::head(int layer, int kv_head, const int32_t* table) const {
  const Layer& l = layers_[static_cast<size_t>(layer)];
  return {&l.layout, l.memory.data() + l.layout.head_bytes * static_cast<size_t>(kv_head),
          l.block_stride, table};
}

uint8_t* KvPool::block_at(int layer, int kv_head, int32_t block) const {
  const Layer& l = layers_[static_cast<size_t>(layer)];
  return l.memory.data() + l.block_stride * static_cast<size_t>(block) +
         l.layout.head_bytes * static_cast<size_t>(kv_head);
}

}  // namespace localllm
