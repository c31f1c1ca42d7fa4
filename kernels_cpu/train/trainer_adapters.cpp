// What a step needs of its adapters' parameters: panels of both factors, DoRA's gains, dropout.
#include <cmath>

#include "train/trainer_parts.h"

namespace localllm::train {

namespace {

constexpr float kShortest = 1e-30f;  // squared length of a row

size_t vector_bytes(int n) { return (static_cast<size_t>(n) * 4 + 63) & ~size_t{63}; }

}  // namespace

// Room of a thread that computes lengths of rows.
size_t Trainer::lengths_bytes() const {
  size_t most = 0;
  for (size_t i = 0; i < model_->adapters.size(); ++i) {
    const Linear& l = *model_->adapted[i];
    const int rank = model_->adapters[i].rank;
    if (!l.squares) continue;
    const size_t elements = static_cast<size_t>(rank) * static_cast<size_t>(l.in) * 4;
    const size_t panel = static_cast<size_t>(k_.steps(l.in)) * kPanel * 4;
    const size_t cross = static_cast<size_t>(rank) * static_cast<size_t>(l.out) * 4;
    const size_t square = static_cast<size_t>(rank) * static_cast<size_t>(rank) * 8;
    most = std::max(
        most, elements + k_.packed_bytes(rank, k_.steps(l.in)) + panel + cross + square + 1024);
  }
  return (most + 63) & ~size_t{63};
}

size_t Trainer::prepared_bytes() const {
  size_t bytes = 0;
  for (size_t i = 0; i < model_->adapters.size(); ++i) {
    const Linear& l = *model_->adapted[i];
    const size_t rank = static_cast<size_t>(round_up(model_->adapters[i].rank, 16));
    bytes += rank * static_cast<size_t>(k_.steps(l.in) + k_.steps(l.out)) * 4;
    if (l.squares) bytes += 2 * vector_bytes(l.out);
  }
  return bytes + lengths_bytes() * static_cast<size_t>(pool_.size());
}

// Both factors of every adapter as panels, and with DoRA the gains, for this call's parameters; or
// where these are all weights, their places.
void Trainer::prepare(const float* parameters) {
  parameters_ = parameters;
  a_panels_.clear();
  b_panels_.clear();
  gains_.clear();
  lengths_.clear();
  if (!parameters) return;
  if (model_->whole) model_->store->use(parameters);
  uint8_t* at = prepared_.reserve(prepared_bytes());
  const auto take = [&](size_t bytes) {
    uint8_t* p = at;
    at += bytes;
    return p;
  };
  const int n = static_cast<int>(model_->adapters.size());
  for (size_t i = 0; i < model_->adapters.size(); ++i) {
    const Linear& l = *model_->adapted[i];
    const size_t rank = static_cast<size_t>(round_up(model_->adapters[i].rank, 16));
    a_panels_.push_back(take(rank * static_cast<size_t>(k_.steps(l.in)) * 4));
    b_panels_.push_back(take(rank * static_cast<size_t>(k_.steps(l.out)) * 4));
    for (auto* vectors : {&gains_, &lengths_})
      vectors->push_back(l.squares ? reinterpret_cast<float*>(take(vector_bytes(l.out))) : nullptr);
  }
  const size_t room = lengths_bytes();
  pool_.parallel(n, 1, [&](int first, int last, int thread) {
    for (int i = first; i < last; ++i) {
      const size_t index = static_cast<size_t>(i);
      const AdapterPlace& a = model_->adapters[index];
      const Linear& l = *model_->adapted[index];
      k_.factor_panel(parameters + a.a, a.rank, l.in, l.in, 1, 1.0f,
                      const_cast<void*>(a_panels_[index]));
      k_.factor_panel(parameters + a.b, a.rank, l.out, 1, a.rank, a.scale,
                      const_cast<void*>(b_panels_[index]));
      if (l.squares) lengths(index, at + room * static_cast<size_t>(thread));
    }
  });
}

// |w + s b A|^2 = |w|^2 + 2 s (W A^T) b + s^2 b (A A^T) b for every row w of W, b of B, so that the
// sum of [out, in] is never made. The gain is constant to the gradient, as the paper has it.
void Trainer::lengths(size_t adapter, uint8_t* room) {
  const AdapterPlace& place = model_->adapters[adapter];
  const Linear& l = *model_->adapted[adapter];
  const int rank = place.rank;
  const auto r = static_cast<size_t>(rank);
  Cutter cut(room);
  auto* elements =
      cut.take<uint8_t>(r * static_cast<size_t>(l.in) * static_cast<size_t>(k_.element));
  auto* packed = cut.take<uint8_t>(k_.packed_bytes(rank, k_.steps(l.in)));
  auto* panel = cut.take<uint8_t>(static_cast<size_t>(k_.steps(l.in)) * kPanel * 4);
  auto* cross = cut.take<float>(r * static_cast<size_t>(l.out));  // [rank, out]
  auto* square = cut.take<double>(r * r);
  const float *a = parameters_ + place.a, *b = parameters_ + place.b;
  k_.to_elements(a, 1.0f, l.in, l.in, 0, rank, elements, l.in);
  k_.pack_rows(elements, l.in, rank, l.in, 0, k_.row_blocks(rank), packed);
  Product p;
  p.rows = packed;
  p.steps = k_.steps(l.in);
  p.weight = l.weight;
  p.m = rank;
  p.columns = p.ld = l.out;
  p.out = cross;
  for (int i = 0; i < panels(l.out); ++i) k_.product(p, i, 0, k_.row_blocks(rank), panel);
  for (size_t i = 0; i < r; ++i)
    for (size_t j = 0; j <= i; ++j) {
      double sum = 0.0;
      for (int c = 0; c < l.in; ++c)
        sum += static_cast<double>(a[i * static_cast<size_t>(l.in) + static_cast<size_t>(c)]) *
               static_cast<double>(a[j * static_cast<size_t>(l.in) + static_cast<size_t>(c)]);
      square[i * r + j] = square[j * r + i] = sum;
    }
  const double scale = static_cast<double>(place.scale);
  for (size_t o = 0; o < static_cast<size_t>(l.out); ++o) {
    double mixed = 0.0, own = 0.0;
    for (size_t i = 0; i < r; ++i) {
      const double factor = static_cast<double>(b[o * r + i]);
      mixed += factor * static_cast<double>(cross[i * static_cast<size_t>(l.out) + o]);
      for (size_t j = 0; j < r; ++j)
        own += factor * static_cast<double>(b[o * r + j]) * square[i * r + j];
    }
    const double squared = static_cast<double>(l.squares[o]) + scale * (2.0 * mixed + scale * own);
    const float length = std::sqrt(std::max(static_cast<float>(squared), kShortest));
    lengths_[adapter][o] = length;
    gains_[adapter][o] = parameters_[place.magnitude + static_cast<int64_t>(o)] / length;
  }
}

const float* Trainer::gain(int adapter) const { return gains_[static_cast<size_t>(adapter)]; }

// With DoRA y = m / |w| * z for z = (W + s B A) x: adds the gradients of m, then makes those at z
// (`Use::out`, in place) of those at y. z is computed once more, as it was not kept.
void Trainer::magnitudes(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
                         float* gradient) {
  const auto scaled = [&](const Use& u) {
    return u.linear->adapter >= 0 && gain(u.linear->adapter) != nullptr;
  };
  if (std::none_of(uses.begin(), uses.end(), scaled)) return;
  const int m = g.rows, in = uses[0].linear->in;
  rows(m, [&](int row0, int row1, int block0, int block1, int) {
    k_.pack_rows(x, in, m, in, block0, block1, w.packed[0]);
    for (size_t i = 0; i < uses.size(); ++i)
      if (scaled(uses[i]))
        low_rank(g, w, x, *uses[i].linear, i, w.low_t[i], row0, row1, block0, block1);
  });
  std::vector<Product> jobs;
  for (size_t i = 0; i < uses.size(); ++i) {
    if (!scaled(uses[i])) continue;
    const size_t adapter = static_cast<size_t>(uses[i].linear->adapter);
    Product p = product(g, w, *uses[i].linear, i);
    p.slope = uses[i].out;
    p.lengths = lengths_[adapter];
    p.out = gradient + model_->adapters[adapter].magnitude;
    jobs.push_back(p);
  }
  run(jobs, w);
  rows(m, [&](int row0, int row1, int, int, int) {
    for (const Use& u : uses)
      if (scaled(u)) k_.scale_columns(u.out, u.linear->out, gain(u.linear->adapter), row0, row1);
  });
}

Dropout Trainer::dropout(const Group& g, int adapter) const {
  Dropout d;
  if (g.dropout <= 0.0) return d;
  d.seed = target_seed(g.seed, static_cast<uint32_t>(adapter));
  d.threshold = static_cast<uint32_t>(std::min(std::ceil(g.dropout * 4294967296.0), 4294967295.0));
  d.first_row = g.first_row;
  d.scale = static_cast<float>(1.0 / (1.0 - g.dropout));
  return d;
}

}  // namespace localllm::train
