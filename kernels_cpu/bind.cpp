// The Python face of the native engine. Everything else here is plain C++ that knows no Python.
// Every size is checked on the way in, so that no call can read or write out of bounds.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "bind_arrays.h"
#include "bind_kernels.h"
#include "core/bandwidth.h"
#include "core/cpu_features.h"
#include "core/decoder.h"
#include "core/dispatch.h"
#include "core/lending.h"

namespace nb = nanobind;
using namespace localllm;

namespace {

using AnyMatrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

bool is_type(const AnyMatrix& a, nb::dlpack::dtype_code code, int bits) {
  const auto d = a.dtype();
  return d.code == static_cast<uint8_t>(code) && d.bits == bits && d.lanes == 1;
}

GroupSource group_source(const AnyMatrix& values, const std::optional<AnyMatrix>& multipliers,
                         int rows) {
  using nb::dlpack::dtype_code;
  GroupSource s;
  s.half = is_type(values, dtype_code::Float, 16);
  check(s.half || is_type(values, dtype_code::Float, 32),
        "group values must be float16 or float32");
  check(to_int(values.shape(0)) == rows, "group values do not match the rows");
  s.values = values.data();
  s.values_per_row = to_int(values.shape(1));
  s.groups_per_row = s.values_per_row;
  if (multipliers) {
    s.signed_multipliers = is_type(*multipliers, dtype_code::Int, 8);
    check(s.signed_multipliers || is_type(*multipliers, dtype_code::UInt, 8),
          "multipliers must be int8 or uint8");
    check(to_int(multipliers->shape(0)) == rows, "multipliers do not match the rows");
    s.multipliers = multipliers->data();
    s.groups_per_row = to_int(multipliers->shape(1));
  }
  return s;
}

template <class Store>
void add_affine(Store& store, const std::string& name, Array<uint32_t, 2> codes, int cols, int bits,
                int group, int zero_point, AnyMatrix scales,
                std::optional<AnyMatrix> scale_multipliers, std::optional<AnyMatrix> biases,
                std::optional<AnyMatrix> bias_multipliers) {
  AffineSource s;
  s.codes = codes.data();
  s.rows = to_int(codes.shape(0));
  s.cols = cols;
  s.bits = bits;
  s.group = group;
  s.zero_point = zero_point;
  check(cols > 0 && bits > 0 && bits <= 8 &&
            codes.shape(1) == (static_cast<size_t>(cols) * static_cast<size_t>(bits) + 31) / 32,
        "codes do not match the columns");
  s.scales = group_source(scales, scale_multipliers, s.rows);
  if (biases) s.biases = group_source(*biases, bias_multipliers, s.rows);
  const nb::gil_scoped_release release;
  store.add_affine(name, s);
}

WeightKind dense_kind(const AnyMatrix& values) {
  using nb::dlpack::dtype_code;
  if (is_type(values, dtype_code::Float, 32)) return WeightKind::kFloat32;
  if (is_type(values, dtype_code::Float, 16)) return WeightKind::kFloat16;
  if (is_type(values, dtype_code::UInt, 16)) return WeightKind::kBfloat16;
  throw std::invalid_argument("dense weights must be float32, float16 or bfloat16 bits");
}

template <class Store>
void add_dense(Store& store, const std::string& name, AnyMatrix values) {
  const WeightKind kind = dense_kind(values);
  const int rows = to_int(values.shape(0)), cols = to_int(values.shape(1));
  const nb::gil_scoped_release release;
  store.add_dense(name, values.data(), kind, rows, cols);
}

// Both a store and a file being written take weights.
template <class Store>
void bind_adding(nb::class_<Store>& cls) {
  cls.def("add_affine", &add_affine<Store>, nb::arg("name"), nb::arg("codes"), nb::arg("cols"),
          nb::arg("bits"), nb::arg("group"), nb::arg("zero_point"), nb::arg("scales"),
          nb::arg("scale_multipliers").none(), nb::arg("biases").none(),
          nb::arg("bias_multipliers").none())
      .def("add_dense", &add_dense<Store>, nb::arg("name"), nb::arg("values"))
      .def("add_vector", [](Store& s, const std::string& name, Array<float, 1> v) {
        s.add_vector(name, v.data(), to_int(v.shape(0)));
      });
}

AdapterSource adapter_source(const AnyMatrix& a, const AnyMatrix& b, float scale) {
  check(a.shape(0) == b.shape(1), "the ranks of an adapter's matrices differ");
  return {a.data(),           b.data(),           dense_kind(a),      dense_kind(b),
          to_int(a.shape(1)), to_int(a.shape(0)), to_int(b.shape(0)), scale};
}

void add_pair(Adapter& adapter, int layer, Target target, AnyMatrix a, AnyMatrix b, float scale,
              std::optional<Array<float, 1>> gains, std::optional<int> expert) {
  AdapterSource source = adapter_source(a, b, scale);
  if (gains) {
    check(to_int(gains->shape(0)) == source.out, "an adapter needs one gain for each output");
    source.gains = gains->data();
  }
  const nb::gil_scoped_release release;
  if (expert)
    adapter.add_to_expert(layer, *expert, target, source);
  else
    adapter.add(layer, target, source);
}

std::unique_ptr<Decoder> make_decoder(std::shared_ptr<WeightStore> store, const ModelConfig& config,
                                      const std::vector<LayerConfig>& layers, int kv_bits,
                                      int block, const std::vector<int>& blocks, int threads,
                                      const std::string& kernels, int states, size_t expert_bytes,
                                      const std::vector<float>& expert_uses) {
  check(block > 0 && block <= 65536 && !blocks.empty(), "blocks must be positive");
  for (const int count : blocks) check(count > 0, "blocks must be positive");
  check(threads > 0 && threads <= 1024, "threads must be from 1 to 1024");
  const Kernels* table = find_kernels(kernels);
  check(table != nullptr, "these kernels cannot run here");
  bool recurrent = false;
  for (const LayerConfig& c : layers) recurrent = recurrent || c.mixer != Mixer::kAttention;
  check(states >= 0 && states <= 1 << 20 && (states > 1 || !recurrent),
        "a model with recurrent layers needs two states or more");
  return std::make_unique<Decoder>(std::move(store), config, layers, kv_kind(kv_bits), block,
                                   blocks, recurrent ? states : 0, threads, *table, expert_bytes,
                                   expert_uses);
}

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check_block(const Decoder& d, int group, int32_t block) {
  check(group >= 0 && group < d.kv().groups(), "no such KV group");
  check(block >= 0 && block < d.kv().blocks(group), "KV block outside the pool");
}

uint8_t* block_of(const Decoder& d, int group, int32_t block, size_t bytes) {
  check_block(d, group, block);
  check(bytes == d.kv().block_bytes(group), "not the size of a KV block");
  return d.kv().block_at(group, block);
}

void check_slot(const Decoder& d, int slot) {
  check(slot >= 0 && slot < d.states().slots(), "no such state");
}

uint8_t* slot_of(const Decoder& d, int slot, size_t bytes) {
  check_slot(d, slot);
  check(bytes == d.states().slot_bytes(), "not the size of a state");
  return reinterpret_cast<uint8_t*>(d.states().slot(slot));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "localllm's native CPU engine.";
  nb::set_leak_warnings(false);  // a model that nobody closed is no fault of the binding's
  m.def("cpu_features", &usable_cpu_features,
        "Instruction-set extensions that both the CPU and the operating system allow.");
  m.def("usable_kernels", &usable_kernels, "Kernel tables that run here, slowest first.");
  m.def(
      "lend_cores",
      [](nb::ndarray<nb::ro, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> borrowers,
         int processors) {
        check(processors > 0, "processors must be positive");
        new auto(borrowers);  // looked at for as long as the process lives
        lend_cores(borrowers.data(), to_int(borrowers.shape(0)), processors);
      },
      nb::arg("borrowers"), nb::arg("processors"),
      "From now on all pools leave a core to each of these bytes that is not 0, out of so many.");
  m.def("default_threads", &default_threads,
        "Processors this process may use: affinity, cgroup quota, one per physical core.");
  m.def(
      "read_bandwidth",
      [](size_t bytes, int threads) {
        check(bytes > 0 && bytes <= size_t{1} << 40, "bytes must be from 1 to 2**40");
        check(threads > 0 && threads <= 1024, "threads must be from 1 to 1024");
        const nb::gil_scoped_release release;
        return read_bandwidth(bytes, threads);
      },
      nb::arg("bytes"), nb::arg("threads"),
      "Bytes per second that so many threads read from a buffer of so many bytes.");

  bind_kernels(m);
  bind_attention(m);
  bind_sampling(m);

  nb::class_<WeightStore> store(m, "WeightStore", "Weights by name, packed for the kernels.");
  store.def(nb::init<>())
      .def("save", &WeightStore::save, nb::call_guard<nb::gil_scoped_release>(),
           "Writes the packed form to a file for `open`; RuntimeError when it cannot.")
      .def_static(
          "open", &WeightStore::open, nb::arg("path"), nb::arg("leave_experts") = false,
          nb::call_guard<nb::gil_scoped_release>(),
          "Opens what `save` wrote; RuntimeError when it cannot. leave_experts: a mixture's "
          "experts stay in the file until a decoder needs them.")
      .def("__contains__", &WeightStore::has)
      .def("bytes_of", &WeightStore::bytes_of, nb::arg("name"), "Packed bytes of one weight.")
      .def_prop_ro("nbytes", &WeightStore::bytes, "Bytes in memory.");
  bind_adding(store);
  nb::class_<PackedWriter> writer(m, "PackedWriter",
                                  "Packs weights straight into a file for `WeightStore.open`. Its "
                                  "calls raise RuntimeError when writing fails.");
  writer
      .def(nb::init<const std::string&, size_t>(), nb::arg("path"), nb::arg("weights"),
           "weights: how many will be added.")
      .def("finish", &PackedWriter::finish, nb::call_guard<nb::gil_scoped_release>(),
           "After the last one; without it the file cannot be opened.");
  bind_adding(writer);

  nb::class_<NormConfig>(m, "NormConfig")
      .def(nb::init<>())
      .def_rw("present", &NormConfig::present)
      .def_rw("layer", &NormConfig::layer)
      .def_rw("eps", &NormConfig::eps);

  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGelu)
      .value("gelu_tanh", Activation::kGeluTanh)
      .value("relu", Activation::kRelu)
      .value("clamped_swiglu", Activation::kClampedSwiglu)
      .value("sigmoid", Activation::kSigmoid);

