#include "core/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace localllm {

namespace {

constexpr double kLowest = -std::numeric_limits<double>::infinity();
constexpr float kLowestFloat = -std::numeric_limits<float>::infinity();
constexpr double kLog2e = 1.4426950408889634;
constexpr double kClose = 1e-9;      // closer values than this are not decided here
constexpr double kLogClose = 1e-12;  // relative error that scaling may add, generously
constexpr double kTwo32 = 4294967296.0;

double gumbel(uint64_t word) {
  return -std::log(-std::log((static_cast<double>(word) + 0.5) / kTwo32));
}

// The largest float that is surely not above x.
float at_most(double x) {
  if (!(x > -3.0e38)) return kLowestFloat;
  return std::nextafterf(static_cast<float>(x), kLowestFloat);
}

bool is_allowed(const uint32_t* allowed, int32_t id) {
  return !allowed || (allowed[id >> 5] >> (id & 31) & 1u);
}

}  // namespace

uint32_t noise_word(uint64_t seed, uint32_t position, uint32_t id) {
  uint32_t c0 = id >> 2, c1 = position, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  return words[id & 3];
}

// The best value so far, and how close any other came.
struct RowSampler::Best {
  double value = kLowest, second = kLowest;
  int32_t id = -1;

  void offer(int32_t other, double x) {
    if (x > value) {
      second = value;
      value = x;
      id = other;
    } else if (x > second) {
      second = x;
    }
  }
  int32_t token() const { return value - second > kClose ? id : -1; }
};

bool RowSampler::likelier(const Entry& a, const Entry& b) {
  return a.scaled > b.scaled || (a.scaled == b.scaled && a.id < b.id);
}

RowSampler::RowSampler(const Kernels& kernels, int vocab)
    : kernels_(kernels),
      vocab_(vocab),
      maxima_(static_cast<size_t>((vocab + kSampleBlock - 1) / kSampleBlock)) {}

double RowSampler::edit(const SampleRow& row, int i) const {
  return is_allowed(row.allowed, row.edit_ids[i]) ? row.edit_values[i] : kLowest;
}

// The row without what is edited or not allowed.
const float* RowSampler::punched(const SampleRow& row) {
  const auto vocab = static_cast<size_t>(vocab_);
  copy_.resize(vocab);
  std::memcpy(copy_.data(), row.logits, vocab * sizeof(float));
  if (row.allowed) {
    for (int first = 0; first < vocab_; first += 32) {
      const uint32_t bits = row.allowed[first >> 5];
      float* part = copy_.data() + first;
      const int count = std::min(32, vocab_ - first);
      if (bits == 0)
        std::fill_n(part, count, kLowestFloat);
      else if (bits != ~0u)
        for (int i = 0; i < count; ++i) part[i] = bits >> i & 1u ? part[i] : kLowestFloat;
    }
  }
  for (int i = 0; i < row.edits; ++i) copy_[static_cast<size_t>(row.edit_ids[i])] = kLowestFloat;
  return copy_.data();
}

// Finds the largest logit; false where the row is broken.
bool RowSampler::open(const SampleRow& row) {
  entries_.clear();
  x_ = row.allowed || row.edits > 0 ? punched(row) : row.logits;
  top_ = kernels_.block_max(x_, vocab_, maxima_.data());
  if (std::isnan(top_)) return false;
  highest_ = static_cast<double>(top_);
  for (int i = 0; i < row.edits; ++i) {
    if (std::isnan(edit(row, i))) return false;
    highest_ = std::max(highest_, edit(row, i));
  }
  return std::isfinite(highest_) && row.temperature <= 1e100;  // beyond, quotients lose digits
}

const std::vector<RowSampler::Entry>* RowSampler::cut(const SampleRow& row) {
  if (row.temperature == 0.0 || !open(row)) return nullptr;
  if (row.top_k > 0) {
    keep_top_k(row);
  } else {
    const double least = highest_ + row.log_min_p * row.temperature;
    collect(row, at_most(least - kLogClose * (std::fabs(least) + std::fabs(highest_))));
    entries_.erase(std::remove_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& e) { return e.scaled < row.log_min_p; }),
                   entries_.end());
  }
  std::sort(entries_.begin(), entries_.end(),
            [](const Entry& a, const Entry& b) { return a.id < b.id; });
  return &entries_;
}

