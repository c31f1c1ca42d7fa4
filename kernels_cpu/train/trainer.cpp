// Groups of sequences and their way through the model.
#include <cmath>

#include "train/trainer_parts.h"

namespace localllm::train {

namespace {

constexpr int kRecomputedRows = 512;  // of a group that keeps nothing
constexpr int kFewestKept = 192;  // rows that keeping must at least allow: fewer unpack too often

}  // namespace

Trainer::Trainer(std::unique_ptr<Model> model, const Kernels& kernels, int threads,
                 size_t keep_bytes)
    : model_(std::move(model)), k_(kernels), pool_(threads), keep_bytes_(keep_bytes) {}

size_t Trainer::kept_row_bytes() const {
  const Workspace with(*model_, k_, nullptr, 960, 960, 1, 1, true, true);
  const Workspace without(*model_, k_, nullptr, 960, 960, 1, 1, false, true);
  return (with.bytes - without.bytes) / 960 + 1;
}

bool Trainer::keeps(int rows) const {
  const size_t most = keep_bytes_ / kept_row_bytes();
  return most >= kFewestKept && static_cast<size_t>(rows) <= most;
}

int Trainer::group_rows() const {
  const size_t most = keep_bytes_ / kept_row_bytes();
  if (most < kFewestKept) return kRecomputedRows;
  return static_cast<int>(std::min<size_t>(most, kRecomputedRows));
}

std::vector<Trainer::Group> Trainer::groups(const Batch& batch) const {
  std::vector<Group> all;
  const int most = group_rows();
  for (int i = 0; i < batch.sequences; ++i) {
    const int at = batch.offsets[i], length = batch.offsets[i + 1] - at;
    if (length == 0) continue;
    if (all.empty() || all.back().rows + length > most) {
      all.emplace_back();
      all.back().first = at;
      all.back().first_row = batch.first_row + static_cast<uint32_t>(at);
      all.back().seed = batch.seed;
      all.back().dropout = batch.dropout;
    }
    Group& g = all.back();
    g.sequences.push_back({g.rows, length, g.padded});
    g.rows += length;
    g.padded += round_up(length, kPanel);
    g.longest = std::max(g.longest, length);
  }
  for (Group& g : all) g.keep = keeps(g.rows);
  return all;
}

size_t Trainer::group_bytes(const Group& g, bool gradients) const {
  return Workspace(*model_, k_, nullptr, g.rows, g.padded, g.longest, pool_.size(),
                   g.keep && gradients, gradients)
      .bytes;
}

size_t Trainer::working_bytes(const std::vector<int>& lengths, bool gradients) const {
  std::vector<int32_t> offsets{0};
  for (const int n : lengths) offsets.push_back(offsets.back() + n);
  Batch batch;
  batch.offsets = offsets.data();
  batch.sequences = static_cast<int>(lengths.size());
  size_t most = 0;
  for (const Group& g : groups(batch)) most = std::max(most, group_bytes(g, gradients));
  return most + prepared_bytes();
}

Workspace Trainer::begin(const Batch& batch, const Group& g, bool gradients) {
  const size_t bytes = group_bytes(g, gradients);
  Workspace w(*model_, k_, memory_.reserve(bytes), g.rows, g.padded, g.longest, pool_.size(),
              g.keep && gradients, gradients);
  rows(g.rows, [&](int row0, int row1, int, int, int) {
    for (const TrainedLayer& l : model_->layers) {
      if (l.config.rope < 0) continue;
      const Rope& rope = batch.ropes[static_cast<size_t>(l.config.rope)];
      const ptrdiff_t width = 2 * l.config.rope_half;
      for (int r = row0; r < row1; ++r)
        std::copy_n(rope.table + rope.index[g.first + r] * width, width,
                    w.ropes[static_cast<size_t>(l.config.rope)] + r * width);
    }
  });
  embed(batch, g, w);
  return w;
}

void Trainer::embed(const Batch& batch, const Group& g, Workspace& w) {
  const int hidden = model_->config.hidden;
  const int sequences = static_cast<int>(g.sequences.size());
  const uint32_t seed = target_seed(batch.seed, 0xFFFFFFFFu);
  for (int s = 0; s < sequences; ++s) {
    const Sequence& q = g.sequences[static_cast<size_t>(s)];
    const double noise =
        batch.neftune / std::sqrt(static_cast<double>(q.length) * static_cast<double>(hidden));
    pool_.parallel(q.length, 16, [&](int first, int last, int) {
      std::vector<float> position(static_cast<size_t>(model_->positions ? hidden : 0));
      for (int p = first; p < last; ++p) {
        const int row = q.first + p;
        float* x = w.x[0] + static_cast<ptrdiff_t>(row) * hidden;
        k_.weight_row(*model_->embed, batch.tokens[g.first + row], x);
        for (int i = 0; i < hidden; ++i) x[i] *= model_->config.embed_scale;
        if (batch.neftune > 0.0) {
          const uint32_t of_row = mix(seed + (g.first_row + static_cast<uint32_t>(row)));
          for (int i = 0; i < hidden; ++i) {
            const uint32_t hash = mix(of_row + static_cast<uint32_t>(i) * 0x9E3779B9u);
            x[i] += static_cast<float>((static_cast<double>(hash) / 2147483648.0 - 1.0) * noise);
          }
        }
        if (model_->positions) {
          k_.weight_row(*model_->positions, p, position.data());
          for (int i = 0; i < hidden; ++i) x[i] += position[static_cast<size_t>(i)];
        }
      }
    });
  }
}

void Trainer::log_probs(const Batch& batch, const float* parameters, float* out) {
  const FlushDenormals flush;
  prepare(parameters);
  for (const Group& g : groups(batch)) {
    Workspace w = begin(batch, g, false);
    for (size_t i = 0; i < model_->layers.size(); ++i)
      layer_forward(g, w, static_cast<int>(i), true);
    head(batch, g, w, nullptr, out, nullptr);
  }
}

double Trainer::gradients(const Batch& batch, const float* weights, const float* parameters,
                          float* gradient) {
  const FlushDenormals flush;
  prepare(parameters);
  double loss = 0.0;
  for (const Group& g : groups(batch)) {
    const float* first = weights + g.first;
    if (std::all_of(first, first + g.rows, [](float x) { return x == 0.0f; })) continue;
    Workspace w = begin(batch, g, true);
    const int layers = static_cast<int>(model_->layers.size());
    for (int i = 0; i < layers; ++i) layer_forward(g, w, i, true);
    loss += head(batch, g, w, weights, nullptr, gradient);
    for (int i = layers - 1; i >= model_->lowest; --i) layer_backward(g, w, i, gradient);
    if (model_->whole) embed_back(batch, g, w, gradient);
  }
  return loss;
}

}  // namespace localllm::train
