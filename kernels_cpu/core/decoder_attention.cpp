// The attention half of a layer: projections, cache, and the scheduling of attention itself.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/decoder.h"

namespace localllm {

// What one thread attends to at a time: some queries of a chunk by kv heads [head, head + heads),
// over one part of the tokens or, with part -1, all.
struct AttendItem {
  struct Tile {  // queries [first, first + count) of a chunk
    const Chunk* chunk;
    int first, count;
  };
  Tile tile;
  int head, heads, part;
};

namespace {

constexpr int kTileQueries = 16;  // queries that share one reading of keys and values

int padded(int head_dim) { return (head_dim + kGroup - 1) / kGroup * kGroup; }

int first_part(int position, int window) {
  return window > 0 ? std::max(0, position + 1 - window) / kPart : 0;
}

// Few queries take several heads together, since a block is read fastest from end to end.
std::vector<AttendItem> make_items(const Step& step, const LayerConfig& c, bool heads_together,
                                   bool by_parts) {
  std::vector<AttendItem> items;
  const auto add = [&](const AttendItem::Tile& tile, int part) {
    const int most = heads_together ? std::max(1, kTileQueries / tile.count) : 1;
    for (int head = 0; head < c.kv_heads; head += most)
      items.push_back({tile, head, std::min(most, c.kv_heads - head), part});
  };
  for (const Chunk& chunk : step.chunks)
    for (int q = 0; q < chunk.rows; q += kTileQueries) {
      const AttendItem::Tile tile{&chunk, q, std::min(kTileQueries, chunk.rows - q)};
      if (!by_parts) {
        add(tile, -1);
        continue;
      }
      const int first = chunk.start + q, last = first + tile.count - 1;
      for (int part = first_part(first, c.window); part <= last / kPart; ++part) add(tile, part);
    }
  return items;
}

// The item's rows as `attend` takes them; state(row, head, index) is where a row's sums belong.
template <class State>
void fill_rows(const AttendItem& item, const LayerConfig& c, const FloatRows& q, State state,
               AttentionRow* rows) {
  const int group = c.heads / c.kv_heads, count = item.tile.count * group;
  for (int i = 0; i < item.heads * count; ++i) {
    const int query = item.tile.first + i % count / group;
    const int row = item.tile.chunk->first_row + query;
    const int head = (item.head + i / count) * group + i % group;
    rows[i] = {q.row(row) + head * c.head_dim, state(row, head, i), item.tile.chunk->start + query};
  }
}

}  // namespace

size_t attention_scratch(const LayerConfig& c) {
  const auto rows = static_cast<size_t>(kTileQueries) * static_cast<size_t>(c.heads / c.kv_heads);
  const auto state = static_cast<size_t>(AttentionState::size(padded(c.head_dim)));
  return (2 * rows * state + attend_scratch(padded(c.head_dim))) * sizeof(float) +
         rows * sizeof(AttentionRow) + 256;
}

void Decoder::attention(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const Attention& a = layer.attention;
  const int width = program_.config.hidden;
  const bool quantized = !program_.config.float_activations;
  each_row(step.rows, 4 * width, [&](int r) { enter(layer.attn_norm, x_.row(r), &normed_, r); });
  adapt(index, normed_, {Target::kQ, Target::kK, Target::kV, Target::kHeadGate});
  const Input in = normed_.input(0, step.rows, quantized);
  const Product q{a.q, q_.row(0), q_.stride()}, k{a.k, key_.row(0), key_.stride()},
      v{a.v, value_.row(0), value_.stride()};
  if (a.v)
    multiply(in, {q, k, v});
  else if (a.k)
    multiply(in, {q, k});
  else
    multiply(in, {q});
  if (a.gate) multiply(in, {{a.gate, head_gate_.row(0), head_gate_.stride()}});
  for (const Chunk& chunk : step.chunks) {
    // Threads take whole runs of rows: neighbours write to the same cache lines.
    const int work = chunk.rows * (a.q_width + 4 * a.kv_width);
    const int grain = work < 65536 ? chunk.rows : 32;
    pool_.parallel(chunk.rows, grain, [&](int first, int last, int) {
      write_rows(step, index, chunk.first_row + first, chunk.first_row + last);
    });
  }
  attend(step, index);
  adapt(index, mixed_, {Target::kO});
  multiply(mixed_.input(0, step.rows, quantized), {{a.o, y_.row(0), y_.stride()}});
  each_row(step.rows, 4 * width, [&](int r) {
    add_delta(index, Target::kO, r, 0, width, y_.row(r));
    add_residual(layer, layer.attn_post_norm, a.o_bias, r);
  });
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
  const auto write_query = [&](int r) {
    float* q = q_.row(r);
    add_delta(index, Target::kQ, r, 0, a.q_width, q);
    if (a.q_bias) k_.add_scaled(a.q_bias, a.q_width, 1.0f, q);
    turn(r, q, c.heads, a.q_norm);
    // Scores are taken in units of log2; with a softcap that factor comes after the cap.
    constexpr float log2e = 1.44269504088896340736f;
    float scale = c.softcap > 0.0f ? c.scale : c.scale * log2e;
    if (c.query_growth != 0.0f) {
      const double periods = step.positions[r] / c.query_context;
      scale *= static_cast<float>(1.0 + static_cast<double>(c.query_growth) * std::log1p(periods));
    }
    k_.scale(q, a.q_width, scale);
    if (!layout.rotated()) return;
    for (int h = 0; h < c.heads; ++h) k_.rotate(q + h * c.head_dim, c.head_dim);
  };
  for (int r = first; r < last; ++r) {
    write_query(r);
    if (!a.k) continue;
    float *k = key_.row(r), *v = value_.row(r);
    add_delta(index, Target::kK, r, 0, a.kv_width, k);
    if (a.k_bias) k_.add_scaled(a.k_bias, a.kv_width, 1.0f, k);
    if (a.v) {
      add_delta(index, Target::kV, r, 0, a.kv_width, v);
      if (a.v_bias) k_.add_scaled(a.v_bias, a.kv_width, 1.0f, v);
    } else {
      std::memcpy(v, k, static_cast<size_t>(a.kv_width) * sizeof(float));
    }
    turn(r, k, c.kv_heads, a.k_norm);
    for (int h = 0; h < c.kv_heads; ++h) {
      float* head = v + h * c.head_dim;
      if (a.v_norm.present) k_.norm(head, c.head_dim, a.v_norm.params, head);
      if (!layout.rotated()) continue;
      k_.rotate(k + h * c.head_dim, c.head_dim);
      k_.rotate(head, c.head_dim);
    }
    const int position = step.positions[r], slot = position % layout.block;
    const int32_t block = chunk->table(kv_.group_of(index))[position / layout.block];
    for (int h = 0; h < c.kv_heads; ++h)
      k_.write_kv(layout, kv_.piece_at(index, h, block, slot), slot % layout.tile,
                  k + h * c.head_dim, v + h * c.head_dim);
  }
}

void Decoder::attend(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  // Few items would leave threads idle over a long context: then its parts are shared out too.
  // The order of operations, and so every bit, is the same either way.
  const auto enough = [&](const std::vector<AttendItem>& items) {
    return pool_.size() == 1 || static_cast<int>(items.size()) >= 4 * pool_.size();
  };
  std::vector<AttendItem> items = make_items(step, c, true, false);
  if (enough(items)) {
    attend_whole(items, index);
  } else {
    items = make_items(step, c, true, true);
    attend_in_parts(step, enough(items) ? items : make_items(step, c, false, true), index);
  }
  const int width = c.heads * c.head_dim;
  const Attention& a = program_.layers[static_cast<size_t>(index)].attention;
  each_row(step.rows, 2 * width, [&](int r) {
    if (a.gate) {
      float* g = head_gate_.row(r);
      add_delta(index, Target::kHeadGate, r, 0, width, g);
      if (a.gate_bias) k_.add_scaled(a.gate_bias, width, 1.0f, g);
      k_.gate(g, width, mixed_.row(r));
    }
    quantize(&mixed_, r, width);
  });
}

void Decoder::finish_head(float* state, int index, int row, int head) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const int head_dim = layer.config.head_dim, dim = padded(head_dim);
  const std::vector<float>& sinks = layer.attention.sinks;
  if (!sinks.empty())
    k_.merge_state(state, sinks.data() + static_cast<ptrdiff_t>(head) * AttentionState::size(dim),
                   dim);
  float* out = mixed_.row(row) + head * head_dim;
  k_.finish_state(state, head_dim, out);
  if (kv_.layout(index).rotated()) k_.rotate(out, head_dim);
}

