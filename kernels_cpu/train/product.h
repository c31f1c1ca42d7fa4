// Products with weights and adapters, and adapters' gradients.
#pragma once

#include "train/weights.h"

namespace localllm::LOCALLLM_ISA {
namespace {

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

inline uint32_t row_seed(const train::Dropout& d, int row) {
  return mix(d.seed + (d.first_row + static_cast<uint32_t>(row)));
}

// factors[i] = the scale where column0 + i is kept, else 0.
inline void kept(const train::Dropout& d, uint32_t row, int column0, int n, float* factors) {
  for (int i = 0; i < n; ++i) {
    const uint32_t hash = mix(row + static_cast<uint32_t>(column0 + i) * 0x9E3779B9u);
    factors[i] = hash >= d.threshold ? d.scale : 0.0f;
  }
}

void scale_columns(void* x, int cols, const float* gain, int row0, int row1) {
  for (int r = row0; r < row1; ++r) {
    Elem* at = static_cast<Elem*>(x) + static_cast<ptrdiff_t>(r) * cols;
    each_vec(cols, [&](int i, auto tail) {
      store_elem(at + i, mul(load_elem(at + i, tail), load(gain + i, tail)), tail);
    });
  }
}

void drop(const void* x, int ld, int cols, int row0, int row1, const train::Dropout& d, void* out) {
  float factors[64];
  for (int r = row0; r < row1; ++r) {
    const Elem* from = static_cast<const Elem*>(x) + static_cast<ptrdiff_t>(r) * ld;
    Elem* to = static_cast<Elem*>(out) + static_cast<ptrdiff_t>(r) * ld;
    const uint32_t seed = row_seed(d, r);
    for (int c = 0; c < cols; c += 64) {
      const int n = cols - c < 64 ? cols - c : 64;
      kept(d, seed, c, n, factors);
      each_vec(n, [&](int i, auto tail) {
        store_elem(to + c + i, mul(load_elem(from + c + i, tail), load(factors + i, tail)), tail);
      });
    }
  }
}

// Columns of the rank become lanes: [rank / 16][steps(n)][16][kPair].
void factor_panel(const float* factor, int rank, int n, ptrdiff_t stride_r, ptrdiff_t stride_c,
                  float scale, void* out) {
  const int padded = train::round_up(n, kBlock);
  Elem* to = static_cast<Elem*>(out);
  for (int r0 = 0; r0 < rank; r0 += 16, to += padded * 16)
    for (int c = 0; c < padded; ++c)
      for (int i = 0; i < 16; ++i) {
        const int r = r0 + i;
        const float x = r < rank && c < n ? factor[r * stride_r + c * stride_c] * scale : 0.0f;
        to[(c / kPair * 16 + i) * kPair + c % kPair] = to_elem(x);
      }
}

void low_rank(const train::LowRank& job, int block0, int block1) {
  const Tiles in_use;
  const int low_steps = steps_of(job.rank), column_steps = steps_of(job.m);
  alignas(64) float c[kRows * 16];
  Elem* transposed = static_cast<Elem*>(job.transposed);
  for (int b = block0; b < block1; ++b) {
    const Elem* rows =
        static_cast<const Elem*>(job.rows) + static_cast<ptrdiff_t>(b) * job.steps * kStep;
    Elem* packed = static_cast<Elem*>(job.packed) + static_cast<ptrdiff_t>(b) * low_steps * kStep;
    for (int r0 = 0; r0 < job.rank; r0 += 16) {
      const Elem* panel =
          static_cast<const Elem*>(job.panel) + static_cast<ptrdiff_t>(r0) * job.steps * kPair;
      tile<1>(rows, panel, job.steps, nullptr, nullptr, 0, c);
      for (int i = 0; i < 16 && r0 + i < low_steps * kPair; ++i) {
        const int r = r0 + i;
        for (int k = 0; k < kRows; ++k) {
          const Elem x = to_elem(c[k * 16 + i]);
          packed[packed_at(k, r / kPair, low_steps) + r % kPair] = x;
          const int row = b * kRows + k;
          if (r < job.rank && row < column_steps * kPair)
            transposed[static_cast<ptrdiff_t>(r / kRows) * column_steps * kStep +
                       packed_at(r % kRows, row / kPair, column_steps) + row % kPair] = x;
        }
      }
    }
  }
}

// The adapter's outer factor as a panel's further steps.
inline void factor_steps(const train::Product& job, int panel, int columns, Elem* dst,
                         ptrdiff_t part_stride) {
  for (int p = 0; p < parts(columns); ++p) {
    const Part here = part(columns, p);
    const int width = here.vecs * 16;
    Elem* to = dst + p * part_stride;
    for (int s = 0; s < job.low_steps; ++s)
      for (int i = 0; i < width; ++i)
        for (int k = 0; k < kPair; ++k) {
          const int r = s * kPair + k, column = panel * kPanel + here.column + i;
          const bool inside = r < job.rank && here.column + i < columns;
          *to++ = to_elem(inside ? job.factor[r * job.factor_r + column * job.factor_c] *
                                       job.factor_scale
                                 : 0.0f);
        }
  }
}

// out += sum over a block's rows of slope * c / lengths.
inline void add_slopes(const train::Product& job, const float* c, int ldc, int row0, int column0,
                       int columns) {
  float* out = static_cast<float*>(job.out) + column0;
  const Elem* slope = static_cast<const Elem*>(job.slope) + column0;
  each_vec(columns, [&](int i, auto tail) {
    Vec sum = zero();
    for (int r = 0; r < kRows && row0 + r < job.m; ++r)
      sum = fma(load_elem(slope + static_cast<ptrdiff_t>(row0 + r) * job.ld + i, tail),
                load(c + r * ldc + i, tail), sum);
    const Vec length = select(valid(tail), load(job.lengths + column0 + i, tail), set1(1.0f));
    store(out + i, add(load(out + i, tail), div(sum, length)), tail);
  });
}

inline void finish(const train::Product& job, const float* c, int ldc, int row0, int column0,
                   int columns) {
  float factors[kPanel];
  for (int r = 0; r < kRows && row0 + r < job.m; ++r) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(row0 + r) * job.ld + (column0 - job.column0);
    const float* from = c + r * ldc;
    const bool dropped = job.dropout.threshold != 0;
    if (dropped) kept(job.dropout, row_seed(job.dropout, row0 + r), column0, columns, factors);
    each_vec(columns, [&](int i, auto tail) {
      Vec x = load(from + i, tail);
      if (job.gain) x = mul(x, load(job.gain + column0 + i, tail));
      if (job.bias) x = add(x, load(job.bias + column0 + i, tail));
      if (job.alpha != 1.0f) x = mul(x, set1(job.alpha));
      if (dropped) x = mul(x, load(factors + i, tail));
      if (job.add) x = add(load(job.add + at + i, tail), x);
      if (job.out_elements)
        store_elem(static_cast<Elem*>(job.out) + at + i, x, tail);
      else
        store(static_cast<float*>(job.out) + at + i, x, tail);
    });
  }
}

void product(const train::Product& job, int panel, int block0, int block1, void* scratch) {
  const Tiles in_use;
  const int left = job.columns - panel * kPanel, columns = left < kPanel ? left : kPanel;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(job.steps) * kPartWidth * kPair;
  const ptrdiff_t low_stride = static_cast<ptrdiff_t>(job.low_steps) * kPartWidth * kPair;
  Elem* right = static_cast<Elem*>(scratch);
  Elem* low = right + stride * (kPanel / kPartWidth);
  if (job.steps > 0) {
    if (job.backward)
      backward_panel(*job.weight, panel, columns, job.first, job.count, right, stride);
    else
      forward_panel(*job.weight, panel, columns, right, stride);
  }
  if (job.low_steps > 0) factor_steps(job, panel, columns, low, low_stride);
  alignas(64) float c[kRows * kPartWidth];
  for (int b = block0; b < block1; ++b)
    for (int p = 0; p < parts(columns); ++p) {
      const Part here = part(columns, p);
      tile(here.vecs,
           static_cast<const Elem*>(job.rows) + static_cast<ptrdiff_t>(b) * job.steps * kStep,
           right + p * stride, job.steps,
           static_cast<const Elem*>(job.low) + static_cast<ptrdiff_t>(b) * job.low_steps * kStep,
           low + p * low_stride, job.low_steps, c);
      const int width = here.vecs * 16, rest = columns - here.column;
      const int n = rest < width ? rest : width, column = panel * kPanel + here.column;
      if (job.slope)
        add_slopes(job, c, width, b * kRows, column, n);
      else
        finish(job, c, width, b * kRows, column, n);
    }
}

void gradient(const train::Gradient& job, int panel, void* scratch) {
  const Tiles in_use;
  const int left = job.columns - panel * kPanel, columns = left < kPanel ? left : kPanel;
  const int steps = steps_of(job.m);
  const ptrdiff_t stride = static_cast<ptrdiff_t>(steps) * kPartWidth * kPair;
  Elem* right = static_cast<Elem*>(scratch);
  pack_sums(static_cast<const Elem*>(job.x) + panel * kPanel, job.ld, job.m, columns, steps, right,
            stride);
  alignas(64) float c[kRows * kPartWidth];
  for (int b = 0; b * kRows < job.rank; ++b)
    for (int p = 0; p < parts(columns); ++p) {
      const Part here = part(columns, p);
      const int width = here.vecs * 16;
      tile(here.vecs,
           static_cast<const Elem*>(job.transposed) + static_cast<ptrdiff_t>(b) * steps * kStep,
           right + p * stride, steps, nullptr, nullptr, 0, c);
      for (int r = 0; r < kRows && b * kRows + r < job.rank; ++r) {
        float* out =
            job.out + (b * kRows + r) * job.out_r + (panel * kPanel + here.column) * job.out_c;
        const int rest = columns - here.column, n = rest < width ? rest : width;
        if (job.out_c == 1) {
          each_vec(n, [&](int i, auto tail) {
            const Vec x = mul(load(c + r * width + i, tail), set1(job.scale));
            store(out + i, add(load(out + i, tail), x), tail);
          });
          continue;
        }
        for (int i = 0; i < n; ++i) out[i * job.out_c] += c[r * width + i] * job.scale;
      }
    }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
