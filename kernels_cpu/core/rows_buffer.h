// Rows of activations, in float32 and, for matmuls, quantized.
#pragma once

#include "core/memory.h"
#include "simd/kernels.h"

namespace localllm {

// [rows][width] float32 with 64-byte-aligned rows.
class FloatRows {
 public:
  void reserve(int rows, int width) {
    stride_ = (width + 31) / 32 * 32;
    data_.reserve(static_cast<size_t>(rows) * static_cast<size_t>(stride_));
  }
  float* row(int i) const { return data_.data() + static_cast<ptrdiff_t>(i) * stride_; }
  ptrdiff_t stride() const { return stride_; }

 private:
  Scratch<float> data_;
  ptrdiff_t stride_ = 0;
};

// A matmul's input: float rows and room for their quantized form.
class MatmulRows {
 public:
  void reserve(int rows, int width) {
    x_.reserve(rows, width);
    groups_ = (width + kGroup - 1) / kGroup;
    // Rows a multiple of 1 KiB apart would fall into the same few sets of a cache.
    stride_ = groups_ + (groups_ % 32 == 0 ? 2 : 0);
    const auto count = static_cast<size_t>(rows) * static_cast<size_t>(stride_);
    q_.reserve(count * kGroup);
    info_.reserve(count);
  }
  float* row(int i) const { return x_.row(i); }
  int8_t* q(int i) const { return q_.data() + static_cast<ptrdiff_t>(i) * stride_ * kGroup; }
  GroupInfo* info(int i) const { return info_.data() + static_cast<ptrdiff_t>(i) * stride_; }
  ptrdiff_t stride() const { return x_.stride(); }
  int groups() const { return groups_; }

  // Rows [first, first + rows) as they enter a matmul.
  Input input(int first, int rows, bool quantized) const {
    Input in;
    in.rows = rows;
    in.x = row(first);
    in.x_stride = x_.stride();
    if (quantized) {
      in.q = q(first);
      in.q_stride = static_cast<ptrdiff_t>(stride_) * kGroup;
      in.info = info(first);
      in.info_stride = stride_;
    }
    return in;
  }

 private:
  FloatRows x_;
  Scratch<int8_t> q_;
  Scratch<GroupInfo> info_;
  int groups_ = 0, stride_ = 0;  // of a row, in groups of 32
};

}  // namespace localllm
