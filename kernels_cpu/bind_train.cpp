// Training's Python face. Every size is checked on the way in.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <stdexcept>

#include "bind_arrays.h"
#include "bind_kernels.h"
#include "train/adamw.h"
#include "train/dispatch.h"
#include "train/trainer.h"

namespace nb = nanobind;

namespace localllm {

namespace {

using train::Batch;
using train::Codes;
using train::Store;
using train::Trainer;

template <class T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using In2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RopeInput = std::pair<In2<float>, In<int32_t>>;

void check_rows(const Store& store, const std::string& name, int row, size_t count, size_t cols) {
  const train::Matrix& m = store.at(name);
  check(row >= 0 && count <= static_cast<size_t>(m.rows) &&
            static_cast<size_t>(row) + count <= static_cast<size_t>(m.rows) &&
            cols == static_cast<size_t>(m.cols),
        "rows outside the matrix");
}

void fill_codes(Store& store, const std::string& name, int row, In2<uint8_t> codes,
                In2<float> scales, In2<float> biases) {
  check_rows(store, name, row, codes.shape(0), codes.shape(1));
  const train::Matrix& m = store.at(name);
  check(m.group > 0, "a dense matrix has no codes");
  const size_t groups = static_cast<size_t>((m.cols + m.group - 1) / m.group);
  check(scales.shape(0) == codes.shape(0) && biases.shape(0) == codes.shape(0) &&
            scales.shape(1) == groups && biases.shape(1) == groups,
        "scales do not match the codes");
  const nb::gil_scoped_release release;
  store.fill_codes(name, row, static_cast<int>(codes.shape(0)), codes.data(), scales.data(),
                   biases.data());
}

template <class T>
void fill_dense(Store& store, const std::string& name, int row, In2<T> values) {
  check_rows(store, name, row, values.shape(0), values.shape(1));
  const Codes codes = store.at(name).codes;
  check(sizeof(T) == 4 ? codes == Codes::kFloat32
                       : codes == Codes::kFloat16 || codes == Codes::kBfloat16,
        "values of another type than the matrix");
  const nb::gil_scoped_release release;
  store.fill_dense(name, row, static_cast<int>(values.shape(0)), values.data());
}

std::unique_ptr<Trainer> make_trainer(std::shared_ptr<Store> store, const ModelConfig& config,
                                      const std::vector<LayerConfig>& layers,
                                      const std::vector<bool>& interleaved,
                                      const std::vector<train::AdapterPlace>& adapters,
                                      int64_t parameters, int threads, const std::string& kernels,
                                      size_t keep_bytes) {
  check(threads > 0 && threads <= 1024, "threads must be from 1 to 1024");
  check(interleaved.size() == layers.size(), "one flag a layer");
  const train::Kernels* table = train::find_kernels(kernels);
  check(table != nullptr, "these kernels cannot run here");
  auto model = std::make_unique<train::Model>(std::move(store), config, layers, interleaved,
                                              adapters, parameters);
  return std::make_unique<Trainer>(std::move(model), *table, threads, keep_bytes);
}

Batch make_batch(const Trainer& trainer, In<int32_t> tokens, In<int32_t> targets,
                 In<int32_t> offsets, uint32_t first_row, const std::vector<RopeInput>& ropes,
                 uint64_t seed, double dropout, double neftune) {
  const size_t n = tokens.shape(0);
  check(n > 0 && n < (size_t{1} << 30) && targets.shape(0) == n, "tokens and targets differ");
  check(offsets.shape(0) >= 2 && offsets.data()[0] == 0, "offsets begin at 0");
  const int sequences = static_cast<int>(offsets.shape(0)) - 1;
  const train::Model& model = trainer.model();
  for (int i = 0; i < sequences; ++i) {
    const int length = offsets.data()[i + 1] - offsets.data()[i];
    check(length >= 0, "offsets descend");
    check(!model.positions || length <= model.config.learned_positions,
          "position outside the learned ones");
  }
  check(static_cast<size_t>(offsets.data()[sequences]) == n, "offsets do not end at the rows");
  for (size_t i = 0; i < n; ++i)
    check(tokens.data()[i] >= 0 && tokens.data()[i] < model.config.vocab &&
              targets.data()[i] >= 0 && targets.data()[i] < model.config.vocab,
          "token id outside the vocabulary");
  check(dropout >= 0.0 && dropout < 1.0, "dropout must be from 0 to below 1");
  check(neftune >= 0.0 && neftune < 1e6, "NEFTune's alpha must not be negative");
  Batch batch;
  batch.tokens = tokens.data();
  batch.targets = targets.data();
  batch.offsets = offsets.data();
  batch.sequences = sequences;
  batch.first_row = first_row;
  batch.seed = seed;
  batch.dropout = dropout;
  batch.neftune = neftune;
  for (const auto& [table, index] : ropes) {
    check(index.shape(0) == n, "RoPE arrays differ");
    for (size_t r = 0; r < n; ++r)
      check(index.data()[r] >= 0 && static_cast<size_t>(index.data()[r]) < table.shape(0),
            "RoPE index out of range");
    batch.ropes.push_back({table.data(), index.data()});
  }
  for (const train::TrainedLayer& l : model.layers)
    check(l.config.rope < 0 || (static_cast<size_t>(l.config.rope) < ropes.size() &&
                                ropes[static_cast<size_t>(l.config.rope)].first.shape(1) ==
                                    static_cast<size_t>(2 * l.config.rope_half)),
          "RoPE tables do not match the layers");
  return batch;
}

}  // namespace

void bind_train(nb::module_& m) {
  m.def("train_kernels", &train::usable_kernels,
        "Instruction sets that training runs on here, slowest first.");

  nb::enum_<Codes>(m, "TrainCodes")
      .value("bits4", Codes::kBits4)
      .value("bits8", Codes::kBits8)
      .value("bfloat16", Codes::kBfloat16)
      .value("float16", Codes::kFloat16)
      .value("float32", Codes::kFloat32);

  nb::class_<Store>(m, "TrainStore", "Weights by name, in the blocks training reads.")
      .def(nb::init<>())
      .def(
          "add",
          [](Store& s, const std::string& name, int rows, int cols, Codes codes, int group) {
            check(rows > 0 && cols > 0, "an empty matrix");
            const bool coded = codes == Codes::kBits4 || codes == Codes::kBits8;
            check(coded ? group > 0 && group % 16 == 0 : group == 0, "groups must be of 16 n");
            s.add(name, rows, cols, codes, group);
          },
          nb::arg("name"), nb::arg("rows"), nb::arg("cols"), nb::arg("codes"), nb::arg("group"))
      .def("fill_codes", &fill_codes, nb::arg("name"), nb::arg("row"), nb::arg("codes"),
           nb::arg("scales"), nb::arg("biases"), "Rows from `row` on: scale * code + bias.")
      .def("fill_dense", &fill_dense<float>, nb::arg("name"), nb::arg("row"), nb::arg("values"))
      .def("fill_dense", &fill_dense<uint16_t>, nb::arg("name"), nb::arg("row"), nb::arg("values"))
      .def("add_vector",
           [](Store& s, const std::string& name, In<float> v) {
             s.add_vector(name, v.data(), static_cast<int>(v.shape(0)));
           })
      .def(
          "add_trained",
          [](Store& s, const std::string& name, int rows, int cols, int64_t at) {
            check(rows > 0 && cols > 0, "an empty matrix");
            s.add_trained(name, rows, cols, at);
          },
          nb::arg("name"), nb::arg("rows"), nb::arg("cols"), nb::arg("at"),
          "A matrix that is itself a parameter, row after row from place `at` on.")
      .def(
          "add_trained_vector",
          [](Store& s, const std::string& name, int n, int64_t at, float offset) {
            check(n > 0, "an empty vector");
            s.add_trained_vector(name, n, at, offset);
          },
          nb::arg("name"), nb::arg("n"), nb::arg("at"), nb::arg("offset"),
          "The same for a vector; `offset` is added where it is used.")
      .def_prop_ro("nbytes", &Store::bytes);

  nb::class_<train::AdapterPlace>(m, "AdapterPlace")
      .def(
          "__init__",
          [](train::AdapterPlace* p, int layer, const std::string& linear, int rank, float scale,
             int64_t a, int64_t b, int64_t magnitude) {
            new (p) train::AdapterPlace{layer, linear, rank, scale, a, b, magnitude};
          },
          nb::arg("layer"), nb::arg("linear"), nb::arg("rank"), nb::arg("scale"), nb::arg("a"),
          nb::arg("b"), nb::arg("magnitude") = -1,
          "Where A, B and with DoRA the magnitudes begin; these need TARGET.squares in the store.");

  nb::class_<Trainer>(m, "Trainer",
                      "Log-probabilities and gradients of adapters, or of all weights.")
      .def(nb::new_(&make_trainer), nb::arg("store"), nb::arg("config"), nb::arg("layers"),
           nb::arg("interleaved"), nb::arg("adapters"), nb::arg("parameters"), nb::arg("threads"),
           nb::arg("kernels"), nb::arg("keep_bytes"))
      .def(
          "log_probs",
          [](Trainer& t, In<int32_t> tokens, In<int32_t> targets, In<int32_t> offsets,
             uint32_t first_row, const std::vector<RopeInput>& ropes,
             std::optional<In<float>> parameters, Out out, uint64_t seed, double dropout,
             double neftune) {
            const Batch batch =
                make_batch(t, tokens, targets, offsets, first_row, ropes, seed, dropout, neftune);
            check(out.shape(0) == tokens.shape(0), "one log-probability a row");
            check(!parameters || static_cast<int64_t>(parameters->shape(0)) == t.model().parameters,
                  "parameters of another size");
            check(parameters || !t.model().whole, "there is no base beside the parameters");
            const nb::gil_scoped_release release;
            t.log_probs(batch, parameters ? parameters->data() : nullptr, out.data());
          },
          nb::arg("tokens"), nb::arg("targets"), nb::arg("offsets"), nb::arg("first_row"),
          nb::arg("ropes"), nb::arg("parameters").none(), nb::arg("out"), nb::arg("seed"),
          nb::arg("dropout"), nb::arg("neftune"))
      .def(
          "gradients",
          [](Trainer& t, In<int32_t> tokens, In<int32_t> targets, In<int32_t> offsets,
             uint32_t first_row, const std::vector<RopeInput>& ropes, In<float> weights,
             In<float> parameters, Out gradient, uint64_t seed, double dropout, double neftune) {
            const Batch batch =
                make_batch(t, tokens, targets, offsets, first_row, ropes, seed, dropout, neftune);
            check(weights.shape(0) == tokens.shape(0), "one weight a row");
            const int64_t size = t.model().parameters;
            check(static_cast<int64_t>(parameters.shape(0)) == size &&
                      static_cast<int64_t>(gradient.shape(0)) == size,
                  "parameters of another size");
            const nb::gil_scoped_release release;
            return t.gradients(batch, weights.data(), parameters.data(), gradient.data());
          },
          nb::arg("tokens"), nb::arg("targets"), nb::arg("offsets"), nb::arg("first_row"),
          nb::arg("ropes"), nb::arg("weights"), nb::arg("parameters"), nb::arg("gradient"),
          nb::arg("seed"), nb::arg("dropout"), nb::arg("neftune"))
      .def(
          "working_bytes",
          [](const Trainer& t, const std::vector<int>& lengths, bool gradients) {
            int64_t total = 0;
            for (const int n : lengths) {
              check(n >= 0, "a sequence of negative length");
              total += n;
            }
            check(total < (int64_t{1} << 30), "too many rows");
            return t.working_bytes(lengths, gradients);
          },
          nb::arg("lengths"), nb::arg("gradients"))
      .def_prop_ro("kernels", [](const Trainer& t) { return std::string(t.kernels().name); })
      .def_prop_ro("threads", &Trainer::threads);

  m.def(
      "fused_adamw",
      [](Out parameters, In<float> gradient, Out mean, Out square, float beta1, float rest1,
         float beta2, float rest2, float keep, float rate, float correction2, float eps) {
        const size_t n = parameters.shape(0);
        check(gradient.shape(0) == n && mean.shape(0) == n && square.shape(0) == n,
              "arrays of different sizes");
        const nb::gil_scoped_release release;
        train::adamw({beta1, rest1, beta2, rest2, keep, rate, correction2, eps}, parameters.data(),
                     gradient.data(), mean.data(), square.data(), n);
      },
      nb::arg("parameters"), nb::arg("gradient"), nb::arg("m"), nb::arg("v"), nb::arg("beta1"),
      nb::arg("rest1"), nb::arg("beta2"), nb::arg("rest2"), nb::arg("keep"), nb::arg("rate"),
      nb::arg("correction2"), nb::arg("eps"), "One step of AdamW in place, nothing fused.");
}

}  // namespace localllm
