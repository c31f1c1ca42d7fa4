// Weights from their checkpoint form into panels (see Matrix), and single rows back.
#pragma once

#include "core/memory.h"
#include "simd/kernels.h"

namespace localllm {

// One float per row and group: values [rows][values_per_row], times multipliers
// [rows][groups_per_row] when not null.
struct GroupSource {
  const void* values = nullptr;
  bool half = false;
  int values_per_row = 0;
  const void* multipliers = nullptr;
  bool signed_multipliers = false;
  int groups_per_row = 0;
};

// codes: a little-endian bit stream along each row, code c at bits [c * bits, (c + 1) * bits).
struct AffineSource {
  const uint32_t* codes = nullptr;
  int rows = 0, cols = 0, bits = 0, group = 0, zero_point = 0;
  GroupSource scales, biases;  // biases.values null: none
};

// Throws std::invalid_argument for sizes that do not fit together.
Matrix pack_affine(const AffineSource& source, Arena& arena);
Matrix pack_dense(const void* values, WeightKind kind, int rows, int cols, Arena& arena);

// Bytes a panel must have for kernels to stay inside it; the largest number for a description
// that makes no sense.
size_t panel_bytes_needed(const Matrix& w);

// Row `row` in float32: round(round(scale * code) + bias).
void read_row(const Matrix& w, int row, float* out);

}  // namespace localllm
