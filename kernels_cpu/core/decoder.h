// One step of a decoder: rows of any mix of sequences in, logits of the rows asked for out.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "core/adapter.h"
#include "core/experts.h"
#include "core/governor.h"
#include "core/kv.h"
#include "core/program.h"
#include "core/rows_buffer.h"
#include "core/state.h"
#include "core/threads.h"

namespace localllm {

// Consecutive rows of one sequence. Each KV group has a block table, covering positions
// 0 .. start + rows - 1; they stand one after the other, `table_size` entries each.
struct Chunk {
  int first_row = 0, rows = 0, start = 0;
  const int32_t* tables = nullptr;
  int table_size = 0;
  const Adapter* adapter = nullptr;  // one that fits the program; null: the base alone
  // Slots of recurrent layers' states: before the first row (-1: none yet), and after all rows but
  // the last `guesses`.
  int source = -1, target = -1, guesses = 0;

  const int32_t* table(int group) const {
    return tables + static_cast<ptrdiff_t>(group) * table_size;
  }
};

// cos [half] and sin [half] of row r stand at table + index[r] * 2 * half.
struct RopeRows {
  const float* table = nullptr;
  const int32_t* index = nullptr;
  int half = 0;
};

struct Step {
  int rows = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const float* embeddings = nullptr;  // [rows, hidden], instead of the tokens' own; or null
  std::vector<Chunk> chunks;
  std::vector<RopeRows> ropes;
  const int32_t* logit_rows = nullptr;
  int logits = 0;
  float* out = nullptr;     // [logits, vocab]
  float* hidden = nullptr;  // [rows, hidden], as they would enter the head; null: not wanted
};

struct AttendItem;

// Bytes of scratch one thread needs for a layer's attention.
size_t attention_scratch(const LayerConfig& c);

class Decoder {
 public:
  // expert_bytes: memory for the experts that the store leaves in its file; expert_uses: how often
  // each was chosen before (see ExpertCache).
  Decoder(std::shared_ptr<const WeightStore> store, const ModelConfig& config,
          const std::vector<LayerConfig>& layers, KvKind kv, int block,
          const std::vector<int>& blocks, int states, int threads, const Kernels& kernels,
          size_t expert_bytes = 0, const std::vector<float>& expert_uses = {});

  // The caller has checked every size. False when cancelled, or when `stop`, asked twice a layer
  // on the calling thread, says so; the cache then holds the step's rows only in part.
  bool forward(const Step& step, const std::function<bool()>& stop = {});
  // The head alone: logits [rows, vocab] of rows as they enter it, hidden [rows, hidden].
  void project(const float* hidden, int rows, float* out);
  // The same with another head, such as some rows of the model's: logits [rows, head.rows].
  void project(const float* hidden, int rows, const Matrix& head, float* out);
  // Rows of the embedding as the first layer takes them, out [rows, hidden].
  void embed_rows(const int32_t* tokens, int rows, float* out) const;
  void copy_block(int group, int32_t from, int32_t to);
  // Carries the state in slot `source` on over guesses [first, first + rows) of the last step, of
  // all chunks together, into slot `target`, maybe the same.
  void replay(int first, int rows, int source, int target);
  // Of the last step that was done, by chunk: the number of its first guess; then their total.
  const std::vector<int>& first_guess() const { return first_guess_; }
  // From any thread: the step under way stops within a layer.
  void cancel() { cancelled_ = true; }

  const Program& program() const { return program_; }
  const KvPool& kv() const { return kv_; }
  const StatePool& states() const { return states_of_sequences_; }
  int threads() const { return pool_.size(); }
  const char* kernels() const { return k_.name; }
  const Kernels& table() const { return k_; }
  // Null where all weights are in memory.
  const ExpertCache* expert_cache() const { return expert_cache_.get(); }

 private:
  struct Product {
    const Matrix* w;
    float* out;
    ptrdiff_t stride;
  };

  // The rows of a step that have the same adapter.
  struct AdapterRows {
    const Adapter* adapter;
    std::vector<int> rows;
  };