int32_t RowSampler::sample(const SampleRow& row) {
  if (!open(row)) return -1;
  if (row.temperature == 0.0) return likeliest(row, highest_);
  if (row.top_k > 0) {
    keep_top_k(row);
    if (row.top_p < 1.0 && !keep_nucleus(row.top_p, 0.0, kClose)) return -1;
  } else if (row.top_p < 1.0) {
    if (!find_nucleus(row)) return -1;
  } else {
    return drawn_from_all(row);
  }
  return drawn_from_entries(row);
}

// The first of the largest.
int32_t RowSampler::likeliest(const SampleRow& row, double highest) const {
  int32_t best = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < row.edits; ++i)
    if (edit(row, i) == highest) best = std::min(best, row.edit_ids[i]);
  if (static_cast<double>(top_) < highest) return best;
  const auto block = std::find(maxima_.begin(), maxima_.end(), top_) - maxima_.begin();
  const float* first = x_ + block * kSampleBlock;
  return std::min(best, static_cast<int32_t>(std::find(first, x_ + vocab_, top_) - x_));
}

// Tokens that reach min_p, each with its noise. Noise is only turned into a number where its word
// is large enough to win: noise >= t takes 1 - u <= e^-t.
int32_t RowSampler::drawn_from_all(const SampleRow& row) {
  constexpr int counters = kSampleBlock / 4;
  const double least = row.log_min_p;
  Best best;
  const auto bound = [&](double s) { return (s - best.value + 1e-6) * kLog2e; };
  for (int i = 0; i < row.edits; ++i) {
    const double s = scaled(row, edit(row, i));
    if (s == kLowest || s < least || bound(s) < -33.0) continue;
    const auto id = static_cast<uint32_t>(row.edit_ids[i]);
    best.offer(row.edit_ids[i], s + gumbel(noise_word(row.seed, row.position, id)));
  }
  const auto take = [&](int block) {
    const double s_max = scaled(row, static_cast<double>(maxima_[static_cast<size_t>(block)]));
    const double e = bound(s_max);
    if (s_max == kLowest || s_max < least || e < -33.0) return;
    const double passing = std::ldexp(1.0, 32 + static_cast<int>(std::ceil(std::min(e, 1.0))));
    const auto lowest = static_cast<uint64_t>(std::max(0.0, std::floor(kTwo32 - 1.0 - passing)));
    uint64_t words[kSampleBlock];
    const auto first = static_cast<uint32_t>(block * counters);
    if (kernels_.noise_words(first, row.position, row.seed, words) < lowest) return;
    for (int i = 0; i < kSampleBlock; ++i) {
      if (words[i] < lowest) continue;
      const int id = block * kSampleBlock + i % counters * 4 + i / counters;
      if (id >= vocab_) continue;
      const double s = scaled(row, static_cast<double>(x_[id]));
      if (s == kLowest || s < least) continue;
      best.offer(id, s + gumbel(words[i]));
    }
  };
  // The likeliest first, so that the others have something to beat.
  const auto likely =
      static_cast<int>(std::max_element(maxima_.begin(), maxima_.end()) - maxima_.begin());
  take(likely);
  for (int block = 0; block < blocks(); ++block)
    if (block != likely) take(block);
  return best.token();
}

int32_t RowSampler::drawn_from_entries(const SampleRow& row) {
  Best best;
  for (const Entry& entry : entries_) {
    if (entry.scaled < row.log_min_p) continue;
    const auto id = static_cast<uint32_t>(entry.id);
    best.offer(entry.id, entry.scaled + gumbel(noise_word(row.seed, row.position, id)));
  }
  return best.token();
}