void Decoder::attend_whole(const std::vector<AttendItem>& items, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  const int group = c.heads / c.kv_heads, dim = padded(c.head_dim);
  const int size = AttentionState::size(dim);
  const AttentionParams params{c.window, c.softcap};
  pool_.parallel(static_cast<int>(items.size()), 1, [&](int from, int to, int thread) {
    float* merged = reinterpret_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].data());
    float* fresh = merged + static_cast<ptrdiff_t>(kTileQueries) * group * size;
    float* tokens = fresh + static_cast<ptrdiff_t>(kTileQueries) * group * size;
    auto* rows = reinterpret_cast<AttentionRow*>(tokens + attend_scratch(dim));
    for (int n = from; n < to; ++n) {
      // Last tiles first: they see the most tokens, and the short ones fill the gaps.
      const AttendItem& item = items[items.size() - 1 - static_cast<size_t>(n)];
      const int count = item.tile.count * group, all = item.heads * count;
      fill_rows(
          item, c, q_, [&](int, int, int i) { return fresh + static_cast<ptrdiff_t>(i) * size; },
          rows);
      const KvHead kv = kv_.head(index, item.head, item.tile.chunk->table(kv_.group_of(index)));
      const int last_position = rows[count - 1].position;
      for (int part = first_part(rows[0].position, c.window); part <= last_position / kPart;
           ++part) {
        for (int i = 0; i < all; ++i) k_.reset_state(rows[i].state, dim);
        k_.attend(kv, params, rows, count, item.heads, part, tokens);
        for (int i = 0; i < all; ++i) {
          const int begins = first_part(rows[i].position, c.window);
          if (part < begins || rows[i].position < part * kPart) continue;
          float* into = merged + static_cast<ptrdiff_t>(i) * size;
          if (part == begins)
            std::memcpy(into, rows[i].state, static_cast<size_t>(size) * sizeof(float));
          else
            k_.merge_state(into, rows[i].state, dim);
        }
      }
      for (int i = 0; i < all; ++i)
        finish_head(merged + static_cast<ptrdiff_t>(i) * size, index,
                    item.tile.chunk->first_row + item.tile.first + i % count / group,
                    (item.head + i / count) * group + i % group);
    }
  });
}

