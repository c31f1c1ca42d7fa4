// Linears with their adapters on rows, and back.
#include "train/trainer_parts.h"

namespace localllm::train {

// u = A x of one linear's adapter, from row-major and packed rows of x, into w.low[i] and `inner`.
void Trainer::low_rank(const Group& g, Workspace& w, const void* x, const Linear& linear, size_t i,
                       void* inner, int row0, int row1, int block0, int block1) {
  const size_t adapter = static_cast<size_t>(linear.adapter);
  const int m = g.rows, in = linear.in;
  const void* input = w.packed[0];
  const Dropout d = dropout(g, linear.adapter);
  if (d.threshold) {
    k_.drop(x, in, in, row0, row1, d, w.dropped);
    k_.pack_rows(w.dropped, in, m, in, block0, block1, w.dropped_packed);
    input = w.dropped_packed;
  }
  k_.low_rank(
      {input, k_.steps(in), a_panels_[adapter], model_->adapters[adapter].rank, m, w.low[i], inner},
      block0, block1);
}

// W x + s B u, from packed rows of x and u.
Product Trainer::product(const Group& g, Workspace& w, const Linear& linear, size_t i) const {
  Product p;
  p.rows = w.packed[0];
  p.steps = k_.steps(linear.in);
  p.weight = linear.weight;
  p.m = g.rows;
  p.columns = p.ld = linear.out;
  if (linear.adapter >= 0 && parameters_) {
    const AdapterPlace& a = model_->adapters[static_cast<size_t>(linear.adapter)];
    p.low = w.low[i];
    p.low_steps = k_.low_steps(a.rank);
    p.rank = a.rank;
    p.factor = parameters_ + a.b;
    p.factor_r = 1;
    p.factor_c = a.rank;
    p.factor_scale = a.scale;
  }
  return p;
}

// All panels of all products, shared out.
void Trainer::run(const std::vector<Product>& jobs, Workspace& w) {
  std::vector<int> ends;
  for (const Product& p : jobs)
    ends.push_back((ends.empty() ? 0 : ends.back()) + panels(p.columns));
  pool_.parallel(ends.empty() ? 0 : ends.back(), 1, [&](int first, int last, int thread) {
    for (int t = first; t < last; ++t) {
      size_t j = 0;
      while (t >= ends[j]) ++j;
      k_.product(jobs[j], t - (j ? ends[j - 1] : 0), 0, k_.row_blocks(jobs[j].m),
                 w.scratch[static_cast<size_t>(thread)]);
    }
  });
}

// Results of linears on the same rows x, which `prepare_rows` writes just before they are packed.
void Trainer::project(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
                      const RowWork& prepare_rows) {
  const int m = g.rows, in = uses[0].linear->in;
  rows(m, [&](int row0, int row1, int block0, int block1, int thread) {
    prepare_rows(row0, row1, thread);
    k_.pack_rows(x, in, m, in, block0, block1, w.packed[0]);
    for (size_t i = 0; i < uses.size(); ++i)
      if (uses[i].linear->adapter >= 0 && parameters_)
        low_rank(g, w, x, *uses[i].linear, i, uses[i].inner, row0, row1, block0, block1);
  });
  std::vector<Product> jobs;
  for (size_t i = 0; i < uses.size(); ++i) {
    const Use& u = uses[i];
    Product p = product(g, w, *u.linear, i);
    if (u.linear->adapter >= 0 && parameters_) p.gain = gain(u.linear->adapter);
    p.bias = u.linear->bias;
    p.alpha = u.alpha;
    p.add = u.add;
    p.out = u.out;
    p.out_elements = u.out_elements;
    jobs.push_back(p);
  }
  run(jobs, w);
}

// From gradients at the results of linears on x (`Use::out`, elements): the gradients of adapters
// or of the linears themselves, and the gradient at x into `dx` or as elements into `out` (neither:
// not wanted).
void Trainer::back(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
                   float* dx, bool dx_elements, void* out, float* gradient) {
  const int m = g.rows, in = uses[0].linear->in, row_blocks = k_.row_blocks(m);
  const bool wanted = dx || out;
  magnitudes(g, w, x, uses, gradient);
  if (model_->whole) linear_columns(g, w, uses, gradient);
  rows(m, [&](int, int, int block0, int block1, int) {
    for (size_t i = 0; i < uses.size(); ++i) {
      const Linear& l = *uses[i].linear;
      if (!wanted && l.adapter < 0) continue;
      k_.pack_rows(uses[i].out, l.out, m, l.out, block0, block1, w.packed[i]);
      if (l.adapter < 0) continue;
      k_.low_rank({w.packed[i], k_.steps(l.out), b_panels_[static_cast<size_t>(l.adapter)],
                   model_->adapters[static_cast<size_t>(l.adapter)].rank, m, w.low[i], w.low_t[i]},
                  block0, block1);
    }
  });

  std::vector<Product> chain;  // in this order on each panel
  std::vector<Gradient> gradients;
  const auto add_to_dx = [&](Product p) {
    p.m = m;
    p.columns = p.ld = in;
    p.add = chain.empty() ? nullptr : dx;
    p.out = dx;
    chain.push_back(p);
  };
  for (size_t i = 0; i < uses.size() && wanted; ++i) {
    const Linear& l = *uses[i].linear;
    Product p;
    p.rows = w.packed[i];
    p.steps = k_.steps(l.out);
    p.weight = l.weight;
    p.backward = true;
    p.count = l.out;
    Product low;
    if (l.adapter >= 0) {
      const AdapterPlace& a = model_->adapters[static_cast<size_t>(l.adapter)];
      low.low = w.low[i];
      low.low_steps = k_.low_steps(a.rank);
      low.rank = a.rank;
      low.factor = parameters_ + a.a;
      low.factor_r = in;
      low.factor_c = 1;
      low.dropout = dropout(g, l.adapter);
    }
    if (low.dropout.threshold) {
      add_to_dx(p);
      add_to_dx(low);
      continue;
    }
    p.low = low.low;
    p.low_steps = low.low_steps;
    p.rank = low.rank;
    p.factor = low.factor;
    p.factor_r = low.factor_r;
    p.factor_c = low.factor_c;
    add_to_dx(p);
  }
  if (!chain.empty() && dx_elements) {
    chain.back().out = out;
    chain.back().out_elements = true;
  }
  const bool dropping = g.dropout > 0.0;
  const auto input_gradient = [&](const Use& u, const void* from, size_t i) {
    const AdapterPlace& a = model_->adapters[static_cast<size_t>(u.linear->adapter)];
    return gradient_of(w.low_t[i], a.rank, m, from, in, gradient + a.a);
  };
  for (size_t i = 0; i < uses.size(); ++i) {
    const Linear& l = *uses[i].linear;
    if (l.at >= 0) gradients.push_back(gradient_of(w.columns[i], l.out, m, x, in, gradient + l.at));
    if (l.adapter < 0) continue;
    const AdapterPlace& a = model_->adapters[static_cast<size_t>(l.adapter)];
    Gradient j;
    j.transposed = uses[i].inner;
    j.rank = a.rank;
    j.m = m;
    j.x = uses[i].out;
    j.ld = j.columns = l.out;
    j.scale = a.scale;
    j.out = gradient + a.b;
    j.out_r = 1;
    j.out_c = a.rank;
    gradients.push_back(j);
    if (!dropping) gradients.push_back(input_gradient(uses[i], x, i));
  }
  const int dx_tasks = chain.empty() ? 0 : panels(in);
  std::vector<int> ends;
  int tasks = dx_tasks;
  for (const Gradient& j : gradients) ends.push_back(tasks += panels(j.columns));
  pool_.parallel(tasks, 1, [&](int first, int last, int thread) {
    void* scratch = w.scratch[static_cast<size_t>(thread)];
    for (int t = first; t < last; ++t) {
      if (t < dx_tasks) {
        for (const Product& p : chain) k_.product(p, t, 0, row_blocks, scratch);
        continue;
      }
      size_t j = 0;
      while (t >= ends[j]) ++j;
      k_.gradient(gradients[j], t - (j ? ends[j - 1] : dx_tasks), scratch);
    }
  });
  // With dropout each adapter has an input of its own.
  for (size_t i = 0; i < uses.size() && dropping; ++i) {
    const int adapter = uses[i].linear->adapter;
    if (adapter < 0) continue;
    rows(m, [&](int row0, int row1, int, int, int) {
      k_.drop(x, in, in, row0, row1, dropout(g, adapter), w.dropped);
    });
    const Gradient j = input_gradient(uses[i], w.dropped, i);
    pool_.parallel(panels(in), 1, [&](int first, int last, int thread) {
      for (int t = first; t < last; ++t) k_.gradient(j, t, w.scratch[static_cast<size_t>(thread)]);
    });
  }
}

}  // namespace localllm::train
