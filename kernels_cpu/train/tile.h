// What packs rows and panels for the product that everything is made of.
#pragma once

#include <cstring>

#include "simd/math.h"
#include "train/kernels.h"
#ifdef LOCALLLM_AMX_TILES
#include "train/amx_tile.h"
#else
#include "train/vector_tile.h"
#endif

namespace localllm::LOCALLLM_ISA {
namespace {

using train::kBlock;
using train::kPanel;

// Steps of a product: kStepUnit divides each count.
inline int steps_of(int n) { return train::round_up((n + kPair - 1) / kPair, kStepUnit); }

inline Vec load_elem(const Elem* p, Full) { return load_elem(p); }
inline Vec load_elem(const Elem* p, int n) {
  float lanes16[16] = {};
  for (int i = 0; i < n; ++i) lanes16[i] = to_float(p[i]);
  return load(lanes16);
}
inline void store_elem(Elem* p, const Vec& a, Full) { store_elem(p, a); }
inline void store_elem(Elem* p, const Vec& a, int n) {
  float lanes16[16];
  store(lanes16, a);
  for (int i = 0; i < n; ++i) p[i] = to_elem(lanes16[i]);
}
inline int count_of(Full) { return 16; }
inline int count_of(int n) { return n; }

// A panel of `columns` (at most kPanel) is cut into parts of up to kVecs * 16 columns, each of
// them [steps][width][kPair].
struct Part {
  int vecs, column;
};
constexpr int kPartWidth = kVecs * 16;
inline int parts(int columns) { return (columns + kPartWidth - 1) / kPartWidth; }
inline Part part(int columns, int index) {
  const int column = index * kPartWidth, left = (columns - column + 15) / 16;
  return {left < kVecs ? left : kVecs, column};
}

#if defined(__AVX2__)
// dst[d * width + r] = rows[r][d] for 8 dwords d of 8 rows.
inline void transpose8(const __m256i (&row)[8], uint32_t* dst, int width, __m256i mask,
                       [[maybe_unused]] bool whole) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 8; ++i) {
    const __m256i out = i < 4 ? _mm256_permute2x128_si256(b[i], b[i + 4], 0x20)
                              : _mm256_permute2x128_si256(b[i - 4], b[i], 0x31);
    auto* to = reinterpret_cast<int*>(dst + static_cast<ptrdiff_t>(i) * width);
    if (whole)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), out);
    else
      _mm256_maskstore_epi32(to, mask, out);
  }
}
#endif

// dst[step][width] of pairs from row-major x: rows become lanes. Beyond `rows` and `cols`: zeros.
inline void pack_lanes(const Elem* x, ptrdiff_t ld, int rows, int cols, int steps, int width,
                       Elem* dst) {
  [[maybe_unused]] const int whole = cols / kPair;  // pairs
  const auto entry = [&](int r, int s) {
    Elem pair[kPair];
    for (int p = 0; p < kPair; ++p) {
      const int c = s * kPair + p;
      pair[p] = r < rows && c < cols ? x[r * ld + c] : Elem{};
    }
    std::memcpy(dst + (static_cast<ptrdiff_t>(s) * width + r) * kPair, pair, sizeof(pair));
  };
  for (int r0 = 0; r0 < width; r0 += 8) {
    const int rn = width - r0 < 8 ? width - r0 : 8;
    int s = 0;
#if defined(__AVX2__)
    alignas(32) int keep[8];
    for (int i = 0; i < 8; ++i) keep[i] = i < rn ? -1 : 0;
    const __m256i mask = _mm256_load_si256(reinterpret_cast<const __m256i*>(keep));
    for (; s + 8 <= whole && s + 8 <= steps; s += 8) {
      __m256i row[8];
      for (int i = 0; i < 8; ++i)
        row[i] = i < rn && r0 + i < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                               x + (r0 + i) * ld + s * kPair))
                                         : _mm256_setzero_si256();
      transpose8(row, reinterpret_cast<uint32_t*>(dst) + static_cast<ptrdiff_t>(s) * width + r0,
                 width, mask, rn == 8);
    }
#endif
    for (; s < steps; ++s)
      for (int i = 0; i < rn; ++i) entry(r0 + i, s);
  }
}