  nb::enum_<Mixer>(m, "Mixer")
      .value("attention", Mixer::kAttention)
      .value("delta", Mixer::kDelta)
      .value("short_conv", Mixer::kShortConv);

  nb::class_<LayerConfig>(m, "LayerConfig")
      .def(nb::init<>())
      .def_rw("mixer", &LayerConfig::mixer)
      .def_rw("heads", &LayerConfig::heads)
      .def_rw("kv_heads", &LayerConfig::kv_heads)
      .def_rw("head_dim", &LayerConfig::head_dim)
      .def_rw("scale", &LayerConfig::scale)
      .def_rw("rope", &LayerConfig::rope)
      .def_rw("rope_half", &LayerConfig::rope_half)
      .def_rw("window", &LayerConfig::window)
      .def_rw("kv_group", &LayerConfig::kv_group)
      .def_rw("softcap", &LayerConfig::softcap)
      .def_rw("qk_norm", &LayerConfig::qk_norm)
      .def_rw("qk_norm_all", &LayerConfig::qk_norm_all)
      .def_rw("sinks", &LayerConfig::sinks)
      .def_rw("v_norm", &LayerConfig::v_norm)
      .def_rw("v_from_k", &LayerConfig::v_from_k)
      .def_rw("kv_source", &LayerConfig::kv_source)
      .def_rw("query_growth", &LayerConfig::query_growth)
      .def_rw("query_context", &LayerConfig::query_context)
      .def_rw("gate", &LayerConfig::gate)
      .def_rw("key_dim", &LayerConfig::key_dim)
      .def_rw("kernel", &LayerConfig::kernel)
      .def_rw("channels", &LayerConfig::channels)
      .def_rw("delta_eps", &LayerConfig::delta_eps)
      .def_rw("hidden", &LayerConfig::hidden)
      .def_rw("activation", &LayerConfig::activation)
      .def_rw("gated", &LayerConfig::gated)
      .def_rw("experts", &LayerConfig::experts)
      .def_rw("top_k", &LayerConfig::top_k)
      .def_rw("renormalize", &LayerConfig::renormalize)
      .def_rw("renormalize_eps", &LayerConfig::renormalize_eps)
      .def_rw("sigmoid_scores", &LayerConfig::sigmoid_scores)
      .def_rw("selection_bias", &LayerConfig::selection_bias)
      .def_rw("groups", &LayerConfig::groups)
      .def_rw("top_groups", &LayerConfig::top_groups)
      .def_rw("weight_scale", &LayerConfig::weight_scale)
      .def_rw("shared", &LayerConfig::shared)
      .def_rw("shared_gate", &LayerConfig::shared_gate)
      .def_rw("own_norms", &LayerConfig::own_norms)
      .def_rw("router_scale", &LayerConfig::router_scale)
      .def_rw("expert_scale", &LayerConfig::expert_scale)
      .def_rw("norm", &LayerConfig::norm)
      .def_rw("scalar", &LayerConfig::scalar)
      .def_rw("pre_norm", &LayerConfig::pre_norm)
      .def_rw("post_norm", &LayerConfig::post_norm)
      .def_rw("residual_scale", &LayerConfig::residual_scale);

