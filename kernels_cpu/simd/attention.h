// Causal attention over a paged cache, in the manner of flash attention.
//
// The order that decides every bit: a part covers 512 absolute positions, a step 32 of them.
//   score[t] = fma chain over d of q[d] * k[d][t], in units of log2
//   m' = max(m, max score); c = 2^(m - m'); p[t] = 2^(score[t] - m')
//   l = fma(l, c, p[0..15]); l = l + p[16..31]; o = o * c; o = fma(p[t], v[t], o) in order of t
// Parts start afresh and are merged in order, so threads may share a long context.
#pragma once

#include "simd/kernels.h"
#include "simd/kv.h"
#include "simd/math.h"

namespace localllm::LOCALLLM_ISA {
namespace {

constexpr float kNoScore = -1e30f;

void reset_state(float* state, int padded_dim) {
  for (int i = 0; i < AttentionState::size(padded_dim); ++i) state[i] = 0.0f;
  state[AttentionState::kMaxAt] = kNoScore;
}

// New maximum and rescaling of the old sums; returns the factor applied.
inline float raise_maximum(float* state, float highest) {
  const float old = state[AttentionState::kMaxAt];
  const float now = old > highest ? old : highest;
  state[AttentionState::kMaxAt] = now;
  return now == old ? 1.0f : exp2(old - now);
}

// Keys and values of one step: float16 where they lie, or float32 in scratch.
template <class T>
struct StepView {
  const T* keys;  // [head_dim][key_stride]
  ptrdiff_t key_stride;
  const T* values;  // [kStep][padded_dim]
  const T* next_keys;
  const T* next_values;
};

// ROWS rows that see tokens first <= t < last of the step.
template <int ROWS, class T>
void attend_step(const StepView<T>& s, int head_dim, int padded_dim, const AttentionParams& p,
                 const AttentionRow* rows, int first, int last) {
  Vec score[ROWS][2];
  for (int r = 0; r < ROWS; ++r) score[r][0] = score[r][1] = zero();
  for (int d = 0; d < head_dim; ++d) {
    const T* k = s.keys + d * s.key_stride;
    if (s.next_keys) prefetch(s.next_keys + d * s.key_stride);
    // Half after half: sums, keys and a query entry then fit in 16 registers.
    for (int half = 0; half < 2; ++half) {
      const Vec key = load(k + 16 * half);
      for (int r = 0; r < ROWS; ++r) score[r][half] = fma(set1(rows[r].q[d]), key, score[r][half]);
    }
  }
  float weight[ROWS][kStep];
  for (int r = 0; r < ROWS; ++r) {
    Vec a = score[r][0], b = score[r][1];
    if (p.softcap > 0.0f) {
      const Vec inverse = set1(1.0f / p.softcap), cap = set1(p.softcap * kLog2e);
      a = mul(cap, tanh(mul(a, inverse)));
      b = mul(cap, tanh(mul(b, inverse)));
    }
    const bool whole = first == 0 && last == kStep;
    const Mask in_a = lanes(first, last), in_b = lanes(first - 16, last - 16);
    if (!whole) {
      a = select(in_a, a, set1(kNoScore));
      b = select(in_b, b, set1(kNoScore));
    }
    float* state = rows[r].state;
    const float factor = raise_maximum(state, reduce_max(max(a, b)));
    const Vec highest = set1(state[AttentionState::kMaxAt]), c = set1(factor);
    a = exp2(sub(a, highest));
    b = exp2(sub(b, highest));
    if (!whole) {
      a = select(in_a, a, zero());
      b = select(in_b, b, zero());
    }
    store(state, add(fma(load(state), c, a), b));
    store(weight[r], a);
    store(weight[r] + 16, b);
    if (factor != 1.0f) {
      float* o = state + AttentionState::kOutAt;
      for (int i = 0; i < padded_dim; i += 16) store(o + i, mul(load(o + i), c));
    }
  }
  const auto accumulate = [&](auto vectors, int at) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec o[ROWS][kVectors];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < kVectors; ++i)
        o[r][i] = load(rows[r].state + AttentionState::kOutAt + at + 16 * i);
    for (int t = first; t < last; ++t) {
      const T* v = s.values + static_cast<ptrdiff_t>(t) * padded_dim + at;
      if (s.next_values) prefetch(s.next_values + static_cast<ptrdiff_t>(t) * padded_dim + at);
      for (int i = 0; i < kVectors; ++i) {
        const Vec value = load(v + 16 * i);
        for (int r = 0; r < ROWS; ++r) o[r][i] = fma(set1(weight[r][t]), value, o[r][i]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < kVectors; ++i)
        store(rows[r].state + AttentionState::kOutAt + at + 16 * i, o[r][i]);
  };
  int at = 0;
  for (; at + 32 <= padded_dim; at += 32) accumulate(Count<2>{}, at);
  if (at < padded_dim) accumulate(Count<1>{}, at);
}

// What a row sees of the step that starts at token `start`: [first, last).
struct Sight {
  int first, last;
};
inline Sight sight(const AttentionRow& row, const AttentionParams& p, int start) {
  const int end = row.position + 1 - start;
  const int from = p.window > 0 ? row.position + 1 - p.window - start : 0;
  return {from > 0 ? from : 0, end < kStep ? end : kStep};
}

template <class T>
void attend_rows(const StepView<T>& s, const KvLayout& layout, const AttentionParams& p,
                 const AttentionRow* rows, int count, int start) {
  int r = 0;
  while (r < count) {
    const Sight seen = sight(rows[r], p, start);
    if (seen.first >= seen.last) {
      ++r;
      continue;
    }
    int same = 1;
    while (r + same < count && same < kAttentionRows) {
      const Sight other = sight(rows[r + same], p, start);
      if (other.first != seen.first || other.last != seen.last) break;
      ++same;
    }
    const AttentionRow* group = rows + r;
    const int hd = layout.head_dim, pd = layout.padded_dim;
    switch (same) {
      case 1: attend_step<1>(s, hd, pd, p, group, seen.first, seen.last); break;
      case 2: attend_step<2>(s, hd, pd, p, group, seen.first, seen.last); break;
      default: attend_step<3>(s, hd, pd, p, group, seen.first, seen.last); break;
    }
    r += same;
  }
}

// Copies tokens start + from .. start + count - 1 of a step into float32 scratch, whatever the
// block size and kind. Blocks before the first token a row can see may be gone already.
inline void gather_step(const KvHead& kv, int start, int from, int count, float* keys,
                        float* values) {
  const KvLayout& l = *kv.layout;
  if (l.kind == KvKind::kFloat16 && l.block % kStep == 0) {
    const auto* k = reinterpret_cast<const uint16_t*>(kv.block(start / l.block));
    const auto* v = k + l.values_at / 2 + static_cast<ptrdiff_t>(start % l.block) * l.padded_dim;
    k += start % l.block;
    for (int d = 0; d < l.head_dim; ++d) {
      store(keys + d * kStep, load(k + static_cast<ptrdiff_t>(d) * l.block));
      store(keys + d * kStep + 16, load(k + static_cast<ptrdiff_t>(d) * l.block + 16));
    }
    for (int i = 0; i < count * l.padded_dim; i += 16) store(values + i, load(v + i));
    return;
  }
  for (int i = 0; i < l.head_dim * kStep; ++i) keys[i] = 0.0f;
  for (int t = from; t < count; ++t) {
    const uint8_t* block = kv.block((start + t) / l.block);
    read_token(l, block, (start + t) % l.block, keys + t, values + t * l.padded_dim);
  }
}

void attend(const KvHead& kv, const AttentionParams& p, const AttentionRow* rows, int count,
            int part, float* scratch) {
  const KvLayout& l = *kv.layout;
  const int end = rows[count - 1].position + 1;
  const int part_end = (part + 1) * kPart < end ? (part + 1) * kPart : end;
  const int first = p.window > 0 ? rows[0].position + 1 - p.window : 0;
  int start = part * kPart;
  if (first > start) start = first / kStep * kStep;
  float* keys = align64(scratch);
  float* values = keys + l.padded_dim * kStep;
  const bool in_place =
      l.kind == KvKind::kFloat16 && l.block % kStep == 0 && count <= kAttentionRows;
  for (; start < part_end; start += kStep) {
    if (!in_place) {
      const int tokens = part_end - start < kStep ? part_end - start : kStep;
      gather_step(kv, start, first > start ? first - start : 0, tokens, keys, values);
      const StepView<float> s{keys, kStep, values, nullptr, nullptr};
      attend_rows(s, l, p, rows, count, start);
      continue;
    }
    const auto view = [&](int token, const uint16_t** k, const uint16_t** v) {
      const auto* block = reinterpret_cast<const uint16_t*>(kv.block(token / l.block));
      *k = block + token % l.block;
      *v = block + l.values_at / 2 + static_cast<ptrdiff_t>(token % l.block) * l.padded_dim;
    };
    StepView<uint16_t> s{nullptr, l.block, nullptr, nullptr, nullptr};
    view(start, &s.keys, &s.values);
    if (start + kStep < end) view(start + kStep, &s.next_keys, &s.next_values);
    attend_rows(s, l, p, rows, count, start);
  }
}

void merge_state(float* into, const float* from, int padded_dim) {
  const float now = from[AttentionState::kMaxAt], old = into[AttentionState::kMaxAt];
  const float highest = old > now ? old : now;
  const Vec a = set1(exp2(old - highest)), b = set1(exp2(now - highest));
  store(into, fma(load(from), b, mul(load(into), a)));
  for (int i = AttentionState::kOutAt; i < AttentionState::size(padded_dim); i += 16)
    store(into + i, fma(load(from + i), b, mul(load(into + i), a)));
  into[AttentionState::kMaxAt] = highest;
}

void finish_state(const float* state, int head_dim, float* out) {
  const Vec inverse = set1(1.0f / reduce_add(load(state)));
  each_vec(head_dim, [&](int i, auto part) {
    store(out + i, mul(load(state + AttentionState::kOutAt + i), inverse), part);
  });
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
