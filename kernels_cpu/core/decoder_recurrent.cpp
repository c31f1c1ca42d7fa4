// The recurrent half of a layer: projections by rows, then each head carries its state over the
// rows of one chunk after the other. A head's state stays in the cache meanwhile, and threads share
// out heads: the order of a head's sums is that of the rows, whatever the chunks and threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/decoder.h"

namespace localllm {

namespace {

constexpr int kMostTaps = 64;

// The inputs of a convolution at row `row` of some rows, the oldest first: rows before the first
// are the state's, or nothing.
void taps_at(const FloatRows& rows, int first, int row, int kernel, const float* state,
             const float* nothing, int channels, const float** inputs) {
  for (int k = 0; k < kernel; ++k) {
    const int at = row - (kernel - 1) + k;
    if (at >= 0)
      inputs[k] = rows.row(first + at);
    else
      inputs[k] = state ? state + static_cast<ptrdiff_t>(kernel - 1 + at) * channels : nothing;
  }
}

// The state of a convolution after `count` rows: in ascending order, so it may be done in place.
void keep_inputs(const FloatRows& rows, int first, int count, int kernel, const float* state,
                 const float* nothing, int channels, float* to) {
  const float* inputs[kMostTaps];
  taps_at(rows, first, count - 1, kernel, state, nothing, channels, inputs);
  for (int k = 1; k < kernel; ++k)
    std::memmove(to + static_cast<ptrdiff_t>(k - 1) * channels, inputs[k],
                 static_cast<size_t>(channels) * sizeof(float));
}

}  // namespace

const float* Decoder::state_at(int slot, int layer) const {
  return slot < 0 ? nullptr : states_of_sequences_.at(slot, layer);
}

void Decoder::keep_guesses(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  FloatRows& kept = guesses_[static_cast<size_t>(index)];
  kept.reserve(std::max(1, guessed_), c.channels + 2 * c.heads);
  for (size_t i = 0; i < step.chunks.size(); ++i) {
    const Chunk& chunk = step.chunks[i];
    for (int g = 0; g < chunk.guesses; ++g) {
      const int row = chunk.first_row + chunk.rows - chunk.guesses + g;
      float* to = kept.row(first_guess_[i] + g);
      std::memcpy(to, conv_in_.row(row), static_cast<size_t>(c.channels) * sizeof(float));
      if (c.mixer == Mixer::kDelta)
        std::memcpy(to + c.channels, gates_.row(row),
                    2 * static_cast<size_t>(c.heads) * sizeof(float));
    }
  }
}

// Chunks in order: one may begin with what another leaves.
void Decoder::carry_inputs(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  for (const Chunk& chunk : step.chunks)
    keep_inputs(conv_in_, chunk.first_row, chunk.rows - chunk.guesses, c.kernel,
                state_at(chunk.source, index), nothing_.data(), c.channels,
                states_of_sequences_.at(chunk.target, index));
}

void Decoder::convolve_row(const Layer& layer, const FloatRows& rows, int first, int row,
                           const float* state, float* out) {
  const LayerConfig& c = layer.config;
  const float* inputs[kMostTaps];
  taps_at(rows, first, row, c.kernel, state, nothing_.data(), c.channels, inputs);
  const bool delta = c.mixer == Mixer::kDelta;
  k_.convolve(inputs, layer.recurrent.taps.data(), c.kernel, layer.recurrent.taps_bias, c.channels,
              delta, out);
  if (!delta) return;
  const float shorter = 1.0f / std::sqrt(static_cast<float>(c.key_dim));
  for (int h = 0; h < c.kv_heads; ++h) {
    k_.unit(out + h * c.key_dim, c.key_dim, shorter);
    k_.unit(out + (c.kv_heads + h) * c.key_dim, c.key_dim, 1.0f);
  }
}

// Row r of q, k and v, and beta and decay, of one head.
DeltaRow Decoder::delta_row(const LayerConfig& c, const float* qkv, const float* gates, int head,
                            float* out) {
  const int key = head / (c.heads / c.kv_heads);
  const float* keys = qkv + c.kv_heads * c.key_dim;
  return {qkv + key * c.key_dim,
          keys + key * c.key_dim,
          keys + c.kv_heads * c.key_dim + head * c.head_dim,
          gates[head],
          gates[c.heads + head],
          out};
}

void Decoder::run_heads(const Step& step, int index) {
  const LayerConfig& c = program_.layers[static_cast<size_t>(index)].config;
  const size_t size = static_cast<size_t>(c.key_dim) * static_cast<size_t>(c.head_dim);
  const ptrdiff_t at = static_cast<ptrdiff_t>(c.kernel - 1) * c.channels;
  pool_.parallel(c.heads, 1, [&](int from, int to, int thread) {
    auto* guessed = reinterpret_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].data());
    for (int h = from; h < to; ++h) {
      const ptrdiff_t place = at + static_cast<ptrdiff_t>(h) * static_cast<ptrdiff_t>(size);
      for (const Chunk& chunk : step.chunks) {
        float* target = states_of_sequences_.at(chunk.target, index) + place;
        const float* state = state_at(chunk.source, index);
        if (state)
          state += place;
        else
          state = static_cast<const float*>(std::memset(target, 0, size * sizeof(float)));
        const int sure = chunk.rows - chunk.guesses;
        for (int r = 0; r < chunk.rows; ++r) {
          const int row = chunk.first_row + r;
          const DeltaRow delta = delta_row(c, conv_out_.row(row), gates_.row(row), h,
                                           delta_out_.row(row) + h * c.head_dim);
          float* next = r < sure ? target : guessed;
          k_.delta_rule(delta, c.key_dim, c.head_dim, state, next);
          state = next;
        }
      }
    }
  });
}

