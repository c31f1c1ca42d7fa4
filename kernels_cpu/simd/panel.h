// Reading packed panels: records one after another, group tables as float32.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

template <int BITS>
constexpr int block_bytes() {
  return BITS * 64;
}

// Group values without multipliers: [groups][16], each written `repeat` times.
template <class T>
inline float* expand_plain(const T* values, int groups, int repeat, float* out) {
  if (repeat == 1) {
    for (int g = 0; g < groups; ++g, values += kLanes, out += kLanes) store(out, load(values));
    return out;
  }
  for (int g = 0; g < groups; ++g, values += kLanes) {
    const Vec v = load(values);
    for (int i = 0; i < repeat; ++i, out += kLanes) store(out, v);
  }
  return out;
}

// The same with a small integer a group, `per` groups to a value.
template <class T>
inline float* expand_two_level(const T* values, const GroupTable& t, const uint8_t* multipliers,
                               int groups, int repeat, float* out) {
  for (int g = 0; g < groups; values += kLanes) {
    const Vec value = load(values);
    for (int i = 0; i < t.groups_per_value; ++i, ++g, multipliers += kLanes) {
      const IVec m = t.multiplier > 0 ? load_uint8(multipliers)
                                      : load_int8(reinterpret_cast<const int8_t*>(multipliers));
      const Vec v = mul(value, to_float(m));
      for (int r = 0; r < repeat; ++r, out += kLanes) store(out, v);
    }
  }
  return out;
}

// A group table of one record as float32, one entry per 32 inputs (per 16 for group 16).
inline void expand(const Matrix& w, const GroupTable& t, const uint8_t* record, float* out) {
  const int groups = w.groups_in(w.record_blocks);
  const int repeat = w.group <= kGroup ? 1 : w.group / kGroup;
  const auto fill = [&](const auto* values) {
    if (t.multiplier == 0)
      expand_plain(values, groups, repeat, out);
    else
      expand_two_level(values, t, record + t.multipliers_at, groups, repeat, out);
  };
  if (t.half)
    fill(reinterpret_cast<const uint16_t*>(record + t.values_at));
  else
    fill(reinterpret_cast<const float*>(record + t.values_at));
}

// Where a tile finds the scales and biases of some blocks: expanded to float32 in scratch, or
// float16 where they lie.
struct Expanded {
  const float *scales, *biases;
  Vec scale(int i) const { return load(scales + static_cast<ptrdiff_t>(i) * kLanes); }
  Vec bias(int i) const { return load(biases + static_cast<ptrdiff_t>(i) * kLanes); }
};
struct InPlace {
  const uint16_t *scales, *biases;
  int shift;  // log2 of the blocks that share a group
  Vec scale(int i) const { return load(scales + static_cast<ptrdiff_t>(i >> shift) * kLanes); }
  Vec bias(int i) const { return load(biases + static_cast<ptrdiff_t>(i >> shift) * kLanes); }
};

// log2 of the blocks a group spans, or -1 if its values cannot be read where they lie.
inline int in_place_shift(const Matrix& w) {
  const auto plain = [](const GroupTable& t) { return !t.present || (t.half && !t.multiplier); };
  if (!plain(w.scales) || !plain(w.biases)) return -1;
  if (w.group == 16) return 0;
  for (int shift = 0; shift < 4; ++shift)
    if (w.group == kGroup << shift) return shift;
  return -1;
}

inline InPlace view_record(const Matrix& w, const uint8_t* record, int shift) {
  return {reinterpret_cast<const uint16_t*>(record + w.scales.values_at),
          reinterpret_cast<const uint16_t*>(record + w.biases.values_at), shift};
}

inline Expanded expand_record(const Matrix& w, const uint8_t* record, float* scales,
                              float* biases) {
  expand(w, w.scales, record, scales);
  if (w.biases.present) expand(w, w.biases, record, biases);
  return {scales, biases};
}

// Scratch of a panel: its expanded tables, and behind them room for its codes or weights. Tables
// cover whole records, which may reach past the last block.
struct PanelScratch {
  float *scales, *biases, *rest;
};
inline PanelScratch panel_scratch(const Matrix& w, void* scratch) {
  const int records = (w.blocks() + w.record_blocks - 1) / w.record_blocks;
  const ptrdiff_t entries = records * w.record_blocks * (w.group == 16 ? 2 : 1);
  float* scales = align64(scratch);
  float* biases = scales + entries * kLanes;
  return {scales, biases, biases + entries * kLanes};
}

// f(record, its first block, its blocks) for each record of a panel.
template <class F>
inline void each_record(const Matrix& w, const uint8_t* panel, F&& f) {
  const int blocks = w.blocks();
  for (int first = 0; first < blocks; first += w.record_blocks, panel += w.record_bytes)
    f(panel, first, blocks - first < w.record_blocks ? blocks - first : w.record_blocks);
}

// All group tables of a panel, expanded.
inline Expanded expand_panel(const Matrix& w, const uint8_t* panel, const PanelScratch& scratch) {
  const ptrdiff_t per_block = (w.group == 16 ? 2 : 1) * kLanes;
  each_record(w, panel, [&](const uint8_t* record, int first, int) {
    expand_record(w, record, scratch.scales + first * per_block,
                  scratch.biases + first * per_block);
  });
  return {scratch.scales, scratch.biases};
}

inline void store_row(float* out, const Vec& y, int valid_rows) {
  if (valid_rows >= kLanes)
    store(out, y);
  else
    store(out, y, valid_rows);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
