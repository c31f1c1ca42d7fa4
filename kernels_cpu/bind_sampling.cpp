// Rows of logits to tokens, for localllm/sampling.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>

#include "bind_arrays.h"
#include "bind_kernels.h"
#include "core/dispatch.h"
#include "core/sampling.h"

namespace nb = nanobind;

namespace localllm {

namespace {

template <class T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// settings [n, 4]: temperature, top_k, top_p, log(min_p). Row i of `out` is that of
// logits[rows[i]].
void sample_rows(const std::string& name, Array<float, 2> logits, Array<int32_t, 1> rows,
                 Array<double, 2> settings, Array<uint64_t, 1> seeds, Array<uint32_t, 1> positions,
                 Array<int32_t, 1> edit_ends, Array<int32_t, 1> edit_ids,
                 Array<double, 1> edit_values, Array<int32_t, 1> mask_rows,
                 Array<uint32_t, 2> masks, Array<uint8_t, 1> only_cut, Out<int32_t, 1> out,
                 Out<int32_t, 2> kept_ids, Out<double, 2> kept_scaled) {
  const Kernels* kernels = find_kernels(name);
  check(kernels != nullptr, "these kernels cannot run here");
  const size_t count = rows.shape(0), vocab = logits.shape(1), words = masks.shape(1);
  check(vocab > 0 && vocab <= 0x7fffff00, "vocabulary too small or too large");
  check(settings.shape(0) == count && settings.shape(1) == 4 && seeds.shape(0) == count &&
            positions.shape(0) == count && edit_ends.shape(0) == count &&
            mask_rows.shape(0) == count && only_cut.shape(0) == count && out.shape(0) == count &&
            kept_ids.shape(0) == count && kept_scaled.shape(0) == count &&
            kept_ids.shape(1) == kept_scaled.shape(1),
        "arrays differ in length");
  check(edit_ids.shape(0) == edit_values.shape(0), "edits differ in length");
  check(masks.shape(0) == 0 || words * 32 >= vocab, "masks are shorter than the vocabulary");
  int32_t start = 0;
  for (size_t i = 0; i < count; ++i) {
    const int32_t row = rows.data()[i], end = edit_ends.data()[i], mask = mask_rows.data()[i];
    check(row >= 0 && static_cast<size_t>(row) < logits.shape(0), "row outside the logits");
    check(end >= start && static_cast<size_t>(end) <= edit_ids.shape(0), "edits out of range");
    check(mask >= -1 && mask < static_cast<int64_t>(masks.shape(0)), "mask out of range");
    start = end;
  }
  for (size_t i = 0; i < edit_ids.shape(0); ++i)
    check(edit_ids.data()[i] >= 0 && static_cast<size_t>(edit_ids.data()[i]) < vocab,
          "edit outside the vocabulary");
  for (size_t i = 0; i < count; ++i) {
    const double* setting = settings.data() + i * 4;
    check(setting[0] >= 0.0 && setting[1] >= 0.0 && setting[2] > 0.0 && setting[3] <= 0.0,
          "settings out of range");
  }

  const nb::gil_scoped_release release;
  RowSampler sampler(*kernels, static_cast<int>(vocab));
  start = 0;
  for (size_t i = 0; i < count; ++i) {
    const double* setting = settings.data() + i * 4;
    SampleRow row;
    row.logits = logits.data() + static_cast<size_t>(rows.data()[i]) * vocab;
    row.temperature = setting[0];
    const bool cut = only_cut.data()[i] != 0;
    row.top_k = static_cast<int>(std::min(setting[1], static_cast<double>(vocab)));
    if (!cut && static_cast<size_t>(row.top_k) == vocab) row.top_k = 0;  // keeps all
    row.top_p = setting[2];
    row.log_min_p = setting[3];
    row.seed = seeds.data()[i];
    row.position = positions.data()[i];
    row.edits = edit_ends.data()[i] - start;
    row.edit_ids = edit_ids.data() + start;
    row.edit_values = edit_values.data() + start;
    if (mask_rows.data()[i] >= 0)
      row.allowed = masks.data() + static_cast<size_t>(mask_rows.data()[i]) * words;
    start = edit_ends.data()[i];
    if (!cut) {
      out.data()[i] = sampler.sample(row);
      continue;
    }
    const auto* kept = sampler.cut(row);
    const size_t room = kept_ids.shape(1);
    const bool fits = kept != nullptr && kept->size() <= room;
    out.data()[i] = fits ? static_cast<int32_t>(kept->size()) : -1;
    for (size_t j = 0; fits && j < kept->size(); ++j) {
      kept_ids.data()[i * room + j] = (*kept)[j].id;
      kept_scaled.data()[i * room + j] = (*kept)[j].scaled;
    }
  }
}

void noise_words(uint64_t seed, uint32_t position, Array<int64_t, 1> ids, Out<uint32_t, 1> out) {
  check(ids.shape(0) == out.shape(0), "arrays differ in length");
  for (size_t i = 0; i < ids.shape(0); ++i)
    out.data()[i] = noise_word(seed, position, static_cast<uint32_t>(ids.data()[i]));
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("noise_words", &noise_words, nb::arg("seed"), nb::arg("position"), nb::arg("ids"),
        nb::arg("out"), "The 32 bits that each token's noise is made of.");
  m.def("sample_rows", &sample_rows, nb::arg("kernels"), nb::arg("logits"), nb::arg("rows"),
        nb::arg("settings"), nb::arg("seeds"), nb::arg("positions"), nb::arg("edit_ends"),
        nb::arg("edit_ids"), nb::arg("edit_values"), nb::arg("mask_rows"), nb::arg("masks"),
        nb::arg("only_cut"), nb::arg("out"), nb::arg("kept_ids"), nb::arg("kept_scaled"),
        "Tokens of rows of logits into `out`, or what filters leave; -1 where NumPy must decide.");
}

}  // namespace localllm
