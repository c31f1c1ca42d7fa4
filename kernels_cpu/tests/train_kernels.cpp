// Training's kernels against plain C++: products of bfloat16 against sums in double precision, and
// whole gradients of small models against the float32 ones. Prints one line a table and model.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "expect.h"
#include "random.h"
#include "train/dispatch.h"
#include "train/trainer.h"

namespace localllm::train {

namespace {

using synthetic::Random;

// Relative L2. bfloat16 keeps 8 bits of every factor; sums of them are as exact as of float32.
constexpr double kRounded = 0.1, kExact = 1e-5, kSums = 1e-5;

double apart(const std::vector<float>& got, const std::vector<float>& wanted) {
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - static_cast<double>(wanted[i]), 2);
    size += std::pow(static_cast<double>(wanted[i]), 2);
  }
  return std::sqrt(difference / size);
}

std::vector<float> random_floats(Random& random, size_t n, float size) {
  std::vector<float> x(n);
  for (float& value : x) value = size * random.uniform();
  return x;
}

float rounded(const Kernels& k, float x) {
  uint8_t element[8] = {};
  float back = 0.0f;
  k.to_elements(&x, 1.0f, 0, 1, 0, 1, element, 0);
  k.to_floats(element, 1, &back);
  return back;
}

std::vector<uint8_t> elements_of(const Kernels& k, const std::vector<float>& x, int m, int n) {
  std::vector<uint8_t> out(x.size() * static_cast<size_t>(k.element) + 64);
  k.to_elements(x.data(), 1.0f, n, n, 0, m, out.data(), n);
  return out;
}

std::vector<uint8_t> packed(const Kernels& k, const std::vector<uint8_t>& x, int m, int n) {
  std::vector<uint8_t> out(k.packed_bytes(m, k.steps(n)), 0xff);  // NaNs where nothing is written
  k.pack_rows(x.data(), n, m, n, 0, k.row_blocks(m), out.data());
  return out;
}

