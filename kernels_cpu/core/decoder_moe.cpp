// The mixture of experts: rows are sorted by expert, so that each chosen expert is read once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/decoder.h"

namespace localllm {

// Fills chosen_ and chosen_weight_ [rows][top_k], best first; ties go to the lower index.
void Decoder::choose_experts(const Step& step, const Layer& layer) {
  const LayerConfig& c = layer.config;
  const auto total = static_cast<size_t>(step.rows) * static_cast<size_t>(c.top_k);
  chosen_.resize(total);
  chosen_weight_.resize(total);
  for (int r = 0; r < step.rows; ++r) {
    float* p = router_.row(r);
    if (layer.moe.router_bias) k_.add_scaled(layer.moe.router_bias, c.experts, 1.0f, p);
    if (c.router_scale != 1.0f) k_.scale(p, c.experts, c.router_scale);
    if (c.sigmoid_scores)
      k_.activate(Activation::kSigmoid, p, nullptr, c.experts, p);
    else
      k_.softmax(p, c.experts);
    choice_.assign(p, p + c.experts);
    if (layer.moe.selection_bias)
      k_.add_scaled(layer.moe.selection_bias, c.experts, 1.0f, choice_.data());
    allow_groups(c, choice_.data());
    float sum = 0.0f;
    float* weights = chosen_weight_.data() + static_cast<ptrdiff_t>(r) * c.top_k;
    for (int i = 0; i < c.top_k; ++i) {
      int best = -1;
      for (int e = 0; e < c.experts; ++e) {
        const float score = choice_[static_cast<size_t>(e)];
        const bool better = best < 0 || score > choice_[static_cast<size_t>(best)];
        if (allowed_[static_cast<size_t>(e)] && !std::isnan(score) && better) best = e;
      }
      // All left are NaN: take the first, so that NaN reaches the output and nothing else.
      if (best < 0)
        best = static_cast<int>(std::find(allowed_.begin(), allowed_.end(), 1) - allowed_.begin());
      chosen_[static_cast<size_t>(r) * static_cast<size_t>(c.top_k) + i] = best;
      weights[i] = p[best];
      sum += p[best];
      allowed_[static_cast<size_t>(best)] = 0;
    }
    for (int i = 0; i < c.top_k; ++i) {
      if (c.renormalize) weights[i] /= sum + c.renormalize_eps;
      weights[i] *= c.weight_scale;
      if (layer.moe.expert_scale)
        weights[i] *=
            layer.moe.expert_scale[chosen_[static_cast<size_t>(r) * static_cast<size_t>(c.top_k) +
                                           static_cast<size_t>(i)]];
    }
  }
}

void Decoder::allow_groups(const LayerConfig& c, const float* choice) {
  allowed_.assign(static_cast<size_t>(c.experts), c.top_groups == c.groups ? 1 : 0);
  if (c.top_groups == c.groups) return;
  const int each = c.experts / c.groups;
  group_score_.resize(static_cast<size_t>(c.groups));
  for (int g = 0; g < c.groups; ++g) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    float first = none, second = none;  // the two best
    for (int e = g * each; e < (g + 1) * each; ++e) {
      second = std::max(second, std::min(first, choice[e]));
      first = std::max(first, choice[e]);
    }
    group_score_[static_cast<size_t>(g)] = first + second;
  }
  for (int i = 0; i < c.top_groups; ++i) {
    int best = -1;
    for (int g = 0; g < c.groups; ++g) {
      if (allowed_[static_cast<size_t>(g) * static_cast<size_t>(each)]) continue;
      const float score = group_score_[static_cast<size_t>(g)];
      if (best < 0 || score > group_score_[static_cast<size_t>(best)]) best = g;
    }
    std::fill_n(allowed_.begin() + static_cast<ptrdiff_t>(best) * each, each, 1);
  }
}

