// Attention by itself for tests: keys and values through a cache, then every row over what it sees.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "bind_kernels.h"
#include "core/dispatch.h"
#include "core/kv.h"
#include "core/threads.h"

namespace nb = nanobind;

namespace localllm {

namespace {

using Heads = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutHeads = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// Rows of q see the tokens up to their own, `together` queries a call.
void attention(Heads q, Heads k, Heads v, OutHeads out, int kv_bits, int block, int window,
               int together, const std::string& name) {
  const int tokens = static_cast<int>(k.shape(0)), kv_heads = static_cast<int>(k.shape(1));
  const int heads = static_cast<int>(q.shape(1)), dim = static_cast<int>(q.shape(2));
  for (size_t i = 0; i < 3; ++i)
    if (k.shape(i) != v.shape(i) || q.shape(i) != out.shape(i))
      throw std::invalid_argument("shapes differ");
  if (tokens < 1 || q.shape(0) != k.shape(0) || k.shape(2) != q.shape(2) || kv_heads < 1 ||
      heads < 1 || heads % kv_heads || dim < 1 || block < 1 || together < 1 || window < 0)
    throw std::invalid_argument("sizes do not fit");
  const Kernels* found = find_kernels(name);
  if (!found) throw std::invalid_argument("these kernels cannot run here");
  const Kernels& kernels = *found;
  const FlushDenormals flush;
  const int blocks = (tokens + block - 1) / block;
  const KvPool pool(kv_kind(kv_bits), block, {{0, kv_heads, dim}}, {blocks});
  const KvLayout& l = pool.layout(0);
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (int b = 0; b < blocks; ++b) table[static_cast<size_t>(b)] = blocks - 1 - b;
  const auto entry = [&](const float* x, int token, int of, int head) {
    return x + (static_cast<ptrdiff_t>(token) * of + head) * dim;
  };
  std::vector<float> queries(q.data(), q.data() + q.size());
  std::vector<float> key(static_cast<size_t>(dim)), value(static_cast<size_t>(dim));
  for (int t = 0; t < tokens; ++t) {
    for (int h = 0; h < kv_heads; ++h) {
      std::copy_n(entry(k.data(), t, kv_heads, h), dim, key.data());
      std::copy_n(entry(v.data(), t, kv_heads, h), dim, value.data());
      if (l.rotated()) kernels.rotate(key.data(), dim), kernels.rotate(value.data(), dim);
      uint8_t* piece = pool.piece_at(0, h, table[static_cast<size_t>(t / block)], t % block);
      kernels.write_kv(l, piece, t % block % l.tile, key.data(), value.data());
    }
    for (int h = 0; h < heads && l.rotated(); ++h)
      kernels.rotate(queries.data() + (static_cast<ptrdiff_t>(t) * heads + h) * dim, dim);
  }
  const int group = heads / kv_heads, size = AttentionState::size(l.padded_dim);
  const size_t most = static_cast<size_t>(together) * static_cast<size_t>(heads);
  std::vector<float> merged(most * static_cast<size_t>(size)), fresh(merged);
  std::vector<float> scratch(attend_scratch(l.padded_dim) + 16);
  std::vector<AttentionRow> rows(most);
  for (int from = 0; from < tokens; from += together) {
    const int n = std::min(together, tokens - from), count = n * group, all = count * kv_heads;
    const auto head_of = [&](int i) { return i / count * group + i % group; };
    for (int i = 0; i < all; ++i) {
      const int token = from + i % count / group;
      rows[static_cast<size_t>(i)] = {entry(queries.data(), token, heads, head_of(i)),
                                      fresh.data() + static_cast<ptrdiff_t>(i) * size, token};
    }
    const int start = window > 0 ? std::max(0, from + 1 - window) / kPart : 0;
    for (int i = 0; i < all; ++i)
      kernels.reset_state(merged.data() + static_cast<ptrdiff_t>(i) * size, l.padded_dim);
    for (int part = start; part <= (from + n - 1) / kPart; ++part) {
      for (int i = 0; i < all; ++i)
        kernels.reset_state(rows[static_cast<size_t>(i)].state, l.padded_dim);
      kernels.attend(pool.head(0, 0, table.data()), {window, 0.0f}, rows.data(), count, kv_heads,
                     part, scratch.data());
      for (int i = 0; i < all; ++i)
        kernels.merge_state(merged.data() + static_cast<ptrdiff_t>(i) * size,
                            rows[static_cast<size_t>(i)].state, l.padded_dim);
    }
    for (int i = 0; i < all; ++i) {
      const int token = rows[static_cast<size_t>(i)].position;
      float* to = out.data() + (static_cast<ptrdiff_t>(token) * heads + head_of(i)) * dim;
      kernels.finish_state(merged.data() + static_cast<ptrdiff_t>(i) * size, dim, to);
      if (l.rotated()) kernels.rotate(to, dim);
    }
  }
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
        nb::arg("kv_bits"), nb::arg("block"), nb::arg("window"), nb::arg("together"),
        nb::arg("kernels"),
        "out [T, heads, D] = causal attention of q [T, heads, D], scaled by log2(e) already, over "
        "a cache of k and v [T, kv heads, D].");
}

}  // namespace localllm
