// The attention half of a layer: projections, cache, and the scheduling of attention itself.
#include <algorithm>
#include <cstring>

#include "core/decoder.h"

namespace localllm {

namespace {

constexpr int kTileQueries = 16;  // queries that share one reading of keys and values

int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }

int first_part(int position, int window) {
  return window > 0 ? std::max(0, position + 1 - window) / kPart : 0;
}

// A run of queries of one chunk.
struct Tile {
  const Chunk* chunk;
  int first, count;
};

std::vector<Tile> make_tiles(const Step& step) {
  std::vector<Tile> tiles;
  for (const Chunk& c : step.chunks)
    for (int q = 0; q < c.rows; q += kTileQueries)
      tiles.push_back({&c, q, std::min(kTileQueries, c.rows - q)});
  return tiles;
}

}  // namespace

size_t attention_scratch(const LayerConfig& c) {
  const auto rows = static_cast<size_t>(kTileQueries) * static_cast<size_t>(c.heads / c.kv_heads);
  const auto state = static_cast<size_t>(AttentionState::size(padded(c.head_dim)));
  const size_t step = 2 * kStep * static_cast<size_t>(padded(c.head_dim)) + 16;
  return (2 * rows * state + step) * sizeof(float) + rows * sizeof(AttentionRow) + 256;
}

void Decoder::attention(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const Attention& a = layer.attention;
  const int width = program_.config.hidden;
  const bool quantized = !program_.config.float_activations;
  each_row(step.rows, 4 * width, [&](int r) { enter(layer.attn_norm, x_.row(r), &normed_, r); });
  multiply(normed_.input(0, step.rows, quantized), {{a.q, q_.row(0), q_.stride()},
                                                    {a.k, key_.row(0), key_.stride()},
                                                    {a.v, value_.row(0), value_.stride()}});
  for (const Chunk& chunk : step.chunks) {
    // Threads take whole runs of rows: neighbours write to the same cache lines.
    const int work = chunk.rows * (a.q_width + 4 * a.kv_width);
    const int grain = work < 65536 ? chunk.rows : 32;
    pool_.parallel(chunk.rows, grain, [&](int first, int last, int) {
      write_rows(step, index, chunk.first_row + first, chunk.first_row + last);
    });
  }
  attend(step, index);
  multiply(mixed_.input(0, step.rows, quantized), {{a.o, y_.row(0), y_.stride()}});
  each_row(step.rows, 4 * width,
           [&](int r) { add_residual(layer, layer.attn_post_norm, a.o_bias, r); });
}

// Bias, qk-norm and RoPE of the rows; keys and values into the cache, queries scaled in place.
void Decoder::write_rows(const Step& step, int index, int first, int last) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const LayerConfig& c = layer.config;
  const Attention& a = layer.attention;
  const KvLayout& layout = kv_.layout(index);
  const auto chunk = std::find_if(step.chunks.begin(), step.chunks.end(), [&](const Chunk& k) {
    return first >= k.first_row && first < k.first_row + k.rows;
  });
  const auto turn = [&](int r, float* x, int heads, const Norm& norm) {
    if (norm.present && c.qk_norm_all) k_.norm(x, heads * c.head_dim, norm.params, x);
    for (int h = 0; h < heads; ++h) {
      float* head = x + h * c.head_dim;
      if (norm.present && !c.qk_norm_all) k_.norm(head, c.head_dim, norm.params, head);
      if (c.rope < 0) continue;
      const RopeRows& rope = step.ropes[static_cast<size_t>(c.rope)];
      const float* cos = rope.table + static_cast<ptrdiff_t>(rope.index[r]) * 2 * rope.half;
      k_.rope(cos, cos + rope.half, rope.half, head);
    }
  };
  for (int r = first; r < last; ++r) {
    float *q = q_.row(r), *k = key_.row(r), *v = value_.row(r);
    if (a.q_bias) k_.add_scaled(a.q_bias, a.q_width, 1.0f, q);
    if (a.k_bias) k_.add_scaled(a.k_bias, a.kv_width, 1.0f, k);
    if (a.v_bias) k_.add_scaled(a.v_bias, a.kv_width, 1.0f, v);
    turn(r, q, c.heads, a.q_norm);
    turn(r, k, c.kv_heads, a.k_norm);
    // Scores are taken in units of log2; with a softcap that factor comes after the cap.
    constexpr float log2e = 1.44269504088896340736f;
    k_.scale(q, a.q_width, c.softcap > 0.0f ? c.scale : c.scale * log2e);
    const int position = step.positions[r];
    const int32_t block = chunk->table[position / layout.block];
    for (int h = 0; h < c.kv_heads; ++h)
      k_.write_kv(layout, kv_.block_at(index, h, block), position % layout.block,
                  k + h * c.head_dim, v + h * c.head_dim);
  }
}

void Decoder::attend(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  const int tiles = static_cast<int>(make_tiles(step).size());
  // Few items would leave threads idle over a long context: then its parts are shared out too.
  // The order of operations, and so every bit, is the same either way.
  if (pool_.size() > 1 && tiles * c.kv_heads < 4 * pool_.size())
    attend_in_parts(step, index);
  else
    attend_whole(step, index);
  const int width = c.heads * c.head_dim;
  each_row(step.rows, 2 * width, [&](int r) { quantize(&mixed_, r, width); });
}