// y_ = the shared expert's output times its gate; normed_ holds its input.
void Decoder::shared_expert(const Step& step, const Layer& layer) {
  const LayerConfig& c = layer.config;
  const FeedForward& f = layer.moe.shared;
  const int width = program_.config.hidden;
  const bool quantized = !program_.config.float_activations;
  const Input in = normed_.input(0, step.rows, quantized);
  pool_.parallel(f.up->panels(), panel_grain(*f.up, f.up->panels(), step.rows),
                 [&](int first, int last, int thread) {
                   hidden_panels(c, f, in, inner_.row(0), up_.row(0), inner_.stride(), first, last,
                                 thread_scratch_[static_cast<size_t>(thread)].data());
                 });
  each_row(step.rows, 2 * c.shared, [&](int r) { quantize(&inner_, r, c.shared); });
  multiply(inner_.input(0, step.rows, quantized), {{f.down, y_.row(0), y_.stride()}});
  if (layer.moe.shared_gate) {
    multiply(normed_.input(0, step.rows, quantized && layer.moe.shared_gate->quantized()),
             {{layer.moe.shared_gate, shared_weight_.row(0), shared_weight_.stride()}});
    each_row(step.rows, width, [&](int r) {
      float* weight = shared_weight_.row(r);
      k_.activate(Activation::kSigmoid, weight, nullptr, 1, weight);
      k_.scale(y_.row(r), width, *weight);
    });
  }
  if (layer.moe.shared_post_norm.present)
    each_row(step.rows, 4 * width, [&](int r) {
      k_.norm(y_.row(r), width, layer.moe.shared_post_norm.params, y_.row(r));
    });
}

void Decoder::run_experts(int index, const std::vector<int>& experts) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const LayerConfig& c = layer.config;
  const int width = program_.config.hidden;
  const bool quantized = !program_.config.float_activations;
  const auto start_of = [&](int e) { return expert_start_[static_cast<size_t>(e)]; };
  const auto weights_of = [&](int e) -> const FeedForward& {
    return expert_cache_ ? expert_cache_->at(index, e) : layer.moe.experts[static_cast<size_t>(e)];
  };
  std::vector<int> slots;
  for (const int e : experts)
    for (int s = start_of(e); s < start_of(e + 1); ++s) slots.push_back(s);
  const int count = static_cast<int>(experts.size()), rows_of_all = static_cast<int>(slots.size());

  // The experts' panels, one after another, are the items shared out.
  const auto share = [&](int panels, const Matrix& like, auto&& work) {
    const int total = panels * count;
    const int grain = std::min(panels, panel_grain(like, total, rows_of_all / count));
    pool_.parallel(total, grain, [&](int first, int last, int thread) {
      void* scratch = thread_scratch_[static_cast<size_t>(thread)].data();
      while (first < last) {
        const int e = experts[static_cast<size_t>(first / panels)];
        const int from = first % panels, to = std::min(panels, from + last - first);
        work(e, start_of(e), start_of(e + 1) - start_of(e), from, to, scratch);
        first += to - from;
      }
    });
  };
  const FeedForward& any = layer.moe.experts[0];
  adapt_experts(index, experts, slots, expert_in_, {Target::kGate, Target::kUp});
  share(any.up->panels(), *any.up,
        [&](int e, int start, int rows, int from, int to, void* scratch) {
          const ptrdiff_t stride = expert_inner_.stride();
          hidden_panels(c, weights_of(e), expert_in_.input(start, rows, quantized),
                        expert_inner_.row(start), up_.row(0) + start * stride, stride, from, to,
                        scratch, index, e, start);
        });
  each_row(rows_of_all, 2 * c.hidden,
           [&](int i) { quantize(&expert_inner_, slots[static_cast<size_t>(i)], c.hidden); });
  adapt_experts(index, experts, slots, expert_inner_, {Target::kDown});
  share(any.down->panels(), *any.down,
        [&](int e, int start, int rows, int from, int to, void* scratch) {
          const FeedForward& f = weights_of(e);
          k_.matmul(*f.down, expert_inner_.input(start, rows, quantized), expert_out_.row(start),
                    expert_out_.stride(), from, to, scratch);
          const int at = from * kLanes, n = std::min(to * kLanes, width) - at;
          for (int r = 0; r < rows; ++r) {
            float* y = expert_out_.row(start + r) + at;
            add_expert_delta(index, e, Target::kDown, start + r, at, n, y);
            if (f.down_bias) k_.add_scaled(f.down_bias + at, n, 1.0f, y);
          }
        });
}

