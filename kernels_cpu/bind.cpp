// The Python face of the native engine. Everything else here is plain C++ that knows no Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "core/cpu_features.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "localllm's native CPU engine.";
  m.def("cpu_features", &localllm::usable_cpu_features,
        "Instruction-set extensions that both the CPU and the operating system allow.");
}
