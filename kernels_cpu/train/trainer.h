// Log-probabilities and gradients of a model, of its adapters or of all its weights, over sequences
// laid end to end.
//
// Sequences go in groups, one after the other. Of a group either everything its gradient needs is
// kept, or each layer's input alone, and the layer is computed once more. Threads share out blocks
// of rows, panels of columns and heads: whatever their number, every sum has one order.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/threads.h"
#include "train/workspace.h"

namespace localllm::train {

struct Rope {
  const float* table = nullptr;    // [entries, 2 half]: cos | sin
  const int32_t* index = nullptr;  // of each row
};

struct Batch {
  const int32_t *tokens = nullptr, *targets = nullptr, *offsets = nullptr;
  int sequences = 0;
  uint32_t first_row = 0;
  std::vector<Rope> ropes;
  uint64_t seed = 0;
  double dropout = 0.0, neftune = 0.0;
};

class Trainer {
 public:
  // keep_bytes: memory a group's kept values may take.
  Trainer(std::unique_ptr<Model> model, const Kernels& kernels, int threads, size_t keep_bytes);

  // parameters null: of the base, unless all weights are parameters. out: [rows].
  void log_probs(const Batch& batch, const float* parameters, float* out);
  // Adds to `gradient`; returns -sum(weights * log p).
  double gradients(const Batch& batch, const float* weights, const float* parameters,
                   float* gradient);
  // Of a step, or without gradients of log-probabilities alone.
  size_t working_bytes(const std::vector<int>& lengths, bool gradients) const;
  const Model& model() const { return *model_; }
  const Kernels& kernels() const { return k_; }
  int threads() const { return pool_.size(); }

 private:
  struct Group;
  struct Use;
  using RowWork = std::function<void(int row0, int row1, int thread)>;

  std::vector<Group> groups(const Batch& batch) const;
  size_t kept_row_bytes() const;
  size_t group_bytes(const Group& g, bool gradients) const;
  size_t prepared_bytes() const;
  bool keeps(int rows) const;
  int group_rows() const;

  size_t lengths_bytes() const;
  void prepare(const float* parameters);
  void lengths(size_t adapter, uint8_t* room);
  const float* gain(int adapter) const;  // null without DoRA
  Workspace begin(const Batch& batch, const Group& g, bool gradients);
  void embed(const Batch& batch, const Group& g, Workspace& w);
  void layer_forward(const Group& g, Workspace& w, int layer, bool output);
  void layer_backward(const Group& g, Workspace& w, int layer, float* gradient);
  void low_rank(const Group& g, Workspace& w, const void* x, const Linear& linear, size_t i,
                void* inner, int row0, int row1, int block0, int block1);
  Product product(const Group& g, Workspace& w, const Linear& linear, size_t i) const;
  void run(const std::vector<Product>& jobs, Workspace& w);
  void project(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
               const RowWork& prepare_rows);
  void magnitudes(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses,
                  float* gradient);
  void back(const Group& g, Workspace& w, const void* x, const std::vector<Use>& uses, float* dx,
            bool dx_elements, void* out, float* gradient);
  double head(const Batch& batch, const Group& g, Workspace& w, const float* weights,
              float* log_probs, float* gradient);
  Product head_logits(const Workspace& w, int m, int column0, int width) const;
  HeadTile head_part(const Workspace& w, int m, int column0, int width) const;
  Product head_back(const Workspace& w, int m, int first, int count) const;
  void head_whole(Workspace& w, int m, float* gradient);
  void panels_of(const Product& p, int first, int count, Workspace& w);
  void embed_back(const Batch& batch, const Group& g, Workspace& w, float* gradient);
  void linear_columns(const Group& g, Workspace& w, const std::vector<Use>& uses, float* gradient);
  void norm_back(const Norm& norm, const float* x, const float* dy, float alpha, bool add, int row0,
                 int row1, float* dx, float* sums);
  void heads_back(const TrainedLayer& l, bool query, const Workspace& w, const void* x,
                  const float* dy, int row0, int row1, void* dx, float* scratch, float* sums);
  void add_sums(const Norm& norm, int m, const float* sums, float* gradient);
  Dropout dropout(const Group& g, int adapter) const;
  void attention(const Group& g, Workspace& w, int layer, bool backward);
  template <class F>
  void rows(int m, const F& f);

  std::unique_ptr<Model> model_;
  const Kernels& k_;
  mutable ThreadPool pool_;
  size_t keep_bytes_;
  Scratch<uint8_t> memory_, prepared_;
  // Of the step at hand.
  const float* parameters_ = nullptr;
  std::vector<const void*> a_panels_, b_panels_;  // by adapter
  std::vector<float*> gains_, lengths_;           // by adapter, null without DoRA
};

}  // namespace localllm::train