  bool run(const Step& step, const std::function<bool()>& stop);
  void reserve(const Step& step);
  void embed(const Step& step);
  void per_layer_inputs(const Step& step);
  void finish_layer(const Step& step, int index);
  void attention(const Step& step, int index);
  void write_rows(const Step& step, int index, int first, int last);
  void attend(const Step& step, int index);
  void attend_whole(const std::vector<AttendItem>& items, int index);
  void attend_in_parts(const Step& step, const std::vector<AttendItem>& items, int index);
  void finish_head(float* state, int index, int row, int head);
  void delta_net(const Step& step, int index);
  void short_conv(const Step& step, int index);
  void keep_guesses(const Step& step, int index);
  void carry_inputs(const Step& step, int index);
  void convolve_row(const Layer& layer, const FloatRows& rows, int first, int row,
                    const float* state, float* out);
  void run_heads(const Step& step, int index);
  void leave(const Step& step, int index);
  const float* state_at(int slot, int layer) const;
  static DeltaRow delta_row(const LayerConfig& c, const float* qkv, const float* gates, int head,
                            float* out);
  void feed_forward(const Step& step, int index);
  void mixture(const Step& step, int index);
  // What adapters add to linears of these experts; `slots` of rows sorted by expert.
  void adapt_experts(int layer, const std::vector<int>& experts, const std::vector<int>& slots,
                     const MatmulRows& in, std::initializer_list<Target> targets);
  // `add_delta` for a slot of an expert.
  void add_expert_delta(int layer, int expert, Target target, int slot, int first, int n,
                        float* y) const;
  // The step's rows of these experts through them.
  void run_experts(int index, const std::vector<int>& experts);
  void choose_experts(const Step& step, const Layer& layer);
  // The experts that row scores may choose from, by group: sets allowed_.
  void allow_groups(const LayerConfig& c, const float* choice);
  void shared_expert(const Step& step, const Layer& layer);
  void logits(const Step& step);
  void project_with(const float* hidden, int rows, const Matrix& head, const float* bias,
                    float* out);
  // Logits of the first `rows` of normed_; bias: of each logit, or null.
  void run_head(int rows, const Matrix& head, const float* bias, float* out);

  // Some rows that share an adapter's pair.
  struct AdapterItem {
    const AdapterPair* pair;
    const int* rows;
    int count;
    const FloatRows* out;
  };
  // Cuts rows into items that threads share.
  void add_items(const AdapterPair* pair, const int* rows, int count, Target target,
                 std::vector<AdapterItem>* items) const;
  void run_items(const MatmulRows& in, const std::vector<AdapterItem>& items);

  void group_adapters(const Step& step);
  // What the step's adapters add to some linears of one input. It stays until the linears of
  // another input are asked for.
  void adapt(int layer, const MatmulRows& in, std::initializer_list<Target> targets);
  const FloatRows& deltas_of(Target target) const;
  // y, entries [first, first + n) of a row's W x, with what its adapter makes of them, if anything.
  void add_delta(int layer, Target target, int row, int first, int n, float* y) const;

  // x += residual_scale * post(y + bias), where y is the sublayer's output.
  void add_residual(const Layer& layer, const Norm& post, const float* bias, int row);
  // Normalizes x into the matmul's input.
  void enter(const Norm& norm, const float* x, MatmulRows* to, int row);
  void quantize(MatmulRows* rows, int row, int width);
  // The products of one input, their panels shared out over the threads.
  void multiply(const Input& in, std::initializer_list<Product> products);
  void hidden_panels(const LayerConfig& c, const FeedForward& f, const Input& in, float* gate,
                     float* up, ptrdiff_t stride, int first, int last, void* scratch,
                     int adapted_layer = -1, int expert = -1, int first_slot = 0);
  int panel_grain(const Matrix& w, int panels, int rows) const;
  // f(row) for rows of about `width` floats each; small jobs stay on this thread.
  template <class F>
  void each_row(int rows, int width, F&& f) {
    const auto run = [&](int first, int last, int) {
      for (int r = first; r < last; ++r) f(r);
    };
    if (static_cast<int64_t>(rows) * width <= kInlineWork) return run(0, rows, 0);
    pool_.parallel(rows, std::max(1, std::min(32, rows / (4 * pool_.size()))), run);
  }

  // Floats of row work below which waking the other threads costs more than it saves.
  static constexpr int64_t kInlineWork = 16384;

  std::shared_ptr<const WeightStore> store_;
  Program program_;
  const Kernels& k_;
  KvPool kv_;
  StatePool states_of_sequences_;
  ThreadPool pool_;
  Governor governor_;
  std::mutex mutex_;
  std::atomic<bool> cancelled_{false};

  FloatRows x_, y_, up_;
  FloatRows own_, own_row_;  // every layer's own embeddings
  FloatRows q_, key_, value_;
  MatmulRows normed_, mixed_, inner_;
  std::vector<Scratch<uint8_t>> thread_scratch_;
  Scratch<float> states_;

  // Recurrent layers: what enters and leaves the convolution, beta and decay of each head, what
  // heads give, and z. guesses_: by layer, the inputs of rows that may be wrong.
  FloatRows conv_in_, conv_out_, gates_, delta_out_, z_;
  std::vector<FloatRows> guesses_;
  std::vector<int> first_guess_;
  int guessed_ = 0;
  std::vector<float> nothing_;

  FloatRows head_gate_;  // of attention

  // Adapters: rows by adapter, each row's own, and what they add. Linears of one input take
  // different ones of `deltas_`.
  std::vector<AdapterRows> adapter_rows_;
  std::vector<const Adapter*> row_adapter_, slot_adapter_;
  FloatRows deltas_[4];

  // Mixture of experts: rows sorted by expert.
  FloatRows router_, expert_out_, shared_weight_;
  MatmulRows expert_in_, expert_inner_;
  std::vector<int> chosen_, slot_of_, expert_start_;
  std::vector<float> chosen_weight_, choice_, group_score_;
  std::vector<char> allowed_;  // of each expert: whether it may still be chosen
  std::unique_ptr<ExpertCache> expert_cache_;
};

}  // namespace localllm
