// The two products of a low-rank adapter, over float32 rows.
//
// The order that decides every bit:
//   A x: lane l sums inputs l, l + 16, … by fma; then the tree of reduce_add; then times the scale
//   B t: an fma chain over the ranks, from zero
#pragma once

#include "simd/matmul.h"

namespace localllm::LOCALLLM_ISA {
namespace {

// Rows that share a reading of the matrices: as many as registers hold the sums of.
constexpr int kAdapterRows = kAttentionRows >= 8 ? 4 : 1;
// Bytes between what is read and what is fetched. An adapter's matrices stand in the order of their
// use, so beyond one's end is the next.
constexpr ptrdiff_t kAdapterAhead = 4096;

// Fetches the line that begins at vector `i`, if one does.
template <class T>
inline __attribute__((always_inline)) void fetch_ahead(const T* w, ptrdiff_t i) {
  if (i * sizeof(T) % 4 == 0)
    prefetch(reinterpret_cast<const uint8_t*>(w + i * kLanes) + kAdapterAhead);
}

// FETCH: the matrix comes from memory, not from a cache that rows before these have filled.
template <class Format, int ROWS, bool FETCH>
inline void adapter_down_rows(const typename Format::type* w, int n, float scale,
                              const float* const* x, float* out, ptrdiff_t stride) {
  Vec sum[ROWS][kAdapterRanks];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < kAdapterRanks; ++j) sum[r][j] = zero();
  each_vec(n, [&](int i, auto part) {
    Vec in[ROWS];
    for (int r = 0; r < ROWS; ++r) in[r] = load(x[r] + i, part);
    for (int j = 0; j < kAdapterRanks; ++j) {
      if (FETCH) fetch_ahead(w, j);
      const Vec a = Format::get(w + j * kLanes);
      for (int r = 0; r < ROWS; ++r) sum[r][j] = fma(a, in[r], sum[r][j]);
    }
    w += kAdapterRanks * kLanes;
  });
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < kAdapterRanks; ++j) out[r * stride + j] = scale * reduce_add(sum[r][j]);
}

template <class Format>
void adapter_down_as(const AdapterMatrix& a, float scale, const float* const* x, int rows,
                     float* out, ptrdiff_t stride) {
  const auto* w = reinterpret_cast<const typename Format::type*>(a.data);
  const ptrdiff_t panel =
      static_cast<ptrdiff_t>((a.size + kLanes - 1) / kLanes) * kAdapterRanks * kLanes;
  for (int j = 0; j < a.rank; j += kAdapterRanks, w += panel) {
    int r = 0;
    for (; r + kAdapterRows <= rows; r += kAdapterRows)
      adapter_down_rows<Format, kAdapterRows, kAdapterRows == 1>(w, a.size, scale, x + r,
                                                                 out + r * stride + j, stride);
    if (r == 0)
      for (; r < rows; ++r)
        adapter_down_rows<Format, 1, true>(w, a.size, scale, x + r, out + r * stride + j, stride);
    for (; r < rows; ++r)
      adapter_down_rows<Format, 1, false>(w, a.size, scale, x + r, out + r * stride + j, stride);
  }
}

template <class Format, int ROWS, int PANELS, bool FETCH>
inline void adapter_up_rows(const typename Format::type* w, int ranks, const float* t,
                            ptrdiff_t stride, float* const* out, int at) {
  Vec sum[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < PANELS; ++n) sum[r][n] = zero();
  for (int j = 0; j < ranks; ++j) {
    Vec b[PANELS];
    for (int n = 0; n < PANELS; ++n) {
      const ptrdiff_t i = static_cast<ptrdiff_t>(n) * ranks + j;
      if (FETCH) fetch_ahead(w, i);
      b[n] = Format::get(w + i * kLanes);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vec tj = set1(t[r * stride + j]);
      for (int n = 0; n < PANELS; ++n) sum[r][n] = fma(b[n], tj, sum[r][n]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < PANELS; ++n) store(out[r] + at + n * kLanes, sum[r][n]);
}

template <class Format, int PANELS>
inline void adapter_up_panels(const typename Format::type* w, int ranks, const float* t,
                              ptrdiff_t stride, float* const* out, int at, int rows) {
  int r = 0;
  for (; r + kAdapterRows <= rows; r += kAdapterRows)
    adapter_up_rows<Format, kAdapterRows, PANELS, kAdapterRows == 1>(w, ranks, t + r * stride,
                                                                     stride, out + r, at);
  if (r == 0)
    for (; r < rows; ++r)
      adapter_up_rows<Format, 1, PANELS, true>(w, ranks, t + r * stride, stride, out + r, at);
  for (; r < rows; ++r)
    adapter_up_rows<Format, 1, PANELS, false>(w, ranks, t + r * stride, stride, out + r, at);
}

template <class Format>
void adapter_up_as(const AdapterMatrix& b, const float* t, ptrdiff_t stride, float* const* out,
                   int rows) {
  const auto* w = reinterpret_cast<const typename Format::type*>(b.data);
  const ptrdiff_t panel = static_cast<ptrdiff_t>(b.rank) * kLanes;
  int at = 0;
  for (; at + 4 * kLanes <= b.size; at += 4 * kLanes, w += 4 * panel)
    adapter_up_panels<Format, 4>(w, b.rank, t, stride, out, at, rows);
  for (; at < b.size; at += kLanes, w += panel)
    adapter_up_panels<Format, 1>(w, b.rank, t, stride, out, at, rows);
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
