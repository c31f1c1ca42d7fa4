// Temperature, top_k, top_p and min_p, and one token drawn from what they leave: a row a
// threadgroup. Every sum is of integers, so no order of lanes or threads can change a result.
#include "sample_few.metal"

// Where in falling order (equal ones by rising token) the kept tokens end: those of a greater key,
// and so many of this one.
struct End {
  uint key, ties;
};

template <typename T>
inline bool reaches(T logit, float highest, float temperature, float floor_of_scaled) {
  return (float(logit) - highest) / temperature >= floor_of_scaled;
}

// Draws from the kept tokens of a whole row: a simdgroup a stretch of it, then the one where the
// uniform number falls walks its own again.
template <typename T>
inline Choice choose_of_many(
    const device T* row,
    int count,
    End end,
    float floor_of_scaled,
    uint uniform_share,
    float highest,
    float temperature,
    threadgroup ulong* totals,  // [THREADS / 32]
    threadgroup int* numbers,   // [2 * THREADS / 32]: greater, equal
    int lane,
    int simdgroup) {
  constexpr int stretches = THREADS / 32;
  const int length = (count + 32 * stretches - 1) / (32 * stretches) * 32;
  const int start = simdgroup * length, stop = min(start + length, count);
  ulong mass = 0;
  int greater = 0, equal = 0;
  for (int i = start + lane; i < stop; i += 32) {
    const uint key = key_of(row[i]);
    if (key < end.key || !reaches(row[i], highest, temperature, floor_of_scaled)) continue;
    if (key > end.key) {
      mass += mass_of(float(row[i]), highest, temperature);
      greater++;
    } else {
      equal++;
    }
  }
  const ulong sum = from_lane(inclusive_sum(mass, lane), 31);
  greater = simd_sum(greater);
  equal = simd_sum(equal);
  if (lane == 0) {
    totals[simdgroup] = sum;
    numbers[simdgroup] = greater;
    numbers[stretches + simdgroup] = equal;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const ulong tie = mass_of(value_of<T>(end.key), highest, temperature);
  Choice choice = {false, 0, 0, 0};
  ulong below = 0;         // mass of the stretches before this one
  uint ties = end.ties;    // that are left for this stretch
  ulong held = 0;          // mass of this one
  uint left = end.ties;
  for (int s = 0; s < stretches; s++) {
    const uint tied = min(left, uint(numbers[stretches + s]));
    const ulong part = totals[s] + tied * tie;
    if (s == simdgroup) {
      below = choice.mass;
      ties = left;
      held = part;
    }
    choice.mass += part;
    choice.kept += numbers[s] + int(tied);
    left -= tied;
  }
  const ulong target = share_of(choice.mass, uniform_share);
  if (target < below || target >= below + held) return choice;  // a whole simdgroup

  for (int first = start; first < stop; first += 32) {
    const int i = first + lane;
    uint key = 0;
    if (i < stop && reaches(row[i], highest, temperature, floor_of_scaled)) key = key_of(row[i]);
    const uint tied = key == end.key ? 1 : 0;
    const uint tied_before = simd_prefix_exclusive_sum(tied);
    const bool keep = key > end.key || (tied == 1 && tied_before < ties);
    const ulong weight = keep ? mass_of(float(row[i]), highest, temperature) : 0;
    const ulong through = below + inclusive_sum(weight, lane);
    if (through - weight <= target && target < through) {
      choice.found = true;
      choice.token = i;
    }
    if (simd_any(choice.found)) return choice;
    below = from_lane(through, 31);
    ties -= min(ties, simd_sum(tied));
  }
  return choice;
}
//: body
  threadgroup atomic<uint> lows[BINS], highs[BINS], counter[1];
  threadgroup uint keys[FEW], tokens[FEW];
  threadgroup ulong masses[FEW], totals[THREADS / 32], found[3];
  threadgroup int numbers[2 * THREADS / 32];
  const int thread_index = thread_position_in_threadgroup.x;
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int r = threadgroup_position_in_grid.y;
  const int count = logits_shape[1];
  const device T* row = logits + size_t(r) * count;

  // The greatest key, its first token, and how many are finite.
  uint best = 0;
  int best_token = 0, finite = 0;
  for (int i = thread_index; i < count; i += THREADS) {
    const uint key = key_of(row[i]);
    if (key > best) {
      best = key;
      best_token = i;
    }
    finite += key >= Keys<T>::lowest();
  }
  const uint most_here = simd_max(best);
  const int first_here = simd_min(best == most_here ? best_token : count);
  if (lane == 0) {
    keys[simdgroup] = most_here;
    tokens[simdgroup] = first_here;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint most = 0, argmax = 0;
  for (int s = 0; s < THREADS / 32; s++) {
    if (keys[s] > most || (keys[s] == most && tokens[s] < argmax)) {
      most = keys[s];
      argmax = tokens[s];
    }
  }
  finite = group_sum(finite, totals, lane, simdgroup, THREADS / 32);

  const bool broken = most < Keys<T>::lowest() || most >= Keys<T>::infinity();
  const float heat = temperature[r];
  if (broken || !(heat >= 1.17549435e-38f)) {
    if (thread_index == 0) {
      token[r] = broken ? -1 : int(argmax);
      logprob[r] = broken ? NAN : 0.0f;
      kept[r] = broken ? 0 : 1;
    }
    return;  // the whole threadgroup
  }
  const float highest = value_of<T>(most);
  const float floor_of_scaled = min_p[r] > 0.0f ? min(precise::log(min_p[r]), 0.0f) : -INFINITY;
  const uint uniform_share = as_share(uniforms[r]);
  const int k = top_k[r] > 0 && top_k[r] < finite ? top_k[r] : 0;

  Choice choice = {false, 0, 0, 0};
  int candidates = FEW + 1;
  if (k > 0 && k <= FEW_TOP_K) {
    const uint least = max(key_of_few(best, k, keys, found, thread_index), Keys<T>::lowest());
    candidates = gather(row, count, least, keys, tokens, counter, thread_index);
  }
  if (candidates <= FEW) {
    choice = choose_of_few<T>(
        candidates, k, top_p[r], floor_of_scaled, uniform_share, highest, heat, keys, tokens,
        masses, totals, thread_index);
  } else {
    End end = {Keys<T>::lowest(), 0xffffffffu};
    ulong surplus = 0;
    if (k > 0) {
      const Cut cut = find_cut<false>(
          row, count, end.key, most, k, 0, 0, highest, heat, lows, highs, totals, found,
          thread_index);
      end.key = cut.key;
      end.ties = uint(k - cut.above);
      surplus = (cut.at - end.ties) * mass_of(value_of<T>(cut.key), highest, heat);
    }
    if (top_p[r] < 1.0f) {
      const Cut cut = find_cut<true>(
          row, count, end.key, most, 0, as_share(top_p[r]), surplus, highest, heat, lows, highs,
          totals, found, thread_index);
      const ulong tie = mass_of(value_of<T>(cut.key), highest, heat);
      end.key = cut.key;
      end.ties = uint((cut.limit - cut.above + tie - 1) / tie);
    }
    choice = choose_of_many(
        row, count, end, floor_of_scaled, uniform_share, highest, heat, totals, numbers, lane,
        simdgroup);
  }
  if (choice.found) {
    token[r] = choice.token;
    logprob[r] =
        (float(row[choice.token]) - highest) / heat - precise::log(float(choice.mass) / UNITS);
    kept[r] = choice.kept;
  }