// y = x W^T + scale (x A^T) B^T, or with W in place of W^T, from blocks and from rows of W, and the
// gradients of A and of W.
void check_product(const Kernels& k, int m, int in, int out, int rank, bool backward) {
  Random random(static_cast<uint64_t>(m + 7 * in + 31 * out + 101 * rank));
  const auto count = [](int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); };
  auto x = random_floats(random, count(m, in), 1.0f),
       w = random_floats(random, count(out, in), 1.0f);
  auto a = random_floats(random, count(rank, in), 1.0f),
       b = random_floats(random, count(out, rank), 1.0f);
  for (auto* values : {&x, &w, &a, &b})
    for (float& value : *values) value = rounded(k, value);

  // Backward, the rows of the stored matrix are what is summed over.
  Store store;
  std::vector<float> stored = w;
  if (backward)
    for (int r = 0; r < out; ++r)
      for (int c = 0; c < in; ++c)
        stored[count(c, out) + static_cast<size_t>(r)] = w[count(r, in) + static_cast<size_t>(c)];
  const int rows = backward ? in : out, cols = backward ? out : in;
  store.add("w", rows, cols, Codes::kFloat32, 0);
  store.fill_dense("w", 0, rows, stored.data());

  const auto x_elements = elements_of(k, x, m, in);
  const auto x_packed = packed(k, x_elements, m, in);
  const int panel_rank = round_up(rank, 16);
  std::vector<uint8_t> panel(count(panel_rank, k.steps(in)) * 4),
      low(k.packed_bytes(m, k.low_steps(rank)), 0xff),
      low_t(count(round_up(rank, k.tile_rows), k.column_steps(m)) * 4 + 64, 0xff);
  k.factor_panel(a.data(), rank, in, in, 1, 1.0f, panel.data());
  k.low_rank({x_packed.data(), k.steps(in), panel.data(), rank, m, low.data(), low_t.data()}, 0,
             k.row_blocks(m));

  std::vector<float> y(count(m, out), -1.0f), slope(count(rank, in), 0.0f);
  Product p;
  p.rows = x_packed.data();
  p.steps = k.steps(in);
  p.low = low.data();
  p.low_steps = k.low_steps(rank);
  p.rank = rank;
  p.factor = b.data();
  p.factor_r = 1;
  p.factor_c = rank;
  p.factor_scale = 0.5f;
  p.weight = store.matrix("w", rows, cols);
  p.backward = backward;
  p.count = rows;
  p.m = m;
  p.columns = p.ld = out;
  p.out = y.data();
  Gradient g{low_t.data(), rank, m, x_elements.data(), in, in, 0.25f, slope.data(), in, 1};
  const int steps = std::max({k.steps(in), k.steps(out), k.column_steps(m)}) + k.low_steps(rank);
  std::vector<uint8_t> scratch(count(steps + 1, kPanel) * 4 + 256, 0xff);
  for (int i = 0; i < panels(out); ++i) k.product(p, i, 0, k.row_blocks(m), scratch.data());
  for (int i = 0; i < panels(in); ++i) k.gradient(g, i, scratch.data());

  // The same from where parameters lie, to the bit.
  store.add_trained("w in place", rows, cols, 0);
  store.use(stored.data());
  std::vector<float> y_again(y.size(), -1.0f);
  p.weight = store.matrix("w in place", rows, cols);
  p.out = y_again.data();
  for (int i = 0; i < panels(out); ++i) k.product(p, i, 0, k.row_blocks(m), scratch.data());

  // x^T x, as a weight's gradient is made.
  std::vector<uint8_t> columns(k.column_bytes(m, in) + 64, 0xff);
  k.pack_columns(x_elements.data(), in, m, in, 0, k.row_blocks(in), columns.data());
  std::vector<float> square(count(in, in), 0.0f), square_wanted(square.size());
  Gradient of_weight{columns.data(), in, m, x_elements.data(), in, in, 1.0f, square.data(), in, 1};
  for (int i = 0; i < panels(in); ++i) k.gradient(of_weight, i, scratch.data());
  for (int i = 0; i < in; ++i)
    for (int c = 0; c < in; ++c) {
      double sum = 0.0;
      for (int r = 0; r < m; ++r)
        sum += static_cast<double>(x[count(r, in) + static_cast<size_t>(i)]) *
               static_cast<double>(x[count(r, in) + static_cast<size_t>(c)]);
      square_wanted[count(i, in) + static_cast<size_t>(c)] = static_cast<float>(sum);
    }

  std::vector<float> u(count(m, rank)), y_wanted(y.size()), slope_wanted(slope.size());
  for (int r = 0; r < m; ++r)
    for (int i = 0; i < rank; ++i) {
      float sum = 0.0f;  // rounded as the kernels round it, or nearly
      for (int c = 0; c < in; ++c) sum += x[count(r, in) + c] * a[count(i, in) + c];
      u[count(r, rank) + static_cast<size_t>(i)] = rounded(k, sum);
    }
  for (int r = 0; r < m; ++r)
    for (int o = 0; o < out; ++o) {
      double sum = 0.0;
      for (int c = 0; c < in; ++c)
        sum += static_cast<double>(x[count(r, in) + c]) * static_cast<double>(w[count(o, in) + c]);
      for (int i = 0; i < rank; ++i)
        sum += 0.5 * static_cast<double>(u[count(r, rank) + i]) *
               static_cast<double>(b[count(o, rank) + i]);
      y_wanted[count(r, out) + static_cast<size_t>(o)] = static_cast<float>(sum);
    }
  for (int i = 0; i < rank; ++i)
    for (int c = 0; c < in; ++c) {
      double sum = 0.0;
      for (int r = 0; r < m; ++r)
        sum +=
            static_cast<double>(u[count(r, rank) + i]) * static_cast<double>(x[count(r, in) + c]);
      slope_wanted[count(i, in) + static_cast<size_t>(c)] = static_cast<float>(0.25 * sum);
    }
  // An inner value may round to the other neighbour, by one part in 256 of it.
  const double bound = k.element == 4 ? kSums : 2e-3;
  const std::string at = std::string(k.name) + (backward ? " backward " : " forward ") +
                         std::to_string(m) + "x" + std::to_string(in) + "x" + std::to_string(out) +
                         " rank " + std::to_string(rank) + ": ";
  const double product = apart(y, y_wanted), gradient = apart(slope, slope_wanted);
  expect(product < bound, at + "a product is apart by " + std::to_string(product));
  expect(gradient < bound, at + "a gradient is apart by " + std::to_string(gradient));
  expect(y == y_again, at + "other bits from rows of the weight");
  const double of_square = apart(square, square_wanted);
  expect(of_square < kSums, at + "a weight's gradient is apart by " + std::to_string(of_square));
}

struct Case {
  const char* name;
  int vocab, hidden, ffn, heads, kv_heads, head_dim, rank, window;
  float softcap;
  double dropout;
  bool dora;
  std::vector<int> lengths;
  bool whole = false;  // all weights are trained, and no adapters are there
};

