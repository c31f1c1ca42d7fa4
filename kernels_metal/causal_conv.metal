// y = a causal convolution of each channel by itself, over the rows of a run and those before it,
// which the state holds. A thread a channel of a row; GATED: LFM2's, else SiLU comes after it. The
// rows of the grid beyond the run's are those of the state after it.
#include "sigmoid.metal"

// What the convolution takes at row `at` of the run: before the first, the state's.
template <bool GATED, typename X, typename S>
inline float taken(X x, S state, int at, int first, int kept, int channels, int channel) {
  if (at < 0) return state[(kept + at) * channels + channel];
  const size_t place = size_t(first + at) * (GATED ? 3 * channels : channels) + channel;
  const float value = float(x[place]);
  return GATED ? value * float(x[place + 2 * channels]) : value;
}

//: body
  const int channels = taps_shape[1], kept = state_shape[0];
  const int first = run[0], count = run[1], sure = run[2];
  const int channel = thread_position_in_grid.x, row = thread_position_in_grid.y;
  if (channel >= channels) return;
  if (row >= count) {
    const int place = row - count;
    after[place * channels + channel] =
        taken<GATED>(x, state, sure - kept + place, first, kept, channels, channel);
    return;
  }
  float sum = 0.0f;
  for (int tap = 0; tap <= kept; tap++) {
    sum = fma(taken<GATED>(x, state, row - kept + tap, first, kept, channels, channel),
              taps[tap * channels + channel], sum);
  }
  if (taps_shape[0] > kept + 1) sum += taps[(kept + 1) * channels + channel];
  const float gate =
      GATED ? float(x[(size_t(first + row) * 3 + 1) * channels + channel]) : sigmoid(sum);
  y[size_t(row) * channels + channel] = U(gate * sum);