  nb::class_<ModelConfig>(m, "ModelConfig")
      .def(nb::init<>())
      .def_rw("vocab", &ModelConfig::vocab)
      .def_rw("hidden", &ModelConfig::hidden)
      .def_rw("final_norm", &ModelConfig::final_norm)
      .def_rw("tied_head", &ModelConfig::tied_head)
      .def_rw("embed_scale", &ModelConfig::embed_scale)
      .def_rw("learned_positions", &ModelConfig::learned_positions)
      .def_rw("logit_scale", &ModelConfig::logit_scale)
      .def_rw("logit_softcap", &ModelConfig::logit_softcap)
      .def_rw("per_layer", &ModelConfig::per_layer)
      .def_rw("per_layer_vocab", &ModelConfig::per_layer_vocab)
      .def_rw("per_layer_activation", &ModelConfig::per_layer_activation)
      .def_rw("float_activations", &ModelConfig::float_activations);

  nb::enum_<Target>(m, "Target")
      .value("q", Target::kQ)
      .value("k", Target::kK)
      .value("v", Target::kV)
      .value("o", Target::kO)
      .value("gate", Target::kGate)
      .value("up", Target::kUp)
      .value("down", Target::kDown)
      .value("head_gate", Target::kHeadGate)
      .value("in", Target::kIn)
      .value("z", Target::kZ)
      .value("out", Target::kOut);

