// y = a causal convolution of each channel by itself, over the rows of a run and those before it,
// which its state holds. A thread a channel of a row; GATED: LFM2's, else SiLU comes after it. The
// rows of the grid beyond the runs' are those of the states after them.
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
  const device float* const states[] = {STATES};
  device float* const afters[] = {AFTERS};
  const int channels = taps_shape[1], kept = state_0_shape[0];
  const int last = 3 * (runs_shape[0] - 1), start = runs[0];
  const int rows = runs[last] + runs[last + 1] - start;  // of all runs
  const int channel = thread_position_in_grid.x, line = thread_position_in_grid.y;
  if (channel >= channels) return;
  if (line >= rows) {
    const int number = (line - rows) / kept, place = (line - rows) % kept;
    const int from = runs[3 * number + 2] - kept + place;
    afters[number][place * channels + channel] = taken<GATED>(
        x, states[number], from, runs[3 * number], kept, channels, channel);
    return;
  }
  int number = 0;
  while (start + line >= runs[3 * number] + runs[3 * number + 1]) number++;
  const device float* state = states[number];
  const int first = runs[3 * number], row = start + line - first;
  float sum = 0.0f;
  for (int tap = 0; tap <= kept; tap++) {
    sum = fma(taken<GATED>(x, state, row - kept + tap, first, kept, channels, channel),
              taps[tap * channels + channel], sum);
  }
  if (taps_shape[0] > kept + 1) sum += taps[(kept + 1) * channels + channel];
  const float gate =
      GATED ? float(x[(size_t(first + row) * 3 + 1) * channels + channel]) : sigmoid(sum);
  y[size_t(line) * channels + channel] = U(gate * sum);