struct Outcome {
  double loss = 0.0;
  std::vector<float> gradient, log_probs;
};

class Small {
 public:
  explicit Small(const Case& c) : case_(c) {
    Random random(5);
    store_ = std::make_shared<Store>();
    layer_.heads = c.heads;
    layer_.kv_heads = c.kv_heads;
    layer_.head_dim = c.head_dim;
    layer_.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    layer_.rope = 0;
    layer_.rope_half = c.head_dim / 2;
    layer_.window = c.window;
    layer_.softcap = c.softcap;
    layer_.hidden = c.ffn;
    layer_.pre_norm = {true, false, 1e-5f};
    config_.vocab = c.vocab;
    config_.hidden = c.hidden;
    config_.final_norm = layer_.pre_norm;
    config_.tied_head = true;
    const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    const std::pair<const char*, std::pair<int, int>> linears[] = {
        {"attn.q", {q, c.hidden}},       {"attn.k", {kv, c.hidden}},
        {"attn.v", {kv, c.hidden}},      {"attn.o", {c.hidden, q}},
        {"ffn.gate", {c.ffn, c.hidden}}, {"ffn.up", {c.ffn, c.hidden}},
        {"ffn.down", {c.hidden, c.ffn}}};
    matrix(random, "embed", c.vocab, c.hidden);
    vector(random, "final_norm", c.hidden);
    for (int i = 0; i < kLayers; ++i) {
      const std::string at = "layers." + std::to_string(i) + ".";
      vector(random, at + "attn_norm", c.hidden);
      vector(random, at + "ffn_norm", c.hidden);
      int turn = 0;
      for (const auto& [name, shape] : linears) {
        const std::vector<float> w = matrix(random, at + name, shape.first, shape.second);
        if (c.whole) continue;
        AdapterPlace a;
        a.layer = i;
        a.linear = std::string(name).substr(std::string(name).find('.') + 1);
        a.rank = c.rank + turn++ % 3;
        a.scale = 0.7f;
        a.a = parameters_;
        a.b = a.a + static_cast<int64_t>(a.rank) * shape.second;
        parameters_ = a.b + static_cast<int64_t>(a.rank) * shape.first;
        if (c.dora) {
          std::vector<float> squares(static_cast<size_t>(shape.first));
          for (size_t e = 0; e < w.size(); ++e)
            squares[e / static_cast<size_t>(shape.second)] += w[e] * w[e];
          store_->add_vector(at + name + ".squares", squares.data(), shape.first);
          a.magnitude = parameters_;
          magnitudes_.push_back({a.magnitude, shape.first});
          parameters_ += shape.first;
        }
        adapters_.push_back(a);
      }
    }
    for (const int n : c.lengths) {
      for (int p = 0; p < n; ++p) index_.push_back(p);
      offsets_.push_back(offsets_.back() + n);
    }
    const size_t rows = index_.size();
    for (size_t i = 0; i < rows; ++i) {
      tokens_.push_back(random.below(c.vocab));
      targets_.push_back(random.below(c.vocab));
    }
    weights_ = random_floats(random, rows, 1.0f);
    if (!c.whole) given_ = random_floats(random, static_cast<size_t>(parameters_), 0.2f);
    for (const auto& [first, count] : magnitudes_)
      for (int e = 0; e < count; ++e) given_[static_cast<size_t>(first + e)] += 1.0f;
    const int half = layer_.rope_half;
    for (int p = 0; p < 512; ++p)
      for (int i = 0; i < 2 * half; ++i) {
        const double angle = p / std::pow(100.0, static_cast<double>(i % half) / half);
        rope_.push_back(static_cast<float>(i < half ? std::cos(angle) : std::sin(angle)));
      }
  }

  Outcome run(const Kernels& k, int threads, size_t keep) const {
    auto model = std::make_unique<Model>(store_, config_, std::vector<LayerConfig>(kLayers, layer_),
                                         std::vector<bool>(kLayers, false), adapters_, parameters_);
    Trainer trainer(std::move(model), k, threads, keep);
    Batch batch;
    batch.tokens = tokens_.data();
    batch.targets = targets_.data();
    batch.offsets = offsets_.data();
    batch.sequences = static_cast<int>(case_.lengths.size());
    batch.ropes = {{rope_.data(), index_.data()}};
    batch.seed = 9;
    batch.dropout = case_.dropout;
    Outcome out;
    out.gradient.resize(given_.size());
    out.log_probs.resize(tokens_.size());
    trainer.log_probs(batch, given_.data(), out.log_probs.data());
    out.loss = trainer.gradients(batch, weights_.data(), given_.data(), out.gradient.data());
    return out;
  }