void Decoder::mixture(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const LayerConfig& c = layer.config;
  const int width = program_.config.hidden, slots = step.rows * c.top_k;
  const bool quantized = !program_.config.float_activations;
  const auto take_in = [&](const Norm& norm) {
    each_row(step.rows, 4 * width, [&](int r) { enter(norm, x_.row(r), &normed_, r); });
  };
  take_in(c.own_norms ? layer.moe.router_norm : layer.ffn_norm);
  // Routing is decided in float32 where the router's weights are dense.
  const bool dense_router = !layer.moe.router->quantized();
  multiply(normed_.input(0, step.rows, quantized && !dense_router),
           {{layer.moe.router, router_.row(0), router_.stride()}});
  choose_experts(step, layer);
  if (c.own_norms) take_in(layer.moe.expert_norm);

  // Counting sort of (row, choice) by expert.
  expert_start_.assign(static_cast<size_t>(c.experts) + 1, 0);
  for (const int e : chosen_) ++expert_start_[static_cast<size_t>(e) + 1];
  for (size_t e = 0; e < static_cast<size_t>(c.experts); ++e)
    expert_start_[e + 1] += expert_start_[e];
  std::vector<int> next(expert_start_.begin(), expert_start_.end() - 1);
  slot_of_.resize(static_cast<size_t>(slots));
  slot_adapter_.resize(static_cast<size_t>(slots));
  for (int i = 0; i < slots; ++i) {
    const int slot = next[static_cast<size_t>(chosen_[static_cast<size_t>(i)])]++;
    slot_of_[static_cast<size_t>(i)] = slot;
    const int r = i / c.top_k;
    slot_adapter_[static_cast<size_t>(slot)] = row_adapter_[static_cast<size_t>(r)];
    std::memcpy(expert_in_.row(slot), normed_.row(r), static_cast<size_t>(width) * sizeof(float));
    if (!quantized) continue;
    const auto groups = static_cast<size_t>(normed_.groups());
    std::memcpy(expert_in_.q(slot), normed_.q(r), groups * kGroup);
    std::memcpy(expert_in_.info(slot), normed_.info(r), groups * sizeof(GroupInfo));
  }

  std::vector<int> active;
  for (int e = 0; e < c.experts; ++e)
    if (expert_start_[static_cast<size_t>(e)] < expert_start_[static_cast<size_t>(e) + 1])
      active.push_back(e);
  if (expert_cache_) {
    // As many at a time as have room; those that are in memory before they are pushed out of it.
    std::stable_partition(active.begin(), active.end(),
                          [&](int e) { return expert_cache_->resident(index, e); });
    const auto room = static_cast<size_t>(expert_cache_->slots());
    for (size_t at = 0; at < active.size(); at += room) {
      const size_t end = std::min(active.size(), at + room);
      const std::vector<int> some(active.begin() + static_cast<ptrdiff_t>(at),
                                  active.begin() + static_cast<ptrdiff_t>(end));
      expert_cache_->fetch(index, some.data(), static_cast<int>(some.size()));
      run_experts(index, some);
    }
  } else {
    run_experts(index, active);
  }
  if (c.own_norms) take_in(layer.ffn_norm);
  if (c.shared > 0) shared_expert(step, layer);
  each_row(step.rows, 4 * width, [&](int r) {
    // With norms of their own the experts are summed apart.
    float* y = c.own_norms ? normed_.row(r) : y_.row(r);
    if (c.own_norms || c.shared == 0) std::memset(y, 0, static_cast<size_t>(width) * sizeof(float));
    for (int i = 0; i < c.top_k; ++i) {
      const auto at =
          static_cast<size_t>(r) * static_cast<size_t>(c.top_k) + static_cast<size_t>(i);
      k_.add_scaled(expert_out_.row(slot_of_[at]), width, chosen_weight_[at], y);
    }
    if (c.own_norms) {
      k_.norm(y, width, layer.moe.expert_post_norm.params, y);
      if (c.shared > 0)
        k_.add_scaled(y, width, 1.0f, y_.row(r));
      else
        std::memcpy(y_.row(r), y, static_cast<size_t>(width) * sizeof(float));
    }
    add_residual(layer, layer.ffn_post_norm, nullptr, r);
  });
}

}  // namespace localllm
