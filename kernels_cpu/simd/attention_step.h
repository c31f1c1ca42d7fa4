// One step of attention: up to 32 tokens for some rows that see the same ones of them.
//
// The order that decides every bit:
//   score[t] = fma chain over d of q[d] * k[d][t], in units of log2; of quantized keys a chain
//              over each 32 codes, dot, and then score = fma(dot, scale[t], score)
//   m' = max(m, max score); c = 2^(m - m'); p[t] = 2^(score[t] - m')
//   l = fma(l, c, p[0..15]); l = l + p[16..31]; o = o * c
//   o = fma(p[t], v[t], o) in order of t; of quantized values w = p[t] * scale[t] and
//              o = fma(w, code, o)
#pragma once

#include <type_traits>

#include "simd/kv_codes.h"

namespace localllm::LOCALLLM_ISA {
namespace {

constexpr float kNoScore = -1e30f;

// Keys and values of one kv head: as they lie in the cache, or as float32 in scratch.
// SCALED: every record begins with kStep scales.
template <class Code, bool SCALED>
struct StepView {
  // Scales are float16 in the cache, float32 in scratch.
  using Scale = std::conditional_t<std::is_same_v<Code, float>, float, uint16_t>;
  static constexpr size_t kScaleBytes = SCALED ? kStep * sizeof(Scale) : 0;

  const uint8_t *keys, *values;  // records
  size_t record_bytes;
  ptrdiff_t ahead;  // bytes from here to what is read next

  const Scale* key_scales(int group) const {
    return reinterpret_cast<const Scale*>(keys + static_cast<size_t>(group) * record_bytes);
  }
  const Scale* value_scales(int group) const {
    return reinterpret_cast<const Scale*>(values + static_cast<size_t>(group) * record_bytes);
  }
  const Code* key_codes(int group) const {
    return reinterpret_cast<const Code*>(keys + static_cast<size_t>(group) * record_bytes +
                                         kScaleBytes);
  }
  const Code* value_codes(int group) const {
    return reinterpret_cast<const Code*>(values + static_cast<size_t>(group) * record_bytes +
                                         kScaleBytes);
  }
};

// Tokens first <= t < last of a step.
struct Sight {
  int first, last;
  bool whole() const { return first == 0 && last == kStep; }
};

template <int ROWS, class Code, bool SCALED>
inline void score_step(const StepView<Code, SCALED>& s, int head_dim, const AttentionRow* rows,
                       Vec (&score)[ROWS][2]) {
  for (int r = 0; r < ROWS; ++r) score[r][0] = score[r][1] = zero();
  const float* q[ROWS];
  for (int r = 0; r < ROWS; ++r) q[r] = rows[r].q;
  for (int at = 0, group = 0; at < head_dim; at += kGroup, ++group) {
    const int entries = head_dim - at < kGroup ? head_dim - at : kGroup;
    if constexpr (!SCALED) {
      each_key(s.key_codes(group), entries, s.ahead, [&](int d, auto half, const Vec& key) {
        for (int r = 0; r < ROWS; ++r)
          score[r][half.value] = fma(set1(q[r][at + d]), key, score[r][half.value]);
      });
    } else {
      Vec dot[ROWS][2];
      for (int r = 0; r < ROWS; ++r) dot[r][0] = dot[r][1] = zero();
      each_key(s.key_codes(group), entries, s.ahead, [&](int d, auto half, const Vec& key) {
        for (int r = 0; r < ROWS; ++r)
          dot[r][half.value] = fma(set1(q[r][at + d]), key, dot[r][half.value]);
      });
      for (int half = 0; half < 2; ++half) {
        const Vec scale = load(s.key_scales(group) + 16 * half);
        for (int r = 0; r < ROWS; ++r) score[r][half] = fma(dot[r][half], scale, score[r][half]);
      }
    }
  }
}

// Scores to weights; returns in `factor` what the old sums of values are to be multiplied by.
template <int ROWS>
inline void weigh_step(Vec (&score)[ROWS][2], const AttentionParams& p, const AttentionRow* rows,
                       const Sight& seen, float (&weight)[ROWS][kStep], float* factor) {
  float old[16] = {}, now[16] = {};
  for (int r = 0; r < ROWS; ++r) {
    Vec &a = score[r][0], &b = score[r][1];
    if (p.softcap > 0.0f) {
      const Vec inverse = set1(1.0f / p.softcap), cap = set1(p.softcap * kLog2e);
      a = mul(cap, tanh(mul(a, inverse)));
      b = mul(cap, tanh(mul(b, inverse)));
    }
    if (!seen.whole()) {
      a = select(lanes(seen.first, seen.last), a, set1(kNoScore));
      b = select(lanes(seen.first - 16, seen.last - 16), b, set1(kNoScore));
    }
    const float highest = reduce_max(max(a, b));
    old[r] = rows[r].state[AttentionState::kMaxAt];
    now[r] = old[r] > highest ? old[r] : highest;
  }
  store(factor, exp2(sub(load(old), load(now))));
  for (int r = 0; r < ROWS; ++r) {
    const Vec highest = set1(now[r]);
    Vec a = exp2(sub(score[r][0], highest)), b = exp2(sub(score[r][1], highest));
    if (!seen.whole()) {
      a = select(lanes(seen.first, seen.last), a, zero());
      b = select(lanes(seen.first - 16, seen.last - 16), b, zero());
    }
    float* state = rows[r].state;
    store(state, add(fma(load(state), set1(factor[r]), a), b));
    state[AttentionState::kMaxAt] = now[r];
    store(weight[r], a);
    store(weight[r] + 16, b);
  }
}

template <int ROWS, class Code, bool SCALED>
inline void add_values(const StepView<Code, SCALED>& s, int groups, const AttentionRow* rows,
                       const Sight& seen, const float (&weight)[ROWS][kStep], const float* factor) {
  float scaled[ROWS][kStep];
  const float (*w)[kStep] = weight;
  for (int group = 0; group < groups; ++group) {
    if constexpr (SCALED) {
      for (int half = 0; half < 2; ++half) {
        const Vec scale = load(s.value_scales(group) + 16 * half);
        for (int r = 0; r < ROWS; ++r)
          store(scaled[r] + 16 * half, mul(load(weight[r] + 16 * half), scale));
      }
      w = scaled;
    }
    const int at = AttentionState::kOutAt + group * kGroup;
    Vec o[ROWS][2];
    for (int r = 0; r < ROWS; ++r)
      for (int half = 0; half < 2; ++half)
        o[r][half] = mul(load(rows[r].state + at + 16 * half), set1(factor[r]));
    const Code* codes = s.value_codes(group);
    for (int t = seen.first; t < seen.last; ++t) {
      const Code* row = value_row(codes, t);
      fetch(row, s.ahead);
      for (int half = 0; half < 2; ++half) {
        const Vec value = value_half(row, half);
        for (int r = 0; r < ROWS; ++r) o[r][half] = fma(set1(w[r][t]), value, o[r][half]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int half = 0; half < 2; ++half) store(rows[r].state + at + 16 * half, o[r][half]);
  }
}

template <int ROWS, class Code, bool SCALED>
void attend_step(const StepView<Code, SCALED>& s, const KvLayout& l, const AttentionParams& p,
                 const AttentionRow* rows, const Sight& seen) {
  Vec score[ROWS][2];
  float weight[ROWS][kStep], factor[16];
  score_step<ROWS>(s, l.head_dim, rows, score);
  weigh_step<ROWS>(score, p, rows, seen, weight, factor);
  add_values<ROWS>(s, l.padded_dim / kGroup, rows, seen, weight, factor);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