 private:
  static constexpr int kLayers = 2;

  std::vector<float> matrix(Random& random, const std::string& name, int rows, int cols) {
    const auto w = random_floats(random, static_cast<size_t>(rows) * static_cast<size_t>(cols),
                                 1.7f / std::sqrt(static_cast<float>(cols)));
    if (train(w)) {
      store_->add_trained(name + ".weight", rows, cols,
                          parameters_ - static_cast<int64_t>(w.size()));
      return w;
    }
    store_->add(name + ".weight", rows, cols, Codes::kFloat32, 0);
    store_->fill_dense(name + ".weight", 0, rows, w.data());
    return w;
  }
  void vector(Random& random, const std::string& name, int n) {
    std::vector<float> gain = random_floats(random, static_cast<size_t>(n), 0.2f);
    for (float& g : gain) g += 1.0f;
    if (train(gain)) {
      store_->add_trained_vector(name + ".weight", n, parameters_ - n, 0.0f);
      return;
    }
    store_->add_vector(name + ".weight", gain.data(), n);
  }

  // Puts a weight behind the other parameters where all are trained.
  bool train(const std::vector<float>& w) {
    if (!case_.whole) return false;
    given_.insert(given_.end(), w.begin(), w.end());
    parameters_ += static_cast<int64_t>(w.size());
    return true;
  }

  Case case_;
  std::shared_ptr<Store> store_;
  LayerConfig layer_;
  ModelConfig config_;
  std::vector<AdapterPlace> adapters_;
  std::vector<std::pair<int64_t, int>> magnitudes_;  // first, count
  int64_t parameters_ = 0;
  std::vector<int32_t> tokens_, targets_, offsets_{0}, index_;
  std::vector<float> weights_, given_, rope_;
};

void check_all() {
  const std::vector<Case> cases{
      {"llama", 70, 64, 96, 4, 2, 16, 8, 0, 0.0f, 0.0, false, {70, 1, 33}},
      {"odd sizes", 61, 30, 37, 3, 1, 10, 3, 0, 0.0f, 0.3, true, {17, 50}},
      {"window, softcap, rank 31", 300, 80, 130, 2, 2, 40, 31, 20, 2.0f, 0.0, true, {101}},
      {"heads of 80", 1700, 48, 50, 1, 1, 80, 16, 0, 0.0f, 0.5, false, {5, 64}},
      {"all weights", 1700, 64, 96, 4, 2, 16, 8, 0, 0.0f, 0.0, false, {70, 1, 33}, true},
      {"all weights, odd sizes", 61, 30, 37, 3, 1, 10, 8, 20, 2.0f, 0.0, false, {17, 50}, true}};
  for (const std::string& name : usable_kernels()) {
    const Kernels& k = *find_kernels(name);
    for (const bool backward : {false, true})
      for (const int m : {1, 15, 16, 31, 50})
        for (const auto& [in, out, rank] :
             {std::array{16, 16, 1}, std::array{40, 50, 8}, std::array{64, 96, 16},
              std::array{30, 37, 17}, std::array{200, 7, 33}})
          check_product(k, m, in, out, rank, backward);
    for (const Case& c : cases) {
      const Small model(c);
      const Outcome wanted = model.run(*find_kernels("scalar"), 1, 0);
      const Outcome got = model.run(k, 1, 0);
      const double bound = k.element == 4 ? kExact : kRounded;
      const double gradient = apart(got.gradient, wanted.gradient);
      const double log_probs = apart(got.log_probs, wanted.log_probs);
      std::printf("%-12s %-25s gradient %.1e log-probs %.1e\n", k.name, c.name, gradient,
                  log_probs);
      expect(gradient < bound && log_probs < bound, "too far from the float32 kernels");
      for (const auto& [threads, keep] : {std::pair{3, size_t{0}}, {2, size_t{1} << 30}}) {
        const Outcome again = model.run(k, threads, keep);
        expect(again.loss == got.loss && again.gradient == got.gradient &&
                   again.log_probs == got.log_probs,
               std::string(k.name) + " " + c.name + ": other bits");
      }
    }
  }
}

}  // namespace

}  // namespace localllm::train

int main() { localllm::train::check_all(); }
