// Single kernels for tests and benchmarks: quantization, and a matmul with one packed matrix.
#include "bind_kernels.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "core/dispatch.h"
#include "core/memory.h"
#include "core/rows_buffer.h"
#include "core/store.h"
#include "core/threads.h"

namespace nb = nanobind;

namespace localllm {

namespace {

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const Kernels& kernels_named(const std::string& name) {
  const Kernels* k = find_kernels(name);
  if (!k) throw std::invalid_argument("these kernels cannot run here");
  return *k;
}

MatmulRows quantized(const Kernels& k, const Rows& x) {
  const int rows = static_cast<int>(x.shape(0)), width = static_cast<int>(x.shape(1));
  if (rows == 0 || width == 0) throw std::invalid_argument("no rows");
  MatmulRows in;
  in.reserve(rows, width);
  for (int r = 0; r < rows; ++r) {
    std::copy_n(x.data() + static_cast<ptrdiff_t>(r) * width, width, in.row(r));
    k.quantize(in.row(r), width, in.q(r), in.info(r));
  }
  return in;
}

// Writes scale * q, which is what a matmul sees of x.
void round_activations(Rows x, OutRows out, const std::string& kernels) {
  if (out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1))
    throw std::invalid_argument("shapes differ");
  const FlushDenormals flush;
  const MatmulRows in = quantized(kernels_named(kernels), x);
  const size_t width = x.shape(1);
  for (size_t r = 0; r < x.shape(0); ++r)
    for (size_t c = 0; c < width; ++c)
      out.data()[r * width + c] = in.info(static_cast<int>(r))[c / kGroup].scale *
                                  static_cast<float>(in.q(static_cast<int>(r))[c]);
}

void matmul(const WeightStore& store, const std::string& name, Rows x, OutRows out,
            const std::string& kernels, bool float_activations) {
  const Kernels& k = kernels_named(kernels);
  const Matrix& w =
      store.matrix(name, static_cast<int>(out.shape(1)), static_cast<int>(x.shape(1)));
  if (out.shape(0) != x.shape(0)) throw std::invalid_argument("shapes differ");
  const FlushDenormals flush;
  const MatmulRows in = quantized(k, x);
  Scratch<uint8_t> scratch;
  k.matmul(w, in.input(0, static_cast<int>(x.shape(0)), w.quantized() && !float_activations),
           out.data(), w.rows, 0, w.panels(), scratch.reserve(matmul_scratch(w)));
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("round_activations", &round_activations, nb::arg("x"), nb::arg("out"), nb::arg("kernels"),
        "out = what a matmul sees of x [rows, width] once quantized.");
  m.def("matmul", &matmul, nb::arg("store"), nb::arg("name"), nb::arg("x"), nb::arg("out"),
        nb::arg("kernels"), nb::arg("float_activations") = false,
        "out [rows, matrix rows] = x [rows, width] times the transposed matrix.");
}

}  // namespace localllm
