#include "core/guess.h"

#include <algorithm>
#include <vector>

namespace localllm {

bool guess(Decoder& model, Decoder& layer, const HeadParts& parts, Step step, const float* hidden,
           const int32_t* following, float* states, float* logits) {
  const int rows = step.rows, width = layer.program().config.hidden;
  const Kernels& k = layer.table();
  const auto all = static_cast<size_t>(rows) * static_cast<size_t>(width);
  std::vector<float> normed(all), fused(all), embedded(all), guessed(all);
  const auto norm = [&](const NormParams& params, const float* from, int row) {
    k.norm(from, width, params, normed.data() + static_cast<ptrdiff_t>(row) * width);
  };
  for (int r = 0; r < rows; ++r)
    norm(parts.hidden_norm, hidden + static_cast<ptrdiff_t>(r) * width, r);
  layer.project(normed.data(), rows, *parts.from_hidden, fused.data());
  model.embed_rows(following, rows, guessed.data());
  for (int r = 0; r < rows; ++r)
    norm(parts.embedding_norm, guessed.data() + static_cast<ptrdiff_t>(r) * width, r);
  layer.project(normed.data(), rows, *parts.from_embedding, embedded.data());
  k.add_scaled(embedded.data(), rows * width, 1.0f, fused.data());
  step.embeddings = fused.data();
  step.hidden = guessed.data();
  if (!layer.forward(step)) return false;
  const int chunks = static_cast<int>(step.chunks.size());
  for (int i = 0; i < chunks; ++i) {
    const Chunk& chunk = step.chunks[static_cast<size_t>(i)];
    const float* last =
        guessed.data() + static_cast<ptrdiff_t>(chunk.first_row + chunk.rows - 1) * width;
    std::copy_n(last, width, states + static_cast<ptrdiff_t>(i) * width);
  }
  if (parts.head)
    model.project(states, chunks, *parts.head, logits);
  else
    model.project(states, chunks, logits);
  return true;
}

}  // namespace localllm
