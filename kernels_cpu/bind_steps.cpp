// A decoder's steps in Python: every size is checked on the way in.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>

#include "bind_arrays.h"
#include "bind_kernels.h"
#include "core/decoder.h"
#include "core/guess.h"

namespace nb = nanobind;

namespace localllm {

namespace {

// The first position that some layer of the group still sees from `position`.
int64_t first_seen(const Program& program, int group, int64_t position) {
  int64_t first = position;
  for (const Layer& layer : program.layers) {
    if (layer.config.kv_group != group || layer.config.mixer != Mixer::kAttention) continue;
    const int window = layer.config.window;
    first = std::min(first, window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0);
  }
  return first;
}

using RopeInput = std::pair<Array<float, 2>, Array<int32_t, 1>>;

// Lets Python's signal handlers run during a long step. A step that stops for one of their
// exceptions leaves it set.
class SignalWatch {
 public:
  bool operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return false;
    last_ = now;
    const nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Where the rows of a step stand; see `Chunk` and `RopeRows`.
struct Rows {
  Array<int32_t, 1> starts, counts, tables, table_sizes;
  const std::vector<RopeInput>& ropes;
};

// A step of so many rows, but for what enters it and what is wanted of it.
Step checked_step(const Decoder& decoder, int rows, const Rows& in,
                  const std::vector<std::shared_ptr<Adapter>>& adapters,
                  const std::optional<Array<int32_t, 2>>& states, std::vector<int32_t>* positions) {
  const Program& program = decoder.program();
  const KvPool& kv = decoder.kv();
  Step step;
  step.rows = rows;
  check(step.rows > 0, "a step needs rows");
  const size_t chunks = in.starts.shape(0);
  check(in.counts.shape(0) == chunks && in.table_sizes.shape(0) == chunks &&
            (adapters.empty() || adapters.size() == chunks),
        "chunk arrays differ");
  const int slots = decoder.states().slots();
  check(states.has_value() == (slots > 0), "states are for models with recurrent layers");
  check(!states || (states->shape(0) == chunks && states->shape(1) == 3), "chunk arrays differ");
  positions->clear();
  positions->reserve(static_cast<size_t>(step.rows));
  int64_t row = 0, table_at = 0;
  for (size_t i = 0; i < chunks; ++i) {
    const int32_t start = in.starts.data()[i], count = in.counts.data()[i];
    const int32_t size = in.table_sizes.data()[i];
    check(start >= 0 && count > 0 && row + count <= step.rows, "chunk rows out of range");
    const int64_t entries = static_cast<int64_t>(size) * kv.groups();
    check(size >= 0 && table_at + entries <= static_cast<int64_t>(in.tables.shape(0)),
          "block table out of range");
    const int64_t end = static_cast<int64_t>(start) + count;
    check(end <= static_cast<int64_t>(size) * kv.block(), "block table too short");
    const Adapter* adapter = adapters.empty() ? nullptr : adapters[i].get();
    check(!adapter || adapter->fits(program), "the adapter is not one of this model");
    Chunk chunk{static_cast<int>(row), count, start, in.tables.data() + table_at, size, adapter};
    if (states) {
      const int32_t* own = states->data() + 3 * i;
      check(own[0] >= -1 && own[0] < slots && own[1] >= 0 && own[1] < slots && own[0] != own[1] &&
                own[2] >= 0 && own[2] < count,
            "state slots out of range");
      chunk.source = own[0];
      chunk.target = own[1];
      chunk.guesses = own[2];
    }
    for (int g = 0; g < kv.groups(); ++g)
      for (int64_t b = first_seen(program, g, start) / kv.block(); b * kv.block() < end; ++b)
        check(chunk.table(g)[b] >= 0 && chunk.table(g)[b] < kv.blocks(g),
              "KV block outside the pool");
    step.chunks.push_back(chunk);
    for (int32_t p = 0; p < count; ++p) positions->push_back(start + p);
    row += count;
    table_at += entries;
    check(program.config.learned_positions == 0 || end <= program.config.learned_positions,
          "position outside the learned ones");
  }
  check(row == step.rows, "chunks do not cover the rows");
  step.positions = positions->data();

  for (const auto& [table, index] : in.ropes) {
    check(table.shape(1) % 2 == 0 && to_int(index.shape(0)) == step.rows, "RoPE arrays differ");
    for (int r = 0; r < step.rows; ++r)
      check(index.data()[r] >= 0 && index.data()[r] < static_cast<int64_t>(table.shape(0)),
            "RoPE index out of range");
    step.ropes.push_back({table.data(), index.data(), to_int(table.shape(1)) / 2});
  }
  for (const Layer& layer : program.layers) {
    const int rope = layer.config.rope;
    if (rope < 0) continue;
    check(rope < static_cast<int>(step.ropes.size()) &&
              step.ropes[static_cast<size_t>(rope)].half == layer.config.rope_half,
          "RoPE tables do not match the layers");
  }
  return step;
}

const int32_t* checked_tokens(const Array<int32_t, 1>& tokens, int vocab) {
  for (size_t i = 0; i < tokens.shape(0); ++i)
    check(tokens.data()[i] >= 0 && tokens.data()[i] < vocab, "token id outside the vocabulary");
  return tokens.data();
}

// Returns false when cancelled.
bool forward(Decoder& decoder, Array<int32_t, 1> tokens, Array<int32_t, 1> starts,
             Array<int32_t, 1> counts, Array<int32_t, 1> tables, Array<int32_t, 1> table_sizes,
             const std::vector<RopeInput>& ropes, Array<int32_t, 1> logit_rows, OutMatrix out,
             std::optional<OutMatrix> hidden, const std::vector<std::shared_ptr<Adapter>>& adapters,
             std::optional<Array<int32_t, 2>> states, std::optional<Array<float, 2>> embeddings) {
  const Program& program = decoder.program();
  std::vector<int32_t> positions;
  Step step =
      checked_step(decoder, to_int(tokens.shape(0)), {starts, counts, tables, table_sizes, ropes},
                   adapters, states, &positions);
  step.tokens = checked_tokens(tokens, program.config.vocab);
  step.logits = to_int(logit_rows.shape(0));
  step.logit_rows = logit_rows.data();
  check(step.logits <= step.rows, "more logit rows than rows");
  for (int i = 0; i < step.logits; ++i)
    check(step.logit_rows[i] >= 0 && step.logit_rows[i] < step.rows, "logit row out of range");
  check(to_int(out.shape(0)) == step.logits && to_int(out.shape(1)) == program.config.vocab,
        "the logits array has the wrong shape");
  step.out = out.data();
  if (hidden) {
    check(
        to_int(hidden->shape(0)) == step.rows && to_int(hidden->shape(1)) == program.config.hidden,
        "the hidden states' array has the wrong shape");
    step.hidden = hidden->data();
  }
  if (embeddings) {
    check(to_int(embeddings->shape(0)) == step.rows &&
              to_int(embeddings->shape(1)) == program.config.hidden,
          "the embeddings' array has the wrong shape");
    step.embeddings = embeddings->data();
  }

  bool done = false;
  {
    const nb::gil_scoped_release release;
    done = decoder.forward(step, SignalWatch());
  }
  if (PyErr_Occurred()) throw nb::python_error();
  return done;
}

// A step of a draft head whose layer this is; see core/guess.h. parts: "from_hidden",
// "from_embedding", their norms, and "head" where only some tokens are guessed.
bool guess_step(Decoder& layer, Decoder& model, const WeightStore& parts, float eps,
                Array<float, 2> hidden, Array<int32_t, 1> following, Array<int32_t, 1> starts,
                Array<int32_t, 1> counts, Array<int32_t, 1> tables, Array<int32_t, 1> table_sizes,
                const std::vector<RopeInput>& ropes, OutMatrix states, OutMatrix logits) {
  const int rows = to_int(hidden.shape(0)), width = layer.program().config.hidden;
  check(model.program().config.hidden == width && to_int(hidden.shape(1)) == width &&
            to_int(following.shape(0)) == rows,
        "hidden states of the wrong shape");
  std::vector<int32_t> positions;
  Step step = checked_step(layer, rows, {starts, counts, tables, table_sizes, ropes}, {},
                           std::nullopt, &positions);
  const std::vector<int32_t> no_tokens(static_cast<size_t>(rows), 0);
  step.tokens = no_tokens.data();
  checked_tokens(following, model.program().config.vocab);
  check(states.shape(0) == step.chunks.size() && to_int(states.shape(1)) == width &&
            logits.shape(0) == step.chunks.size(),
        "the states' or the logits' array has the wrong shape");
  const bool some = parts.has("head");
  check(some || to_int(logits.shape(1)) == model.program().config.vocab,
        "the logits array has the wrong shape");
  const auto norm = [&](const char* name) {
    return NormParams{parts.vector(name, width), nullptr, eps, false};
  };
  const HeadParts head{&parts.matrix("from_hidden", width, width),
                       &parts.matrix("from_embedding", width, width),
                       some ? &parts.matrix("head", to_int(logits.shape(1)), width) : nullptr,
                       norm("hidden_norm"), norm("embedding_norm")};
  const nb::gil_scoped_release release;
  return guess(model, layer, head, step, hidden.data(), following.data(), states.data(),
               logits.data());
}

void project(Decoder& d, Array<float, 2> hidden, OutMatrix out) {
  const ModelConfig& c = d.program().config;
  const int rows = to_int(hidden.shape(0));
  check(rows > 0 && to_int(hidden.shape(1)) == c.hidden, "hidden states of the wrong shape");
  check(to_int(out.shape(0)) == rows && to_int(out.shape(1)) == c.vocab,
        "the logits array has the wrong shape");
  const nb::gil_scoped_release release;
  d.project(hidden.data(), rows, out.data());
}

void project_with(Decoder& d, const WeightStore& store, const std::string& name,
                  Array<float, 2> hidden, OutMatrix out) {
  const int rows = to_int(hidden.shape(0)), width = d.program().config.hidden;
  check(rows > 0 && to_int(hidden.shape(1)) == width, "hidden states of the wrong shape");
  check(to_int(out.shape(0)) == rows, "the logits array has the wrong shape");
  const Matrix& head = store.matrix(name, to_int(out.shape(1)), width);
  const nb::gil_scoped_release release;
  d.project(hidden.data(), rows, head, out.data());
}

void embed(const Decoder& d, Array<int32_t, 1> tokens, OutMatrix out) {
  const ModelConfig& c = d.program().config;
  const int rows = to_int(tokens.shape(0));
  check(to_int(out.shape(0)) == rows && to_int(out.shape(1)) == c.hidden,
        "the embeddings' array has the wrong shape");
  d.embed_rows(checked_tokens(tokens, c.vocab), rows, out.data());
}

}  // namespace

void bind_steps(nb::class_<Decoder>& cls) {
  cls.def("forward", &forward, nb::arg("tokens"), nb::arg("starts"), nb::arg("counts"),
          nb::arg("tables"), nb::arg("table_sizes"), nb::arg("ropes"), nb::arg("logit_rows"),
          nb::arg("out"), nb::arg("hidden").none() = nb::none(),
          nb::arg("adapters") = std::vector<std::shared_ptr<Adapter>>(),
          nb::arg("states").none() = nb::none(), nb::arg("embeddings").none() = nb::none(),
          "Runs one step into `out` [logit_rows, vocab] and `hidden` [rows, hidden]; False when "
          "cancelled. adapters: one or None for each chunk; nothing for the base alone. "
          "embeddings: [rows, hidden], instead of the tokens' own.")
      .def("project", &project, nb::arg("hidden"), nb::arg("out"), "The head's logits into `out`.")
      .def("project_with", &project_with, nb::arg("store"), nb::arg("name"), nb::arg("hidden"),
           nb::arg("out"), "The same with a matrix of `store` as the head, without a bias.")
      .def("embed", &embed, nb::arg("tokens"), nb::arg("out"), "Rows of the embedding into `out`.")
      .def("guess", &guess_step, nb::arg("model"), nb::arg("parts"), nb::arg("eps"),
           nb::arg("hidden"), nb::arg("following"), nb::arg("starts"), nb::arg("counts"),
           nb::arg("tables"), nb::arg("table_sizes"), nb::arg("ropes"), nb::arg("states"),
           nb::arg("logits"),
           "A step of a draft head of `model`, whose layer this is: of each chunk's last row the "
           "state that it guesses and the logits; False when cancelled.");
}

}  // namespace localllm
