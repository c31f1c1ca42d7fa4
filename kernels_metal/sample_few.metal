// What is left by a small top_k, in threadgroup memory: every thread one candidate at most, its
// place found by counting.
#include "sample_cut.metal"

constant constexpr int FEW = THREADS;
constant constexpr int FEW_TOP_K = 256;  // the most for which FEW candidates are usually enough

struct Choice {
  bool found;  // in the one thread that holds the token
  int token;
  ulong mass;  // of all that were kept
  int kept;
};

// A key that at least top_k tokens reach: the greatest keys of that many threads do.
inline uint key_of_few(
    uint mine, int top_k, threadgroup uint* keys, threadgroup ulong* found, int thread_index) {
  keys[thread_index] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int rank = 0;
  for (int t = 0; t < THREADS; t++) {
    const uint other = keys[t];
    rank += other > mine || (other == mine && t < thread_index);
  }
  if (rank == top_k - 1) found[0] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return uint(found[0]);
}

// The number of tokens that reach the key; the first FEW of them, in any order, are gathered.
template <typename T>
inline int gather(
    const device T* row,
    int count,
    uint least,
    threadgroup uint* keys,
    threadgroup uint* tokens,
    threadgroup atomic<uint>* counter,
    int thread_index) {
  if (thread_index == 0) atomic_store_explicit(counter, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < count; i += THREADS) {
    const uint key = key_of(row[i]);
    if (key < least) continue;
    const uint place = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
    if (place < uint(FEW)) {
      keys[place] = key;
      tokens[place] = i;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return atomic_load_explicit(counter, memory_order_relaxed);
}

template <typename T>
inline Choice choose_of_few(
    int candidates,
    int top_k,
    float top_p,
    float floor_of_scaled,
    uint uniform_share,
    float highest,
    float temperature,
    const threadgroup uint* keys,
    const threadgroup uint* tokens,
    threadgroup ulong* masses,  // [FEW]
    threadgroup ulong* totals,
    int thread_index) {
  const int lane = thread_index % 32, simdgroup = thread_index / 32;
  const bool mine = thread_index < candidates;
  const uint key = mine ? keys[thread_index] : 0, token = mine ? tokens[thread_index] : 0;
  const float value = value_of<T>(key);
  ulong mass = mine ? mass_of(value, highest, temperature) : 0;
  masses[thread_index] = mass;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  int rank = 0;
  ulong before = 0;
  for (int c = 0; c < candidates; c++) {
    if (keys[c] > key || (keys[c] == key && tokens[c] < token)) {
      rank++;
      before += masses[c];
    }
  }
  bool keep = mine && rank < top_k;
  if (top_p < 1.0f) {  // the same in all threads
    const ulong all = group_sum(keep ? mass : 0, totals, lane, simdgroup, THREADS / 32);
    keep = keep && before < max(share_of(all, as_share(top_p)), ulong(1));
  }
  keep = keep && (value - highest) / temperature >= floor_of_scaled;
  if (!keep) mass = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  masses[thread_index] = mass;
  const ulong all = group_sum(mass, totals, lane, simdgroup, THREADS / 32);
  const int kept = group_sum(keep ? 1 : 0, totals, lane, simdgroup, THREADS / 32);

  const ulong target = share_of(all, uniform_share);
  ulong below = 0;
  for (int c = 0; c < candidates; c++) below += tokens[c] < token ? masses[c] : 0;
  return {keep && below <= target && target < below + mass, int(token), all, kept};
}
