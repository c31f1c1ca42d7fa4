// Fills the table from the templates. Included last in each instruction set's file.
#pragma once

#include "train/attention.h"

namespace localllm::LOCALLLM_ISA {
namespace {

constexpr train::Kernels make_train_table(const char* name) {
  return {name,          sizeof(Elem), kRows,         kStepUnit,      kQueryRows,    pack_rows,
          pack_columns,  add_columns,  to_elements,   to_floats,      scale_columns, drop,
          norm,          norm_add,     norm_back,     heads,          heads_back,    activate,
          activate_back, weight_row,   factor_panel,  low_rank,       product,       gradient,
          attend_pack,   attend,       attend_back_q, attend_back_kv, head_tile,     head_slopes};
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
