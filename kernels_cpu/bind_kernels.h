#pragma once

#include <nanobind/nanobind.h>

namespace localllm {

class Decoder;

void bind_kernels(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_steps(nanobind::class_<Decoder>& cls);
void bind_train(nanobind::module_& m);

}  // namespace localllm
