#include "core/guess.h"

#include <algorithm>

namespace localllm {

bool Guesser::run(Step step, const float* hidden, const int32_t* following, float* states,
                  float* logits) {
  const int rows = step.rows, width = layer_.program().config.hidden;
  const Kernels& k = layer_.table();
  const auto all = static_cast<size_t>(rows) * static_cast<size_t>(width);
  std::vector<float> normed(all), fused(all), embedded(all), guessed(all);
  const auto norm = [&](const NormParams& params, const float* from, int row) {
    k.norm(from, width, params, normed.data() + static_cast<ptrdiff_t>(row) * width);
  };
  for (int r = 0; r < rows; ++r)
    norm(parts_.hidden_norm, hidden + static_cast<ptrdiff_t>(r) * width, r);
  layer_.project(normed.data(), rows, *parts_.from_hidden, fused.data());
  model_.embed_rows(following, rows, guessed.data());
  for (int r = 0; r < rows; ++r)
    norm(parts_.embedding_norm, guessed.data() + static_cast<ptrdiff_t>(r) * width, r);
  layer_.project(normed.data(), rows, *parts_.from_embedding, embedded.data());
  k.add_scaled(embedded.data(), rows * width, 1.0f, fused.data());
  step.embeddings = fused.data();
  step.hidden = guessed.data();
  if (!layer_.forward(step)) return false;
  const int chunks = static_cast<int>(step.chunks.size());
  for (int i = 0; i < chunks; ++i) {
    const Chunk& chunk = step.chunks[static_cast<size_t>(i)];
    const float* last =
        guessed.data() + static_cast<ptrdiff_t>(chunk.first_row + chunk.rows - 1) * width;
    std::copy_n(last, width, states + static_cast<ptrdiff_t>(i) * width);
  }
  if (parts_.head)
    model_.project(states, chunks, *parts_.head, logits);
  else
    model_.project(states, chunks, logits);
  return true;
}

}  // namespace localllm