void Decoder::attend_whole(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  const std::vector<Tile> tiles = make_tiles(step);
  const int group = c.heads / c.kv_heads, dim = padded(c.head_dim);
  const int size = AttentionState::size(dim);
  const AttentionParams params{c.window, c.softcap};
  pool_.parallel(static_cast<int>(tiles.size()) * c.kv_heads, 1, [&](int from, int to, int thread) {
    float* merged = reinterpret_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].data());
    for (int item = from; item < to; ++item) {
      // Last tiles first: they see the most tokens, and the short ones fill the gaps.
      const Tile& tile = tiles[tiles.size() - 1 - static_cast<size_t>(item / c.kv_heads)];
      const int kv_head = item % c.kv_heads, count = tile.count * group;
      float* fresh = merged + static_cast<ptrdiff_t>(kTileQueries) * group * size;
      float* tokens = fresh + static_cast<ptrdiff_t>(kTileQueries) * group * size;
      auto* rows = reinterpret_cast<AttentionRow*>(tokens + 2 * kStep * dim + 16);
      for (int i = 0; i < count; ++i) {
        const int q = tile.first + i / group;
        rows[i] = {q_.row(tile.chunk->first_row + q) + (kv_head * group + i % group) * c.head_dim,
                   fresh + static_cast<ptrdiff_t>(i) * size, tile.chunk->start + q};
      }
      const KvHead kv = kv_.head(index, kv_head, tile.chunk->table);
      const int last_position = rows[count - 1].position;
      for (int part = first_part(rows[0].position, c.window); part <= last_position / kPart;
           ++part) {
        for (int i = 0; i < count; ++i) k_.reset_state(rows[i].state, dim);
        k_.attend(kv, params, rows, count, part, tokens);
        for (int i = 0; i < count; ++i) {
          const int begins = first_part(rows[i].position, c.window);
          if (part < begins || rows[i].position < part * kPart) continue;
          float* into = merged + static_cast<ptrdiff_t>(i) * size;
          if (part == begins)
            std::memcpy(into, rows[i].state, static_cast<size_t>(size) * sizeof(float));
          else
            k_.merge_state(into, rows[i].state, dim);
        }
      }
      for (int i = 0; i < count; ++i)
        k_.finish_state(merged + static_cast<ptrdiff_t>(i) * size, c.head_dim,
                        mixed_.row(tile.chunk->first_row + tile.first + i / group) +
                            (kv_head * group + i % group) * c.head_dim);
    }
  });
}

void Decoder::attend_in_parts(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  const int group = c.heads / c.kv_heads, dim = padded(c.head_dim);
  const int size = AttentionState::size(dim);
  const AttentionParams params{c.window, c.softcap};

  struct Item {
    Tile tile;
    int part;
  };
  std::vector<Item> items;
  int parts = 1;
  for (const Tile& t : make_tiles(step)) {
    const int first = t.chunk->start + t.first, last = first + t.count - 1;
    for (int part = first_part(first, c.window); part <= last / kPart; ++part)
      items.push_back({t, part});
    parts = std::max(parts, last / kPart + 1);
  }
  states_.reserve(static_cast<size_t>(step.rows) * static_cast<size_t>(c.heads) *
                  static_cast<size_t>(parts) * static_cast<size_t>(size));
  const auto state_at = [&](int row, int head, int part) {
    return states_.data() + ((static_cast<ptrdiff_t>(row) * c.heads + head) * parts + part) * size;
  };
  pool_.parallel(static_cast<int>(items.size()) * c.kv_heads, 1, [&](int from, int to, int thread) {
    float* tokens = reinterpret_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].data());
    auto* rows = reinterpret_cast<AttentionRow*>(tokens + 2 * kStep * dim + 16);
    for (int i = from; i < to; ++i) {
      const Item& item = items[static_cast<size_t>(i / c.kv_heads)];
      const Tile& tile = item.tile;
      const int kv_head = i % c.kv_heads, count = tile.count * group;
      for (int n = 0; n < count; ++n) {
        const int q = tile.first + n / group, row = tile.chunk->first_row + q;
        const int head = kv_head * group + n % group;
        rows[n] = {q_.row(row) + head * c.head_dim, state_at(row, head, item.part),
                   tile.chunk->start + q};
        k_.reset_state(rows[n].state, dim);
      }
      k_.attend(kv_.head(index, kv_head, tile.chunk->table), params, rows, count, item.part,
                tokens);
    }
  });
  each_row(step.rows, 2 * c.heads * size, [&](int r) {
    const int position = step.positions[r], begins = first_part(position, c.window);
    for (int h = 0; h < c.heads; ++h) {
      float* into = state_at(r, h, begins);
      for (int part = begins + 1; part <= position / kPart; ++part)
        k_.merge_state(into, state_at(r, h, part), dim);
      k_.finish_state(into, c.head_dim, mixed_.row(r) + h * c.head_dim);
    }
  });
}

}  // namespace localllm
