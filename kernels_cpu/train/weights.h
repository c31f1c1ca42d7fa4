// Quantized weights into panels.
#pragma once

#include "train/tile.h"

namespace localllm::LOCALLLM_ISA {
namespace {

template <int SHIFT, int MASK>
inline Vec codes_at(const IVec& words) {
  return to_float(bit_and(shift_right<SHIFT>(words), set1(int32_t{MASK})));
}

inline void transpose16(Vec (&r)[16]);

// The 16 rows of a block of row-major weights, the 16 columns being the lanes.
inline void rows_of(const train::Matrix& w, int row_block, int col_block, Vec (&out)[16]) {
  const int row = row_block * kBlock, column = col_block * kBlock;
  const int rows = w.rows - row, columns = w.cols - column;
  const float* from =
      reinterpret_cast<const float*>(w.data) + static_cast<ptrdiff_t>(row) * w.cols + column;
  for (int i = 0; i < 16; ++i, from += w.cols)
    out[i] = i >= rows ? zero() : columns >= 16 ? load(from) : load(from, columns);
}

// The 16 columns of a block, the 16 rows being the lanes.
inline void unpack(const train::Matrix& w, int row_block, int col_block, Vec (&out)[16]) {
  if (w.codes == train::Codes::kRowMajor) {
    rows_of(w, row_block, col_block, out);
    transpose16(out);
    return;
  }
  const size_t index = static_cast<size_t>(row_block) * static_cast<size_t>(w.col_blocks()) +
                       static_cast<size_t>(col_block);
  const uint8_t* data = w.data + index * train::block_bytes(w.codes);
  if (w.codes == train::Codes::kFloat32) {
    for (int i = 0; i < 16; ++i) out[i] = load(reinterpret_cast<const float*>(data) + i * 16);
    return;
  }
  const auto* halves = reinterpret_cast<const uint16_t*>(data);
  if (w.codes == train::Codes::kBfloat16) {
    for (int i = 0; i < 16; ++i) out[i] = load_bfloat(halves + i * 16);
    return;
  }
  if (w.codes == train::Codes::kFloat16) {
    for (int i = 0; i < 16; ++i) out[i] = load(halves + i * 16);
    return;
  }
  const float* group =
      w.groups +
      (static_cast<ptrdiff_t>(row_block) * w.row_groups() + col_block * kBlock / w.group) * 32;
  const Vec scale = load(group), bias = load(group + 16);
  const auto* words = reinterpret_cast<const int32_t*>(data);
  if (w.codes == train::Codes::kBits4) {
    for (int i = 0; i < 2; ++i) {
      const IVec word = load(words + i * 16);
      Vec* to = out + i * 8;
      to[0] = fma(codes_at<0, 15>(word), scale, bias);
      to[1] = fma(codes_at<4, 15>(word), scale, bias);
      to[2] = fma(codes_at<8, 15>(word), scale, bias);
      to[3] = fma(codes_at<12, 15>(word), scale, bias);
      to[4] = fma(codes_at<16, 15>(word), scale, bias);
      to[5] = fma(codes_at<20, 15>(word), scale, bias);
      to[6] = fma(codes_at<24, 15>(word), scale, bias);
      to[7] = fma(codes_at<28, 15>(word), scale, bias);
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      const IVec word = load(words + i * 16);
      Vec* to = out + i * 4;
      to[0] = fma(codes_at<0, 255>(word), scale, bias);
      to[1] = fma(codes_at<8, 255>(word), scale, bias);
      to[2] = fma(codes_at<16, 255>(word), scale, bias);
      to[3] = fma(codes_at<24, 255>(word), scale, bias);
    }
  }
}

#if defined(__AVX512F__)
inline void transpose16(Vec (&r)[16]) {
  Vec t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const auto d = [&](int k) { return _mm512_castps_pd(t[4 * i + k]); };
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(0), d(2)));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(0), d(2)));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(1), d(3)));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(1), d(3)));
  }
  for (int j = 0; j < 4; ++j) {
    const Vec a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const Vec b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const Vec d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#else
inline void transpose16(Vec (&r)[16]) {
  alignas(64) float from[256];
  float lanes16[16];
  for (int i = 0; i < 16; ++i) store(from + i * 16, r[i]);
#if defined(__AVX2__)
  alignas(64) uint32_t to[256];
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8) {
      __m256i row[8];
      for (int k = 0; k < 8; ++k)
        row[k] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + (i + k) * 16 + j));
      transpose8(row, to + j * 16 + i, 16, _mm256_setzero_si256(), true);
    }
  (void)lanes16;
  for (int i = 0; i < 16; ++i) r[i] = load(reinterpret_cast<const float*>(to) + i * 16);
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) lanes16[j] = from[j * 16 + i];
    r[i] = load(lanes16);
  }
#endif
}
#endif

// The parts of panel `panel` of W^T: its columns are rows of W, all columns of W are summed over.
inline void forward_panel(const train::Matrix& w, int panel, int columns, Elem* dst,
                          ptrdiff_t part_stride) {
  for (int p = 0; p < parts(columns); ++p) {
    const Part here = part(columns, p);
    const ptrdiff_t step = here.vecs * 16 * kPair;
    for (int cb = 0; cb < w.col_blocks(); ++cb)
      for (int v = 0; v < here.vecs; ++v) {
        Vec block[16];
        unpack(w, (panel * kPanel + here.column) / kBlock + v, cb, block);
        Elem* to = dst + p * part_stride + cb * (kBlock / kPair) * step + v * 16 * kPair;
        for (int i = 0; i < 16; i += 2)
          store_steps(to + i / kPair * step, step, block[i], block[i + 1]);
      }
  }
}

// Of W: its columns are W's, rows [first, first + count) are summed over.
inline void backward_panel(const train::Matrix& w, int panel, int columns, int first, int count,
                           Elem* dst, ptrdiff_t part_stride) {
  for (int p = 0; p < parts(columns); ++p) {
    const Part here = part(columns, p);
    const ptrdiff_t step = here.vecs * 16 * kPair;
    for (int rb = 0; rb < train::blocks(count); ++rb)
      for (int v = 0; v < here.vecs; ++v) {
        Vec block[16];
        const int row_block = first / kBlock + rb;
        const int col_block = (panel * kPanel + here.column) / kBlock + v;
        if (w.codes == train::Codes::kRowMajor) {
          rows_of(w, row_block, col_block, block);
        } else {
          unpack(w, row_block, col_block, block);
          transpose16(block);
        }
        Elem* to = dst + p * part_stride + rb * (kBlock / kPair) * step + v * 16 * kPair;
        for (int i = 0; i < 16; i += 2)
          store_steps(to + i / kPair * step, step, block[i], block[i + 1]);
      }
  }
}

void weight_row(const train::Matrix& w, int row, float* out) {
  if (w.codes == train::Codes::kRowMajor) {
    const float* from =
        reinterpret_cast<const float*>(w.data) + static_cast<ptrdiff_t>(row) * w.cols;
    std::memcpy(out, from, static_cast<size_t>(w.cols) * sizeof(float));
    return;
  }
  for (int cb = 0; cb < w.col_blocks(); ++cb) {
    Vec block[16];
    unpack(w, row / kBlock, cb, block);
    for (int i = 0; i < 16 && cb * kBlock + i < w.cols; ++i) {
      float lanes16[16];
      store(lanes16, block[i]);
      out[cb * kBlock + i] = lanes16[row % kBlock];
    }
  }
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
