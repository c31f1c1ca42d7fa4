// Writing a token into a cache block, and reading steps back as float32.
#pragma once

#include "simd/kv_codes.h"
#include "simd/kv_quant.h"

namespace localllm::LOCALLLM_ISA {
namespace {

inline void write_dense(const KvLayout& l, uint8_t* record, int slot, const float* x, int n,
                        bool key) {
  if (l.kind == KvKind::kFloat32) {
    auto* to = reinterpret_cast<float*>(record);
    for (int i = 0; i < n; ++i) to[key ? i * l.tile + slot : slot * kGroup + i] = x[i];
    return;
  }
  auto* to = reinterpret_cast<uint16_t*>(record);
  each_vec(n, [&](int i, auto part) {
    uint16_t half[16];
    store_half(half, hold_half(load(x + i, part)));
    for (int k = 0; k < 16 && i + k < n; ++k)
      to[key ? (i + k) * l.tile + slot : slot * kGroup + i + k] = half[k];
  });
}

inline void write_codes(const KvLayout& l, uint8_t* record, int slot, const float* x, int n,
                        bool key) {
  const bool nibbles = l.kind == KvKind::kInt4;
  int8_t codes[kGroup];
  reinterpret_cast<uint16_t*>(record)[slot] = quantize_entries(x, n, nibbles, codes);
  uint8_t* to = record + l.scale_bytes();
  if (!nibbles) {
    for (int i = 0; i < n; ++i)
      to[key ? i * l.tile + slot : slot * kGroup + i] = static_cast<uint8_t>(codes[i]);
    return;
  }
  const auto pair = [&](int low, int high) {
    return static_cast<uint8_t>(codes[low] | codes[high] << 4);
  };
  if (key)
    for (int i = 0; 2 * i < n; ++i) to[i * l.tile + slot] = pair(2 * i, 2 * i + 1);
  else
    for (int i = 0; i < 16; ++i) to[slot * 16 + i] = pair(i, i + 16);
}

void write_kv(const KvLayout& l, uint8_t* piece, int slot, const float* k, const float* v) {
  const auto write = l.quantized() ? write_codes : write_dense;
  for (int d = 0; d < l.head_dim; d += kGroup) {
    const int n = l.head_dim - d < kGroup ? l.head_dim - d : kGroup;
    const size_t at = static_cast<size_t>(d / kGroup) * l.record_bytes;
    write(l, piece + at, slot, k + d, n, true);
    write(l, piece + l.values_at + at, slot, v + d, n, false);
  }
}

// A record in scratch: kStep scales when SCALED, then 32 x 32 codes, as float32.
template <bool SCALED>
constexpr int kWideRecord = kGroup * kStep + (SCALED ? kStep : 0);

// A whole tile of kStep tokens to scratch.
template <class Code, bool SCALED>
void widen_tile(const KvLayout& l, const uint8_t* piece, float* keys, float* values) {
  const auto scales = [&](const uint8_t* record, float* to) {
    if (!SCALED) return;
    const auto* from = reinterpret_cast<const uint16_t*>(record);
    store(to, load(from));
    store(to + 16, load(from + 16));
  };
  const size_t codes_at = l.scale_bytes();
  constexpr int wide_at = SCALED ? kStep : 0;
  for (int d = 0; d < l.padded_dim; d += kGroup) {
    const uint8_t* record = piece + static_cast<size_t>(d / kGroup) * l.record_bytes;
    scales(record, keys);
    const int n = l.head_dim - d < kGroup ? l.head_dim - d : kGroup;
    float* to = keys + wide_at;
    each_key(
        reinterpret_cast<const Code*>(record + codes_at), n, 0,
        [&](int i, auto half, const Vec& key) { store(to + i * kStep + 16 * half.value, key); });
    record += l.values_at;
    scales(record, values);
    const auto* codes = reinterpret_cast<const Code*>(record + codes_at);
    to = values + wide_at;
    for (int t = 0; t < kStep; ++t)
      for (int half = 0; half < 2; ++half)
        store(to + t * kGroup + 16 * half, value_half(value_row(codes, t), half));
    keys += kWideRecord<SCALED>;
    values += kWideRecord<SCALED>;
  }
}

// Code `i` of a row (K: of one entry, i a slot; V: of one token, i an entry) as a number.
inline float code_at(const KvLayout& l, const uint8_t* codes, int entry, int slot, bool key) {
  const ptrdiff_t at = key ? static_cast<ptrdiff_t>(entry) * l.tile + slot
                           : static_cast<ptrdiff_t>(slot) * kGroup + entry;
  switch (l.kind) {
    case KvKind::kFloat32: return reinterpret_cast<const float*>(codes)[at];
    case KvKind::kFloat16: {
      const uint16_t half[16] = {reinterpret_cast<const uint16_t*>(codes)[at]};
      float out[16];
      store(out, load(half));
      return out[0];
    }
    case KvKind::kInt8: return static_cast<float>(static_cast<int8_t>(codes[at]));
    case KvKind::kInt4: break;
  }
  const bool high = key ? entry & 1 : entry >= 16;
  const int byte = key ? codes[static_cast<ptrdiff_t>(entry / 2) * l.tile + slot]
                       : codes[static_cast<ptrdiff_t>(slot) * 16 + entry % 16];
  return static_cast<float>(kLevels[high ? byte >> 4 : byte & 15]);
}

// One token of a record: to column t of the keys in scratch, or to row t of the values.
template <bool SCALED>
void widen_entries(const KvLayout& l, const uint8_t* record, int slot, int n, bool key, int t,
                   float* to) {
  if (SCALED) {
    const uint16_t half[16] = {reinterpret_cast<const uint16_t*>(record)[slot]};
    float scale[16];
    store(scale, load(half));
    to[t] = scale[0];
    to += kStep;
  }
  const uint8_t* codes = record + l.scale_bytes();
  for (int i = 0; i < n; ++i)
    to[key ? i * kStep + t : t * kGroup + i] = code_at(l, codes, i, slot, key);
}

template <bool SCALED>
void widen_token(const KvLayout& l, const uint8_t* piece, int slot, int t, float* keys,
                 float* values) {
  for (int d = 0; d < l.head_dim; d += kGroup) {
    const uint8_t* record = piece + static_cast<size_t>(d / kGroup) * l.record_bytes;
    const int n = l.head_dim - d < kGroup ? l.head_dim - d : kGroup;
    widen_entries<SCALED>(l, record, slot, n, true, t, keys);
    widen_entries<SCALED>(l, record + l.values_at, slot, n, false, t, values);
    keys += kWideRecord<SCALED>;
    values += kWideRecord<SCALED>;
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
