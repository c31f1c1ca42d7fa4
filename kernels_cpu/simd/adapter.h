// The two products of a low-rank adapter, over float32 rows.
//
// The order that decides every bit:
//   A x: lane l sums inputs l, l + 16, … by fma; then the tree of reduce_add; then times the scale
//   B t: an fma chain over the ranks, from zero
#pragma once

#include "simd/matmul.h"

namespace localllm::LOCALLLM_ISA {
namespace {

template <class Format>
void adapter_down_as(const AdapterMatrix& a, float scale, const float* const* x, int rows,
                     float* out, ptrdiff_t stride) {
  const auto* panel = reinterpret_cast<const typename Format::type*>(a.data);
  constexpr int step = kAdapterRanks * kLanes;
  for (int rank = 0; rank < a.rank; rank += kAdapterRanks) {
    for (int r = 0; r < rows; ++r) {
      const typename Format::type* w = panel;
      Vec sum[kAdapterRanks];
      for (int j = 0; j < kAdapterRanks; ++j) sum[j] = zero();
      each_vec(a.size, [&](int i, auto part) {
        const Vec in = load(x[r] + i, part);
        for (int j = 0; j < kAdapterRanks; ++j)
          sum[j] = fma(Format::get(w + j * kLanes), in, sum[j]);
        w += step;
      });
      for (int j = 0; j < kAdapterRanks; ++j)
        out[r * stride + rank + j] = scale * reduce_add(sum[j]);
    }
    panel += static_cast<ptrdiff_t>((a.size + kLanes - 1) / kLanes) * step;
  }
}

template <class Format, int PANELS>
inline void adapter_up_panels(const typename Format::type* w, int ranks, const float* t,
                              float* out) {
  Vec sum[PANELS];
  for (int n = 0; n < PANELS; ++n) sum[n] = zero();
  for (int j = 0; j < ranks; ++j) {
    const Vec tj = set1(t[j]);
    for (int n = 0; n < PANELS; ++n)
      sum[n] = fma(Format::get(w + (static_cast<ptrdiff_t>(n) * ranks + j) * kLanes), tj, sum[n]);
  }
  for (int n = 0; n < PANELS; ++n) store(out + n * kLanes, sum[n]);
}

template <class Format>
void adapter_up_as(const AdapterMatrix& b, const float* t, ptrdiff_t stride, float* const* out,
                   int rows) {
  const auto* w = reinterpret_cast<const typename Format::type*>(b.data);
  const int panels = (b.size + kLanes - 1) / kLanes;
  for (int p = 0; p < panels;) {
    const int n = p + 4 <= panels ? 4 : 1;
    for (int r = 0; r < rows; ++r) {
      float* to = out[r] + p * kLanes;
      if (n == 4)
        adapter_up_panels<Format, 4>(w, b.rank, t + r * stride, to);
      else
        adapter_up_panels<Format, 1>(w, b.rank, t + r * stride, to);
    }
    w += static_cast<ptrdiff_t>(n) * b.rank * kLanes;
    p += n;
  }
}

void adapter_down(const AdapterMatrix& a, float scale, const float* const* x, int rows, float* out,
                  ptrdiff_t stride) {
  if (a.kind == WeightKind::kFloat32)
    adapter_down_as<Dense<float>>(a, scale, x, rows, out, stride);
  else if (a.kind == WeightKind::kFloat16)
    adapter_down_as<Dense<uint16_t>>(a, scale, x, rows, out, stride);
  else
    adapter_down_as<Bfloat>(a, scale, x, rows, out, stride);
}

void adapter_up(const AdapterMatrix& b, const float* t, ptrdiff_t stride, float* const* out,
                int rows) {
  if (b.kind == WeightKind::kFloat32)
    adapter_up_as<Dense<float>>(b, t, stride, out, rows);
  else if (b.kind == WeightKind::kFloat16)
    adapter_up_as<Dense<uint16_t>>(b, t, stride, out, rows);
  else
    adapter_up_as<Bfloat>(b, t, stride, out, rows);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