// dst, the parts of a panel of `columns`: rows are summed over. Beyond `rows`: zeros.
inline void pack_sums(const Elem* x, ptrdiff_t ld, int rows, int columns, int steps, Elem* dst,
                      ptrdiff_t part_stride) {
  for (int p = 0; p < parts(columns); ++p) {
    const Part here = part(columns, p);
    const int width = here.vecs * 16;
    Elem* to = dst + p * part_stride;
    for (int s = 0; s < steps; s += 1) {
      for (int v = 0; v < here.vecs; ++v) {
        const int c = here.column + v * 16, n = columns - c < 16 ? columns - c : 16;
        Elem* at = to + (static_cast<ptrdiff_t>(s) * width + v * 16) * kPair;
        Vec row[2];
        for (int i = 0; i < kPair; ++i) {
          const int r = s * kPair + i;
          row[i] = r >= rows ? zero()
                   : n == 16 ? load_elem(x + r * ld + c)
                             : load_elem(x + r * ld + c, n);
        }
        if constexpr (kPair == 1)
          store_elem(at, row[0]);
        else
          store_steps(at, 0, row[0], row[1]);
      }
    }
  }
}

// One block of packed rows from row-major x: beyond `rows` and `cols` zeros.
inline void pack_block(const Elem* x, ptrdiff_t ld, int rows, int cols, int steps, Elem* dst) {
  if constexpr (!kRowMajor) return pack_lanes(x, ld, rows, cols, steps, kRows, dst);
  for (int s = 0; s < steps; s += kUnit) {
    const int width = (steps - s < kUnit ? steps - s : kUnit) * kPair, left = cols - s * kPair;
    const int n = left < 0 ? 0 : left < width ? left : width;
    for (int r = 0; r < kRows; ++r, dst += width) {
      const int kept = r < rows ? n : 0;
      if (kept > 0)
        std::memcpy(dst, x + r * ld + s * kPair, static_cast<size_t>(kept) * sizeof(Elem));
      for (int i = kept; i < width; ++i) dst[i] = Elem{};
    }
  }
}

// Packed rows of x^T: what was a row is a step's entry.
void pack_columns(const void* x, int ld, int m, int cols, int block0, int block1, void* out) {
  const int steps = steps_of(m);
  const Elem nothing[kRows] = {};
  for (int b = block0; b < block1; ++b) {
    const int column = b * kRows, n = cols - column < kRows ? cols - column : kRows;
    const Elem* from = static_cast<const Elem*>(x) + column;
    Elem* block = static_cast<Elem*>(out) + static_cast<ptrdiff_t>(b) * steps * kStep;
    Elem ends[kPair][kRows] = {};  // of rows that go on beyond the matrix
    for (int s = 0; s < steps; ++s) {
      const Elem* row[kPair];
      for (int i = 0; i < kPair; ++i) {
        const int r = s * kPair + i;
        row[i] = r < m ? from + static_cast<ptrdiff_t>(r) * ld : nothing;
        if (r >= m || n == kRows) continue;
        std::memcpy(ends[i], row[i], static_cast<size_t>(n) * sizeof(Elem));
        row[i] = ends[i];
      }
      alignas(64) Elem lanes[kStep];
      for (int k = 0; k < kRows; ++k)
        for (int i = 0; i < kPair; ++i) lanes[k * kPair + i] = row[i][k];
      for (int k = 0; k < kRows && kRowMajor; ++k)
        std::memcpy(block + packed_at(k, s, steps), lanes + k * kPair, kPair * sizeof(Elem));
      if (!kRowMajor) std::memcpy(block + static_cast<ptrdiff_t>(s) * kStep, lanes, sizeof(lanes));
    }
  }
}

void pack_rows(const void* x, int ld, int m, int cols, int block0, int block1, void* out) {
  const int steps = train::round_up(cols, kBlock) / kPair;
  for (int b = block0; b < block1; ++b) {
    const int row = b * kRows;
    pack_block(static_cast<const Elem*>(x) + static_cast<ptrdiff_t>(row) * ld, ld,
               m - row < kRows ? m - row : kRows, cols, steps,
               static_cast<Elem*>(out) + static_cast<ptrdiff_t>(b) * steps * kStep);
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