void Decoder::attend_in_parts(const Step& step, const std::vector<AttendItem>& items, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  const int group = c.heads / c.kv_heads, dim = padded(c.head_dim);
  const int size = AttentionState::size(dim);
  const AttentionParams params{c.window, c.softcap};
  int parts = 1;
  for (const AttendItem& item : items) parts = std::max(parts, item.part + 1);
  states_.reserve(static_cast<size_t>(step.rows) * static_cast<size_t>(c.heads) *
                  static_cast<size_t>(parts) * static_cast<size_t>(size));
  const auto state_at = [&](int row, int head, int part) {
    return states_.data() + ((static_cast<ptrdiff_t>(row) * c.heads + head) * parts + part) * size;
  };
  pool_.parallel(static_cast<int>(items.size()), 1, [&](int from, int to, int thread) {
    float* tokens = reinterpret_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].data());
    auto* rows = reinterpret_cast<AttentionRow*>(tokens + attend_scratch(dim));
    for (int n = from; n < to; ++n) {
      const AttendItem& item = items[static_cast<size_t>(n)];
      const int count = item.tile.count * group;
      fill_rows(
          item, c, q_, [&](int row, int head, int) { return state_at(row, head, item.part); },
          rows);
      for (int i = 0; i < item.heads * count; ++i) k_.reset_state(rows[i].state, dim);
      k_.attend(kv_.head(index, item.head, item.tile.chunk->table(kv_.group_of(index))), params,
                rows, count, item.heads, item.part, tokens);
    }
  });
  each_row(step.rows, 2 * c.heads * size, [&](int r) {
    const int position = step.positions[r], begins = first_part(position, c.window);
    for (int h = 0; h < c.heads; ++h) {
      float* into = state_at(r, h, begins);
      for (int part = begins + 1; part <= position / kPart; ++part)
        k_.merge_state(into, state_at(r, h, part), dim);
      finish_head(into, index, r, h);
    }
  });
}

}  // namespace localllm