void Decoder::delta_net(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const LayerConfig& c = layer.config;
  const Recurrent& w = layer.recurrent;
  const int width = program_.config.hidden, values = c.heads * c.head_dim;
  const bool quantized = !program_.config.float_activations;
  each_row(step.rows, 4 * width, [&](int r) { enter(layer.attn_norm, x_.row(r), &normed_, r); });
  adapt(index, normed_, {Target::kIn, Target::kZ});
  multiply(normed_.input(0, step.rows, quantized),
           {{w.in, conv_in_.row(0), conv_in_.stride()}, {w.z, z_.row(0), z_.stride()}});
  // What a state forgets is decided in float32 where these weights are dense.
  multiply(normed_.input(0, step.rows, quantized && w.beta->quantized()),
           {{w.beta, gates_.row(0), gates_.stride()}});
  multiply(normed_.input(0, step.rows, quantized && w.decay->quantized()),
           {{w.decay, gates_.row(0) + c.heads, gates_.stride()}});
  each_row(step.rows, c.channels, [&](int r) {
    add_delta(index, Target::kIn, r, 0, c.channels, conv_in_.row(r));
    add_delta(index, Target::kZ, r, 0, values, z_.row(r));
    k_.delta_gates(w.rate, w.step, c.heads, gates_.row(r), gates_.row(r) + c.heads);
  });
  keep_guesses(step, index);
  carry_inputs(step, index);
  for (const Chunk& chunk : step.chunks)
    each_row(chunk.rows, 8 * c.channels, [&](int r) {
      convolve_row(layer, conv_in_, chunk.first_row, r, state_at(chunk.source, index),
                   conv_out_.row(chunk.first_row + r));
    });
  run_heads(step, index);
  each_row(step.rows, 8 * values, [&](int r) {
    float* y = delta_out_.row(r);
    for (int h = 0; h < c.heads; ++h)
      k_.norm(y + h * c.head_dim, c.head_dim, w.norm.params, y + h * c.head_dim);
    k_.activate(Activation::kSilu, z_.row(r), y, values, mixed_.row(r));
    quantize(&mixed_, r, values);
  });
  leave(step, index);
}

void Decoder::short_conv(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const Recurrent& w = layer.recurrent;
  const int width = program_.config.hidden;
  each_row(step.rows, 4 * width, [&](int r) { enter(layer.attn_norm, x_.row(r), &normed_, r); });
  adapt(index, normed_, {Target::kIn});
  multiply(normed_.input(0, step.rows, !program_.config.float_activations),
           {{w.in, conv_out_.row(0), conv_out_.stride()}});
  each_row(step.rows, 4 * width, [&](int r) {
    float* three = conv_out_.row(r);
    add_delta(index, Target::kIn, r, 0, 3 * width, three);
    if (w.in_bias) k_.add_scaled(w.in_bias, 3 * width, 1.0f, three);
    k_.product(three, three + 2 * width, width, conv_in_.row(r));
  });
  keep_guesses(step, index);
  carry_inputs(step, index);
  for (const Chunk& chunk : step.chunks)
    each_row(chunk.rows, 8 * width, [&](int r) {
      const int row = chunk.first_row + r;
      float* y = mixed_.row(row);
      convolve_row(layer, conv_in_, chunk.first_row, r, state_at(chunk.source, index), y);
      k_.product(y, conv_out_.row(row) + width, width, y);
      quantize(&mixed_, row, width);
    });
  leave(step, index);
}

// The mixer's last linear over mixed_, and the residual.
void Decoder::leave(const Step& step, int index) {
  const Layer& layer = program_.layers[static_cast<size_t>(index)];
  const Recurrent& w = layer.recurrent;
  const int width = program_.config.hidden;
  adapt(index, mixed_, {Target::kOut});
  multiply(mixed_.input(0, step.rows, !program_.config.float_activations),
           {{w.out, y_.row(0), y_.stride()}});
  each_row(step.rows, 4 * width, [&](int r) {
    add_delta(index, Target::kOut, r, 0, width, y_.row(r));
    add_residual(layer, layer.attn_post_norm, w.out_bias, r);
  });
}

void Decoder::replay(int first, int rows, int source, int target) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const FlushDenormals flush;
  for (int i = 0; i < static_cast<int>(program_.layers.size()); ++i) {
    const Layer& layer = program_.layers[static_cast<size_t>(i)];
    const LayerConfig& c = layer.config;
    if (c.mixer == Mixer::kAttention) continue;
    const FloatRows& kept = guesses_[static_cast<size_t>(i)];
    const float* from = states_of_sequences_.at(source, i);
    float* to = states_of_sequences_.at(target, i);
    if (c.mixer == Mixer::kDelta) {
      each_row(rows, 8 * c.channels,
               [&](int r) { convolve_row(layer, kept, first, r, from, conv_out_.row(r)); });
      const ptrdiff_t size = static_cast<ptrdiff_t>(c.key_dim) * c.head_dim;
      const ptrdiff_t at = static_cast<ptrdiff_t>(c.kernel - 1) * c.channels;
      pool_.parallel(c.heads, 1, [&](int first_head, int last_head, int) {
        for (int h = first_head; h < last_head; ++h) {
          const float* state = from + at + h * size;
          for (int r = 0; r < rows; ++r) {
            const float* gates = kept.row(first + r) + c.channels;
            const DeltaRow delta =
                delta_row(c, conv_out_.row(r), gates, h, delta_out_.row(r) + h * c.head_dim);
            k_.delta_rule(delta, c.key_dim, c.head_dim, state, to + at + h * size);
            state = to + at + h * size;
          }
        }
      });
    }
    keep_inputs(kept, first, rows, c.kernel, from, nothing_.data(), c.channels, to);
  }
}

}  // namespace localllm
