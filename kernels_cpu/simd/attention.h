// Causal attention over a paged cache, in the manner of flash attention: a part covers 512 absolute
// positions, a step 32 of them (attention_step.h has the order of operations). Parts start afresh
// and are merged in order, so threads may share a long context.
#pragma once

#include "simd/attention_step.h"
#include "simd/kv.h"

namespace localllm::LOCALLLM_ISA {
namespace {

void reset_state(float* state, int padded_dim) {
  for (int i = 0; i < AttentionState::size(padded_dim); ++i) state[i] = 0.0f;
  state[AttentionState::kMaxAt] = kNoScore;
}

// What a row sees of the step that starts at token `start`.
inline Sight sight(const AttentionRow& row, const AttentionParams& p, int start) {
  const int end = row.position + 1 - start;
  const int from = p.window > 0 ? row.position + 1 - p.window - start : 0;
  return {from > 0 ? from : 0, end < kStep ? end : kStep};
}

// Rows in as few groups as the registers allow, none much smaller than the others.
template <class Code, bool SCALED>
int attend_some(const StepView<Code, SCALED>& s, const KvLayout& l, const AttentionParams& p,
                const AttentionRow* rows, int count, const Sight& seen) {
  if constexpr (kAttentionRows >= 8)
    if (count >= 8) return attend_step<8>(s, l, p, rows, seen), 8;
  if constexpr (kAttentionRows >= 6)
    if (count >= 6 && count != 7) return attend_step<6>(s, l, p, rows, seen), 6;
  if constexpr (kAttentionRows >= 4)
    if (count >= 4 && count != 5) return attend_step<4>(s, l, p, rows, seen), 4;
  if (count >= 3 && (kAttentionRows > 3 || count != 4))
    return attend_step<3>(s, l, p, rows, seen), 3;
  if (count >= 2) return attend_step<2>(s, l, p, rows, seen), 2;
  return attend_step<1>(s, l, p, rows, seen), 1;
}

template <class Code, bool SCALED>
void attend_rows(const StepView<Code, SCALED>& s, const KvLayout& l, const AttentionParams& p,
                 const AttentionRow* rows, int count, int start) {
  int r = 0;
  while (r < count) {
    const Sight seen = sight(rows[r], p, start);
    int same = 1;
    for (; r + same < count; ++same) {
      const Sight other = sight(rows[r + same], p, start);
      if (other.first != seen.first || other.last != seen.last) break;
    }
    const int end = r + same;
    if (seen.first >= seen.last) r = end;
    while (r < end) r += attend_some(s, l, p, rows + r, end - r, seen);
  }
}

// The steps of a part that some row sees, one after the other, each for every head.
struct Walk {
  const KvHead& kv;
  const AttentionParams& p;
  const AttentionRow* rows;
  int count, heads;
  int first, start, end, part_end;  // tokens; `first` is the first that a row sees
};

// Entries are converted as they are read: for few rows.
template <class Code, bool SCALED>
void attend_in_place(const Walk& w) {
  const KvLayout& l = *w.kv.layout;
  for (int start = w.start; start < w.part_end; start += kStep) {
    const uint8_t* piece = w.kv.piece(start);
    const uint8_t* after = start + kStep < w.end ? w.kv.piece(start + kStep) : piece;
    for (int h = 0; h < w.heads; ++h) {
      const uint8_t* next = h + 1 < w.heads ? piece + l.piece_bytes : after;
      const StepView<Code, SCALED> s{piece, piece + l.values_at, l.record_bytes, next - piece};
      attend_rows(s, l, w.p, w.rows + static_cast<ptrdiff_t>(h) * w.count, w.count, start);
      piece = next;
    }
  }
}

// Entries are converted once for all rows, or are gathered from blocks of odd sizes. Blocks before
// the first token a row can see may be gone already.
template <class Code, bool SCALED>
void attend_widened(const Walk& w, float* scratch) {
  const KvLayout& l = *w.kv.layout;
  const int record = kWideRecord<SCALED>, groups = l.padded_dim / kGroup;
  float* keys = align64(scratch);
  float* values = keys + groups * record;
  for (int i = 0; i < 2 * groups * record; ++i) keys[i] = 0.0f;  // what is never gathered
  const StepView<float, SCALED> s{reinterpret_cast<const uint8_t*>(keys),
                                  reinterpret_cast<const uint8_t*>(values),
                                  static_cast<size_t>(record) * sizeof(float), 0};
  for (int start = w.start; start < w.part_end; start += kStep)
    for (int h = 0; h < w.heads; ++h) {
      const size_t head_at = static_cast<size_t>(h) * l.piece_bytes;
      if (l.tile == kStep && !std::is_same_v<Code, float>) {
        widen_tile<Code, SCALED>(l, w.kv.piece(start) + head_at, keys, values);
      } else {
        const int last = w.part_end - start < kStep ? w.part_end - start : kStep;
        for (int t = w.first > start ? w.first - start : 0; t < last; ++t)
          widen_token<SCALED>(l, w.kv.piece(start + t) + head_at, (start + t) % l.block % l.tile, t,
                              keys, values);
      }
      attend_rows(s, l, w.p, w.rows + static_cast<ptrdiff_t>(h) * w.count, w.count, start);
    }
}

template <class Code, bool SCALED>
void attend_kind(const Walk& w, float* scratch) {
  const bool few = w.count <= 2 * kAttentionRows && w.kv.layout->tile == kStep;
  if constexpr (!std::is_same_v<Code, float>)
    if (few) return attend_in_place<Code, SCALED>(w);
  attend_widened<Code, SCALED>(w, scratch);
}

void attend(const KvHead& kv, const AttentionParams& p, const AttentionRow* rows, int count,
            int heads, int part, float* scratch) {
  const int end = rows[count - 1].position + 1;
  const int part_end = (part + 1) * kPart < end ? (part + 1) * kPart : end;
  const int first = p.window > 0 ? rows[0].position + 1 - p.window : 0;
  int start = part * kPart;
  if (first > start) start = first / kStep * kStep;
  const Walk w{kv, p, rows, count, heads, first, start, end, part_end};
  switch (kv.layout->kind) {
    case KvKind::kFloat32: return attend_kind<float, false>(w, scratch);
    case KvKind::kFloat16: return attend_kind<uint16_t, false>(w, scratch);
    case KvKind::kInt8: return attend_kind<int8_t, true>(w, scratch);
    case KvKind::kInt4: return attend_kind<Nibbles, true>(w, scratch);
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
