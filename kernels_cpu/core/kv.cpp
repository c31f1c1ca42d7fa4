#include "core/kv.h"

#include <stdexcept>

namespace localllm {

namespace {

size_t align64(size_t n) { return (n + 63) / 64 * 64; }

}  // namespace

KvKind kv_kind(int bits) {
  switch (bits) {
    case 32: return KvKind::kFloat32;
    case 16: return KvKind::kFloat16;
    case 8: return KvKind::kInt8;
    case 4: return KvKind::kInt4;
    default: throw std::invalid_argument("kv_bits must be 32, 16, 8 or 4");
  }
}

KvLayout kv_layout(KvKind kind, int block, int head_dim) {
  KvLayout l;
  l.kind = kind;
  l.block = block;
  l.tile = block % kStep == 0 ? kStep : block;
  l.head_dim = head_dim;
  l.padded_dim = (head_dim + kGroup - 1) / kGroup * kGroup;
  constexpr int bits[] = {32, 16, 8, 4};
  const auto codes = [&](int entries) {
    const auto bytes = static_cast<size_t>(entries) * static_cast<size_t>(l.tile);
    return bytes * static_cast<size_t>(bits[static_cast<int>(kind)]) / 8;
  };
  l.record_bytes = l.scale_bytes() + codes(kGroup);
  const int whole = head_dim / kGroup, rest = head_dim % kGroup;
  const size_t rest_bytes = rest ? l.scale_bytes() + codes((rest + 1) / 2 * 2) : 0;
  l.values_at = align64(static_cast<size_t>(whole) * l.record_bytes + rest_bytes);
  l.piece_bytes =
      align64(l.values_at + static_cast<size_t>(l.padded_dim / kGroup) * l.record_bytes);
  return l;
}

KvPool::KvPool(KvKind kind, int block, const std::vector<KvLayer>& layers,
               const std::vector<int>& blocks)
    : block_(block) {
  for (const int count : blocks) groups_.push_back({count, 0, {}});
  for (const KvLayer& layer : layers) {
    if (layer.source >= 0) {
      layers_.push_back(layers_.at(static_cast<size_t>(layer.source)));
      continue;
    }
    if (layer.group < 0 || layer.group >= groups()) throw std::invalid_argument("no such KV group");
    size_t& offset = groups_[static_cast<size_t>(layer.group)].block_bytes;
    const KvLayout l = kv_layout(kind, block, layer.head_dim);
    const size_t tile_stride = l.piece_bytes * static_cast<size_t>(layer.kv_heads);
    layers_.push_back({l, layer.group, tile_stride, offset});
    offset += tile_stride * static_cast<size_t>(block / l.tile);
  }
  for (Group& g : groups_)
    g.memory = Region::allocate(g.block_bytes * static_cast<size_t>(g.blocks));
}

size_t KvPool::bytes() const {
  size_t total = 0;
  for (const Group& g : groups_) total += g.memory.size();
  return total;
}

KvHead KvPool::head(int layer, int kv_head, const int32_t* table) const {
  const Layer& l = layers_[static_cast<size_t>(layer)];
  const Group& g = groups_[static_cast<size_t>(l.group)];
  const size_t at = l.offset + l.layout.piece_bytes * static_cast<size_t>(kv_head);
  return {&l.layout, g.memory.data() + at, g.block_bytes, l.tile_stride, table};
}

uint8_t* KvPool::piece_at(int layer, int kv_head, int32_t block, int slot) const {
  const Layer& l = layers_[static_cast<size_t>(layer)];
  return block_at(l.group, block) + l.offset +
         l.tile_stride * static_cast<size_t>(slot / l.layout.tile) +
         l.layout.piece_bytes * static_cast<size_t>(kv_head);
}

}  // namespace localllm
