// The head with cross-entropy.
#include <cmath>

#include "train/trainer_parts.h"

namespace localllm::train {

Product Trainer::head_logits(const Workspace& w, int m, int column0, int width) const {
  Product p;
  p.rows = w.head_packed;
  p.steps = k_.steps(model_->config.hidden);
  p.weight = model_->head;
  p.m = m;
  p.columns = column0 + width;
  p.column0 = column0;
  p.bias = model_->head_bias;
  p.out = w.logits;
  p.ld = w.tile;
  return p;
}

HeadTile Trainer::head_part(const Workspace& w, int m, int column0, int width) const {
  HeadTile t;
  t.logits = w.logits;
  t.m = m;
  t.width = width;
  t.ld = w.tile;
  t.column0 = column0;
  t.targets = w.targets;
  t.scale = model_->config.logit_scale;
  t.softcap = model_->config.logit_softcap;
  t.top = w.top;
  t.sum = w.sum;
  t.target = w.target;
  t.target_slope = w.slope;
  t.weights = w.row_weights;
  return t;
}

// dhidden += packed slopes of some of the vocabulary times their rows of the head.
Product Trainer::head_back(const Workspace& w, int m, int first, int count) const {
  Product d;
  d.rows = w.p_packed;
  d.steps = k_.steps(count);
  d.weight = model_->head;
  d.backward = true;
  d.first = first;
  d.count = count;
  d.m = m;
  d.columns = d.ld = model_->config.hidden;
  d.add = w.dhidden;
  d.out = w.dhidden;
  return d;
}

void Trainer::panels_of(const Product& p, int first, int count, Workspace& w) {
  pool_.parallel(count, 1, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; ++i)
      k_.product(p, first + i, 0, k_.row_blocks(p.m), w.scratch[static_cast<size_t>(thread)]);
  });
}

// Over the vocabulary tile by tile, in one pass: the softmax's sum and its product with the head
// are kept relative to the largest logit so far. Where the head is trained, the gradients follow in
// a second pass, since its own needs softmax itself.
double Trainer::head(const Batch& batch, const Group& g, Workspace& w, const float* weights,
                     float* log_probs, float* gradient) {
  const ModelConfig& c = model_->config;
  const int hidden = c.hidden;
  const float* x = w.x.back();
  int m = 0;
  for (int r = 0; r < g.rows; ++r) {
    if (weights && weights[g.first + r] == 0.0f) continue;
    w.rows[m] = r;
    w.targets[m] = batch.targets[g.first + r];
    w.row_weights[m++] = weights ? weights[g.first + r] : 0.0f;
  }
  if (weights) std::fill_n(w.dx, static_cast<size_t>(g.rows) * static_cast<size_t>(hidden), 0.0f);
  if (m == 0) return 0.0;
  rows(m, [&](int row0, int row1, int block0, int block1, int) {
    for (int r = row0; r < row1; ++r) {
      std::copy_n(x + static_cast<ptrdiff_t>(w.rows[r]) * hidden, hidden,
                  w.hx + static_cast<ptrdiff_t>(r) * hidden);
      w.top[r] = -3.0e38f;
      w.sum[r] = w.target[r] = w.slope[r] = 0.0f;
      if (weights) std::fill_n(w.dhidden + static_cast<ptrdiff_t>(r) * hidden, hidden, 0.0f);
    }
    k_.norm(model_->final_norm, w.hx, row0, row1, w.he, hidden);
    k_.pack_rows(w.he, hidden, m, hidden, block0, block1, w.head_packed);
  });
  const bool at_once = weights && !model_->whole;
  for (int v0 = 0; v0 < c.vocab; v0 += w.tile) {
    const int width = std::min(w.tile, c.vocab - v0);
    panels_of(head_logits(w, m, v0, width), v0 / kPanel, panels(width), w);
    HeadTile t = head_part(w, m, v0, width);
    t.probabilities = at_once ? w.probabilities : nullptr;
    t.dhidden = at_once ? w.dhidden : nullptr;
    t.hidden = hidden;
    rows(m, [&](int row0, int row1, int block0, int block1, int) {
      k_.head_tile(t, row0, row1);
      if (at_once) k_.pack_rows(w.probabilities, w.tile, m, width, block0, block1, w.p_packed);
    });
    if (at_once) panels_of(head_back(w, m, v0, width), 0, panels(hidden), w);
  }
  double loss = 0.0;
  for (int r = 0; r < m; ++r) {
    const float value = w.target[r] - w.top[r] - std::log(w.sum[r]);
    if (log_probs) log_probs[g.first + w.rows[r]] = value;
    loss -= static_cast<double>(w.row_weights[r]) * static_cast<double>(value);
  }
  if (!weights) return loss;
  if (model_->whole) head_whole(w, m, gradient);
  rows(m, [&](int first, int last, int, int, int) {
    // d loss / d hidden = weight * (sum of p E / sum of p - E[target]).
    std::vector<float> row(static_cast<size_t>(hidden));
    for (int r = first; r < last && at_once; ++r) {
      k_.weight_row(*model_->head, w.targets[r], row.data());
      float* d = w.dhidden + static_cast<ptrdiff_t>(r) * hidden;
      const float inverse = 1.0f / w.sum[r], weight = w.row_weights[r];
      for (int i = 0; i < hidden; ++i)
        d[i] = weight * (d[i] * inverse - w.slope[r] * row[static_cast<size_t>(i)]);
    }
    norm_back(model_->final_norm, w.hx, w.dhidden, 1.0f, false, first, last, w.dhidden, w.sums[0]);
    for (int r = first; r < last; ++r)
      std::copy_n(w.dhidden + static_cast<ptrdiff_t>(r) * hidden, hidden,
                  w.dx + static_cast<ptrdiff_t>(w.rows[r]) * hidden);
  });
  add_sums(model_->final_norm, m, w.sums[0], gradient);
  return loss;
}

}  // namespace localllm::train
