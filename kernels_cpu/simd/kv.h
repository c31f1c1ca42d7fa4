// Writing a token into a cache block and reading it back.
#pragma once

#include "simd/kernels.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

// float16 with finite values held inside its range; NaN and infinity: NaN stays, infinity is held.
inline Vec hold_half(const Vec& x) { return min(set1(65504.0f), max(set1(-65504.0f), x)); }

// Codes of up to 32 entries, |code| <= limit, and their float16 scale. A group that is not finite
// gets scale NaN.
inline uint16_t quantize_entries(const float* x, int n, int limit, int8_t* codes) {
  const int low = n < 16 ? n : 16, high = n - low;
  const Vec a = load(x, low), b = load(x + low, high);
  const IVec no_sign = set1(int32_t{0x7fffffff});
  const int32_t largest = reduce_max(max(bit_and(bits(a), no_sign), bit_and(bits(b), no_sign)));
  uint16_t half[16];
  if (largest >= 0x7f800000) {
    for (int i = 0; i < 32; ++i) codes[i] = 0;
    return 0x7e00;
  }
  const Vec amax = from_bits(set1(largest));
  store_half(half, hold_half(div(amax, set1(static_cast<float>(limit)))));
  float scale[16];
  store(scale, load(half));  // codes are chosen for the rounded scale
  const float inverse = scale[0] > 0.0f ? 1.0f / scale[0] : 0.0f;
  const Vec top = set1(static_cast<float>(limit)), bottom = set1(static_cast<float>(-limit));
  const auto round = [&](const Vec& v) {
    return to_int(min(top, max(bottom, mul(v, set1(inverse)))));
  };
  store_int8(codes, round(a));
  store_int8(codes + 16, round(b));
  return half[0];
}

void write_kv(const KvLayout& l, uint8_t* block, int slot, const float* k, const float* v) {
  if (l.kind == KvKind::kFloat16) {
    auto* keys = reinterpret_cast<uint16_t*>(block);
    auto* values = keys + l.values_at / 2 + static_cast<ptrdiff_t>(slot) * l.padded_dim;
    each_vec(l.head_dim, [&](int i, auto part) {
      uint16_t half[16];
      store_half(half, hold_half(load(k + i, part)));
      for (int j = 0; j < 16 && i + j < l.head_dim; ++j)
        keys[static_cast<ptrdiff_t>(i + j) * l.block + slot] = half[j];
      store_half(values + i, hold_half(load(v + i, part)));
    });
    return;
  }
  if (l.kind == KvKind::kFloat32) {
    auto* keys = reinterpret_cast<float*>(block);
    float* values = keys + l.values_at / 4 + static_cast<ptrdiff_t>(slot) * l.padded_dim;
    for (int d = 0; d < l.head_dim; ++d) {
      keys[static_cast<ptrdiff_t>(d) * l.block + slot] = k[d];
      values[d] = v[d];
    }
    return;
  }
  const bool nibbles = l.kind == KvKind::kInt4;
  const int limit = nibbles ? 7 : 127;
  auto* key_scales = reinterpret_cast<uint16_t*>(block + l.key_scales_at);
  auto* value_scales = reinterpret_cast<uint16_t*>(block + l.value_scales_at);
  for (int d = 0, g = 0; d < l.head_dim; d += kGroup, ++g) {
    const int n = l.head_dim - d < kGroup ? l.head_dim - d : kGroup;
    int8_t key_codes[kGroup], value_codes[kGroup];
    key_scales[g * l.block + slot] = quantize_entries(k + d, n, limit, key_codes);
    value_scales[g * l.block + slot] = quantize_entries(v + d, n, limit, value_codes);
    for (int i = 0; i < n; ++i) {
      const ptrdiff_t key_at = static_cast<ptrdiff_t>(d + i) * l.block + slot;
      const ptrdiff_t value_at = static_cast<ptrdiff_t>(slot) * l.padded_dim + d + i;
      if (!nibbles) {
        block[key_at] = static_cast<uint8_t>(key_codes[i]);
        block[l.values_at + value_at] = static_cast<uint8_t>(value_codes[i]);
      } else {
        // Entries d and d+1 share a byte, so that one token's bytes belong to it alone.
        uint8_t& kb = block[static_cast<ptrdiff_t>((d + i) / 2) * l.block + slot];
        uint8_t& vb = block[l.values_at + value_at / 2];
        const int shift = 4 * (i & 1);
        const int keep = shift ? 0x0f : 0xf0;
        kb = static_cast<uint8_t>((kb & keep) | ((key_codes[i] & 15) << shift));
        vb = static_cast<uint8_t>((vb & keep) | ((value_codes[i] & 15) << shift));
      }
    }
  }
}

inline float widen(uint16_t half) {
  uint16_t lanes16[16] = {half};
  float out[16];
  store(out, load(lanes16));
  return out[0];
}

inline float signed_nibble(uint8_t byte, int index) {
  const int nibble = (byte >> (4 * (index & 1))) & 15;
  return static_cast<float>(nibble > 7 ? nibble - 16 : nibble);
}

// One token as float32: keys to keys[d * kStep], values contiguous and zero-padded.
inline void read_token(const KvLayout& l, const uint8_t* block, int slot, float* keys,
                       float* values) {
  const auto* key_half = reinterpret_cast<const uint16_t*>(block);
  const auto* value_half = reinterpret_cast<const uint16_t*>(block + l.values_at);
  const auto* key_scales = reinterpret_cast<const uint16_t*>(block + l.key_scales_at);
  const auto* value_scales = reinterpret_cast<const uint16_t*>(block + l.value_scales_at);
  float key_scale = 0.0f, value_scale = 0.0f;
  for (int d = 0; d < l.head_dim; ++d) {
    const ptrdiff_t key_at = static_cast<ptrdiff_t>(d) * l.block + slot;
    const ptrdiff_t value_at = static_cast<ptrdiff_t>(slot) * l.padded_dim + d;
    if (l.kind == KvKind::kFloat32) {
      keys[d * kStep] = reinterpret_cast<const float*>(block)[key_at];
      values[d] = reinterpret_cast<const float*>(block + l.values_at)[value_at];
      continue;
    }
    if (l.kind == KvKind::kFloat16) {
      keys[d * kStep] = widen(key_half[key_at]);
      values[d] = widen(value_half[value_at]);
      continue;
    }
    if (d % kGroup == 0) {
      key_scale = widen(key_scales[d / kGroup * l.block + slot]);
      value_scale = widen(value_scales[d / kGroup * l.block + slot]);
    }
    float key, value;
    if (l.kind == KvKind::kInt8) {
      key = static_cast<float>(static_cast<int8_t>(block[key_at]));
      value = static_cast<float>(static_cast<int8_t>(block[l.values_at + value_at]));
    } else {
      key = signed_nibble(block[static_cast<ptrdiff_t>(d / 2) * l.block + slot], d);
      value = signed_nibble(block[l.values_at + value_at / 2], d);
    }
    keys[d * kStep] = key * key_scale;
    values[d] = value * value_scale;
  }
  for (int d = l.head_dim; d < l.padded_dim; ++d) values[d] = 0.0f;
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