  m.def(
      "adapter_pair_bytes",
      [](AnyMatrix a, AnyMatrix b) {
        const AdapterSource s = adapter_source(a, b, 1.0f);
        return Adapter::packed_bytes(s.a_kind, s.b_kind, s.in, s.rank, s.out);
      },
      nb::arg("a"), nb::arg("b"), "Bytes that A [rank, in] and B [out, rank] take when packed.");
  nb::class_<Adapter>(m, "Adapter", "A low-rank adapter, packed.")
      .def(nb::new_([](int layers, size_t bytes) {
             check(layers > 0 && layers <= 65536 && bytes <= size_t{1} << 40,
                   "an adapter of an impossible size");
             return std::make_shared<Adapter>(layers, bytes);
           }),
           nb::arg("layers"), nb::arg("bytes"), "bytes: what all its pairs together take.")
      .def("add", &add_pair, nb::arg("layer"), nb::arg("target"), nb::arg("a"), nb::arg("b"),
           nb::arg("scale"), nb::arg("gains").none() = nb::none(),
           nb::arg("expert").none() = nb::none(),
           "expert: whose gate, up or down it is; None for a linear of the layer's own.")
      .def_prop_ro("nbytes", &Adapter::bytes);

  nb::class_<ExpertCache>(m, "ExpertCache", "Experts in memory, of more that lie in a file.")
      .def_prop_ro("slots", &ExpertCache::slots, "Experts that memory holds.")
      .def_prop_ro("experts", &ExpertCache::experts, "Experts of all layers.")
      .def_prop_ro("slot_bytes", &ExpertCache::slot_bytes)
      .def_prop_ro("read_speed", &ExpertCache::read_speed,
                   "Bytes a second at which one expert after the other was read from the file.")
      .def_prop_ro("memory_speed", &ExpertCache::memory_speed,
                   "Bytes a second at which the slots are read.")
      .def_prop_ro(
          "chosen", [](const ExpertCache& c) { return c.counts().chosen; },
          "Experts that steps asked for.")
      .def_prop_ro(
          "read", [](const ExpertCache& c) { return c.counts().read; },
          "Of them, those that had to be read.")
      .def_prop_ro("uses", &ExpertCache::uses, "How often each was chosen, layer by layer.")
      .def_prop_ro("residents", &ExpertCache::residents, "Which ones memory holds now.")
      .def_prop_ro("read_bytes", [](const ExpertCache& c) { return c.counts().bytes; })
      .def_prop_ro("read_seconds", [](const ExpertCache& c) { return c.counts().seconds; });
  nb::class_<Decoder> decoder(m, "Decoder", "A decoder with its KV pool and threads.");
  bind_steps(decoder);
  decoder
      .def(nb::new_(&make_decoder), nb::arg("store"), nb::arg("config"), nb::arg("layers"),
           nb::arg("kv_bits"), nb::arg("block"), nb::arg("blocks"), nb::arg("threads"),
           nb::arg("kernels"), nb::arg("states") = 0, nb::arg("expert_bytes") = 0,
           nb::arg("expert_uses") = std::vector<float>(),
           "expert_bytes: memory for the experts that the store left in its file. expert_uses: how "
           "often each was chosen before, layer by layer.")
      .def("block_bytes",
           [](const Decoder& d, int group) {
             check_block(d, group, 0);
             return d.kv().block_bytes(group);
           })
      .def("copy_block",
           [](Decoder& d, int group, int32_t from, int32_t to) {
             check_block(d, group, from);
             check_block(d, group, to);
             d.copy_block(group, from, to);
           })
      .def("read_block",
           [](const Decoder& d, int group, int32_t block, OutBytes out) {
             const uint8_t* from = block_of(d, group, block, out.shape(0));
             const nb::gil_scoped_release release;
             std::copy_n(from, out.shape(0), out.data());
           })
      .def("write_block",
           [](Decoder& d, int group, int32_t block, Bytes from) {
             uint8_t* to = block_of(d, group, block, from.shape(0));
             const nb::gil_scoped_release release;
             std::copy_n(from.data(), from.shape(0), to);
           })
      .def(
          "replay",
          [](Decoder& d, int chunk, int first, int rows, int source, int target) {
            const std::vector<int>& guesses = d.first_guess();
            check(chunk >= 0 && chunk + 1 < static_cast<int>(guesses.size()), "no such chunk");
            const auto at = static_cast<size_t>(chunk);
            check(first >= 0 && rows > 0 && first + rows <= guesses[at + 1] - guesses[at],
                  "no such guesses");
            check_slot(d, source);
            check_slot(d, target);
            const nb::gil_scoped_release release;
            d.replay(guesses[at] + first, rows, source, target);
          },
          "Carries a state on over guesses of the last step's chunk.")
      .def("read_state",
           [](const Decoder& d, int slot, OutBytes out) {
             const uint8_t* from = slot_of(d, slot, out.shape(0));
             const nb::gil_scoped_release release;
             std::copy_n(from, out.shape(0), out.data());
           })
      .def("write_state",
           [](Decoder& d, int slot, Bytes from) {
             uint8_t* to = slot_of(d, slot, from.shape(0));
             const nb::gil_scoped_release release;
             std::copy_n(from.data(), from.shape(0), to);
           })
      .def_prop_ro("state_bytes", [](const Decoder& d) { return d.states().slot_bytes(); })
      .def("cancel", &Decoder::cancel)
      .def_prop_ro("threads", &Decoder::threads)
      .def_prop_ro("kernels", &Decoder::kernels)
      .def_prop_ro("kv_bytes", [](const Decoder& d) { return d.kv().bytes(); })
      .def_prop_ro("expert_cache", &Decoder::expert_cache, nb::rv_policy::reference_internal,
                   "None where all weights are in memory.");

  bind_train(m);  // its types use those above
}
