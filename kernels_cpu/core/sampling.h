// Draws a token from a row of logits where the answer is certain. Randomness and the final
// decision are those of localllm/sampling: whatever rounding could turn is left to it.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/kernels.h"

namespace localllm {

// The 32 bits that a token's noise is made of: word id % 4 of Philox4x32-10 at (id / 4, position,
// 0, 0) under the key `seed`.
uint32_t noise_word(uint64_t seed, uint32_t position, uint32_t id);

struct SampleRow {
  const float* logits = nullptr;
  double temperature = 0.0;  // 0: greedy
  int top_k = 0;             // 0: off
  double top_p = 1.0;
  double log_min_p = 0.0;  // -infinity: off
  uint64_t seed = 0;
  uint32_t position = 0;
  // Logits that stand in place of the row's own; no id twice.
  int edits = 0;
  const int32_t* edit_ids = nullptr;
  const double* edit_values = nullptr;
  const uint32_t* allowed = nullptr;  // a bit for every token, or null: all are
};

class RowSampler {
 public:
  RowSampler(const Kernels& kernels, int vocab);

  // The token, or -1 where the row is broken or the choice is too close to call.
  int32_t sample(const SampleRow& row);

  struct Entry {
    double scaled;  // (logit - largest logit) / temperature
    int32_t id;
  };
  // The tokens that top_k leaves, or without it min_p, by id; null where the row is broken.
  const std::vector<Entry>* cut(const SampleRow& row);

 private:
  struct Best;

  static bool likelier(const Entry& a, const Entry& b);

  bool open(const SampleRow& row);
  double edit(const SampleRow& row, int i) const;
  const float* punched(const SampleRow& row);
  int32_t likeliest(const SampleRow& row, double highest) const;
  int32_t drawn_from_all(const SampleRow& row);
  int32_t drawn_from_entries(const SampleRow& row);
  void collect(const SampleRow& row, float least);
  float kth_block(int k);
  void keep_top_k(const SampleRow& row);
  bool keep_nucleus(double top_p, double tail, double window);
  bool find_nucleus(const SampleRow& row);
  double scaled(const SampleRow& row, double logit) const {
    return (logit - highest_) / row.temperature;
  }
  int blocks() const { return static_cast<int>(maxima_.size()); }

  const Kernels& kernels_;
  int vocab_;
  const float* x_ = nullptr;
  float top_ = 0.0f;      // of the row without its edits
  double highest_ = 0.0;  // with them
  std::vector<float> copy_, maxima_, order_;
  std::vector<Entry> entries_;
};

}  // namespace localllm