// Entries of all logits of at least `least`, except those that scale to minus infinity.
void RowSampler::collect(const SampleRow& row, float least) {
  entries_.clear();
  const auto add = [&](int32_t id, double logit) {
    const double s = scaled(row, logit);
    if (s > kLowest) entries_.push_back({s, id});
  };
  for (int block = 0; block < blocks(); ++block) {
    if (maxima_[static_cast<size_t>(block)] < least) continue;
    const int end = std::min(vocab_, (block + 1) * kSampleBlock);
    for (int id = block * kSampleBlock; id < end; ++id)
      if (x_[id] >= least) add(id, static_cast<double>(x_[id]));
  }
  for (int i = 0; i < row.edits; ++i)
    if (edit(row, i) >= static_cast<double>(least)) add(row.edit_ids[i], edit(row, i));
}

// The k-th largest block maximum, which at least k logits reach; minus infinity if there is none.
float RowSampler::kth_block(int k) {
  if (k > blocks()) return kLowestFloat;
  order_ = maxima_;
  std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
  return order_[static_cast<size_t>(k - 1)];
}

void RowSampler::keep_top_k(const SampleRow& row) {
  const auto bound = static_cast<double>(kth_block(row.top_k));
  collect(row, at_most(bound - kLogClose * (std::fabs(bound) + std::fabs(highest_))));
  const auto k = static_cast<size_t>(row.top_k);
  if (entries_.size() > k) {
    std::nth_element(entries_.begin(), entries_.begin() + (row.top_k - 1), entries_.end(),
                     likelier);
    entries_.resize(k);
  }
}

// Keeps the likeliest entries up to a mass of top_p; false where rounding could decide.
// tail: what is not among the entries, in the same unit.
bool RowSampler::keep_nucleus(double top_p, double tail, double window) {
  double total = tail;
  for (const Entry& entry : entries_) total += std::exp(entry.scaled);
  double mass = 0.0;
  // Sorted piece by piece, since the first ones mostly are enough.
  size_t sorted = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (i == sorted) {
      sorted = std::min(entries_.size(), std::max<size_t>(256, 4 * sorted));
      const auto first = entries_.begin() + static_cast<ptrdiff_t>(i);
      const auto last = entries_.begin() + static_cast<ptrdiff_t>(sorted);
      std::nth_element(first, last, entries_.end(), likelier);
      std::sort(first, last, likelier);
    }
    const double before = mass / total;
    if (i > 0 && std::fabs(before - top_p) < window) return false;
    if (i > 0 && before > top_p) {
      entries_.resize(i);
      return true;
    }
    mass += std::exp(entries_[i].scaled);
  }
  // All of the entries: right only if nothing is left beside them.
  return tail == 0.0;
}

bool RowSampler::find_nucleus(const SampleRow& row) {
  const double factor = kLog2e / row.temperature;
  if (!(factor < 1e30) || static_cast<double>(top_) < -3.0e38) return false;
  for (int k = 64;; k = k < blocks() ? std::min(2 * k, blocks()) : blocks() + 1) {
    const float least = at_most(static_cast<double>(kth_block(k)));
    collect(row, least);
    if (least == kLowestFloat) return keep_nucleus(row.top_p, 0.0, kClose);
    double tail = kernels_.exp_sum_below(x_, vocab_, least, top_, static_cast<float>(factor)) *
                  std::exp(scaled(row, static_cast<double>(top_)));
    for (int i = 0; i < row.edits; ++i)
      if (edit(row, i) < static_cast<double>(least)) tail += std::exp(scaled(row, edit(row, i)));
    double mass = 0.0;
    for (const Entry& entry : entries_) mass += std::exp(entry.scaled);
    // The sum is good to 1e-5 of the tail.
    const double window = 1e-5 * tail / (mass + tail) + kClose;
    if (mass / (mass + tail) > row.top_p + window) {
      // A positive tail, even one that underflowed, is more than nothing.
      return keep_nucleus(row.top_p, std::max(tail, 1e-300), window);
    }
  }
}

}  // namespace localllm
