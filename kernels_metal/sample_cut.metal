// Finds where a row, put in falling order, has reached a weight: a radix search over its keys, by
// histograms of 64-bit sums. A threadgroup of THREADS together.
#include "sample_keys.metal"

constant constexpr int THREADS = 512;
constant constexpr int BINS_A_THREAD = 4;
constant constexpr int BINS = THREADS * BINS_A_THREAD;

// above: the weight of all greater keys, less than limit; with those of key itself it is reached.
struct Cut {
  uint key;
  ulong above, at, limit;
};

inline void add_weight(threadgroup atomic<uint>* low, threadgroup atomic<uint>* high, ulong weight) {
  const uint part = uint(weight);
  const uint before = atomic_fetch_add_explicit(low, part, memory_order_relaxed);
  const uint upper = uint(weight >> 32) + (before > 0xffffffffu - part ? 1 : 0);
  if (upper > 0) atomic_fetch_add_explicit(high, upper, memory_order_relaxed);
}

// Among keys least to most. BY_MASS: the weight of a token is its mass, and the limit is share of
// the weight of all but surplus; otherwise it is 1, and the limit is given.
template <bool BY_MASS, typename T>
inline Cut find_cut(
    const device T* row,
    int count,
    uint least,
    uint most,
    ulong limit,
    uint share,
    ulong surplus,
    float highest,
    float temperature,
    threadgroup atomic<uint>* lows,   // [BINS]
    threadgroup atomic<uint>* highs,  // [BINS]
    threadgroup ulong* totals,       // [THREADS / 32]
    threadgroup ulong* found,        // [3]: bin, above, at
    int thread_index) {
  const int lane = thread_index % 32, simdgroup = thread_index / 32;
  ulong above = 0;
  for (bool first = true;; first = false) {
    uint shift = 0;  // bin 0 holds the greatest keys
    while (((most - least) >> shift) >= uint(BINS)) shift++;

    for (int bin = thread_index; bin < BINS; bin += THREADS) {
      atomic_store_explicit(lows + bin, 0u, memory_order_relaxed);
      atomic_store_explicit(highs + bin, 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < count; i += THREADS) {
      const uint key = key_of(row[i]);
      if (key < least || key > most) continue;
      const ulong weight = BY_MASS ? mass_of(float(row[i]), highest, temperature) : 1;
      const uint bin = (most - key) >> shift;
      if (weight > 0) add_weight(lows + bin, highs + bin, weight);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    ulong held[BINS_A_THREAD];
    ulong mine = 0;
    for (int b = 0; b < BINS_A_THREAD; b++) {
      const int bin = thread_index * BINS_A_THREAD + b;
      held[b] = atomic_load_explicit(lows + bin, memory_order_relaxed) +
          (ulong(atomic_load_explicit(highs + bin, memory_order_relaxed)) << 32);
      mine += held[b];
    }
    const ulong through = inclusive_sum(mine, lane);
    if (lane == 31) totals[simdgroup] = through;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ulong all = 0, before = above + through - mine;
    for (int s = 0; s < THREADS / 32; s++) {
      if (s < simdgroup) before += totals[s];
      all += totals[s];
    }
    if (BY_MASS && first) limit = max(share_of(all - surplus, share), ulong(1));
    for (int b = 0; b < BINS_A_THREAD; b++) {
      if (before < limit && limit <= before + held[b]) {  // one bin of one thread
        found[0] = thread_index * BINS_A_THREAD + b;
        found[1] = before;
        found[2] = held[b];
      }
      before += held[b];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint start = uint(found[0]) << shift;
    const uint end = min(start + ((1u << shift) - 1), most - least);
    above = found[1];
    least = most - end;
    most = most - start;
    if (shift == 0) return {most, above, found[2], limit};
  }
}
