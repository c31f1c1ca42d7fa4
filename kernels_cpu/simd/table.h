// Fills the table from the templates. Included last in each instruction set's file.
#pragma once

#include "simd/adapter.h"
#include "simd/attention.h"
#include "simd/kernels.h"
#include "simd/kv.h"
#include "simd/matmul.h"
#include "simd/recurrent.h"
#include "simd/rows.h"
#include "simd/sampling.h"

namespace localllm::LOCALLLM_ISA {
namespace {

constexpr Kernels make_table(const char* name) {
  return {name,        norm,         quantize,      add_scaled, scale,     activate,
          rope,        softmax,      finish_logits, matmul,     write_kv,  reset_state,
          attend,      merge_state,  finish_state,  rotate,     block_max, exp_sum_below,
          noise_words, adapter_down, adapter_up,    gate,       product,   convolve,
          unit,        delta_gates,  delta_rule};
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
