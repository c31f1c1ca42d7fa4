// What training all weights adds to the way back: gradients of weights, norms, head and embedding.
//
// Every sum over rows has one order: a weight's is one thread's, and what threads add up by rows
// they add up by block of rows, and the blocks are added in their order.
#include "train/trainer_parts.h"

namespace localllm::train {

// The gradients by a linear's results with rows as what is summed over, and those of biases.
void Trainer::linear_columns(const Group& g, Workspace& w, const std::vector<Use>& uses,
                             float* gradient) {
  const int m = g.rows;
  for (size_t i = 0; i < uses.size(); ++i) {
    const Linear& l = *uses[i].linear;
    pool_.parallel(k_.row_blocks(l.out), 1, [&](int first, int last, int) {
      k_.pack_columns(uses[i].out, l.out, m, l.out, first, last, w.columns[i]);
      if (l.bias_at < 0) return;
      const int column = first * k_.tile_rows, end = std::min(l.out, last * k_.tile_rows);
      k_.add_columns(uses[i].out, l.out, m, column, end - column, gradient + l.bias_at + column);
    });
  }
}

// The same as the kernel, with a block's part of the sums at its place of `sums`.
void Trainer::norm_back(const Norm& norm, const float* x, const float* dy, float alpha, bool add,
                        int row0, int row1, float* dx, float* sums) {
  if (norm.at < 0) {
    k_.norm_back(norm, x, dy, alpha, add, row0, row1, dx, {});
    return;
  }
  for (int r = row0; r < row1; r += k_.tile_rows)
    k_.norm_back(norm, x, dy, alpha, add, r, std::min(r + k_.tile_rows, row1), dx,
                 cleared_sums(norm, r / k_.tile_rows, sums));
}

// Adds the sums of all blocks of m rows to the gradients of a norm.
void Trainer::add_sums(const Norm& norm, int m, const float* sums, float* gradient) {
  if (norm.at < 0) return;
  for (int b = 0; b < k_.row_blocks(m); ++b, sums += 2 * norm.n) {
    for (int i = 0; i < norm.n; ++i) gradient[norm.at + i] += sums[i];
    if (norm.bias_at < 0) continue;
    for (int i = 0; i < norm.n; ++i) gradient[norm.bias_at + i] += sums[norm.n + i];
  }
}

// The head's own gradient and that by what it is applied to, once softmax's sums are known.
void Trainer::head_whole(Workspace& w, int m, float* gradient) {
  const ModelConfig& c = model_->config;
  const int hidden = c.hidden;
  for (int v0 = 0; v0 < c.vocab; v0 += w.tile) {
    const int width = std::min(w.tile, c.vocab - v0);
    panels_of(head_logits(w, m, v0, width), v0 / kPanel, panels(width), w);
    HeadTile t = head_part(w, m, v0, width);
    t.probabilities = w.probabilities;
    rows(m, [&](int row0, int row1, int block0, int block1, int) {
      k_.head_slopes(t, row0, row1);
      k_.pack_rows(w.probabilities, w.tile, m, width, block0, block1, w.p_packed);
    });
    pool_.parallel(k_.row_blocks(width), 1, [&](int first, int last, int) {
      k_.pack_columns(w.probabilities, w.tile, m, width, first, last, w.columns[0]);
      if (model_->head_bias_at < 0) return;
      const int column = first * k_.tile_rows, end = std::min(width, last * k_.tile_rows);
      k_.add_columns(w.probabilities, w.tile, m, column, end - column,
                     gradient + model_->head_bias_at + v0 + column);
    });
    const Product d = head_back(w, m, v0, width);
    float* out = gradient + model_->head_at + static_cast<ptrdiff_t>(v0) * hidden;
    const Gradient j = gradient_of(w.columns[0], width, m, w.he, hidden, out);
    const int n = panels(hidden);
    pool_.parallel(2 * n, 1, [&](int first, int last, int thread) {
      void* scratch = w.scratch[static_cast<size_t>(thread)];
      for (int i = first; i < last; ++i) {
        if (i < n)
          k_.product(d, i, 0, k_.row_blocks(m), scratch);
        else
          k_.gradient(j, i - n, scratch);
      }
    });
  }
}

// From the gradient at what enters the first layer; each column is one thread's.
void Trainer::embed_back(const Batch& batch, const Group& g, Workspace& w, float* gradient) {
  const int hidden = model_->config.hidden;
  const float scale = model_->config.embed_scale;
  pool_.parallel(panels(hidden), 1, [&](int first, int last, int) {
    const int column0 = first * kPanel, column1 = std::min(hidden, last * kPanel);
    for (const Sequence& q : g.sequences)
      for (int p = 0; p < q.length; ++p) {
        const float* dx = w.dx + static_cast<ptrdiff_t>(q.first + p) * hidden;
        const ptrdiff_t token = batch.tokens[g.first + q.first + p];
        float* to = gradient + model_->embed_at + token * hidden;
        for (int i = column0; i < column1; ++i) to[i] += scale * dx[i];
        if (model_->positions_at < 0) continue;
        to = gradient + model_->positions_at + static_cast<ptrdiff_t>(p) * hidden;
        for (int i = column0; i < column1; ++i) to[i] += dx[i];
      }
  });
}

}  // namespace localllm::train
