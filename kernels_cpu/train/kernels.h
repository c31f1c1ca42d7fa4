// What a training step asks of an instruction set: a table of functions over plain arrays.
//
// "Elements" are what products multiply: float32, or bfloat16 where the processor has dot products
// of it; sums are float32 always. Rows come packed by `kernels.rows`, weights and right-hand sides
// by panels of kPanel columns. A step of a product takes 4 bytes of each: one float or two bfloats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/kernels.h"

namespace localllm::train {

constexpr int kPanel = 48;  // columns of a panel: three times sixteen lanes
constexpr int kBlock = 16;  // weights lie in blocks of 16 x 16

LOCALLLM_INLINE constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
LOCALLLM_INLINE constexpr int panels(int columns) { return (columns + kPanel - 1) / kPanel; }
LOCALLLM_INLINE constexpr int blocks(int n) { return (n + kBlock - 1) / kBlock; }

// kRowMajor: float32, row after row and not in blocks, as parameters lie.
enum class Codes { kBits4, kBits8, kBfloat16, kFloat16, kFloat32, kRowMajor };

// [rows, cols], block [row / 16][col / 16] after block; within one the rows are the lanes. Codes:
// word w of lane n holds columns 8 w … of row n (8 bits: 4 w …). Dense: column after column.
struct Matrix {
  int rows = 0, cols = 0;
  Codes codes = Codes::kFloat32;
  int group = 0;  // columns of a group, a multiple of 16
  const uint8_t* data = nullptr;
  const float* groups = nullptr;  // [row / 16][group]: 16 scales, 16 biases

  LOCALLLM_INLINE int col_blocks() const { return blocks(cols); }
  LOCALLLM_INLINE int row_groups() const { return (col_blocks() * kBlock + group - 1) / group; }
};

LOCALLLM_INLINE constexpr size_t block_bytes(Codes codes) {
  return codes == Codes::kBits4     ? 128
         : codes == Codes::kBits8   ? 256
         : codes == Codes::kFloat32 ? 1024
                                    : 512;
}

// Which entries of an adapter's input are kept; see `Noise` in localllm/train/program.py.
struct Dropout {
  uint32_t seed = 0;       // mix(seed_low ^ mix(seed_high ^ target))
  uint32_t threshold = 0;  // kept at or above; 0: everything is
  uint32_t first_row = 0;
  float scale = 1.0f;
};

// out [m, n] = alpha * (gain * (A W^T + A2 W2^T) + bias) + add, or with W in place of W^T when
// `backward`. With `slope` instead: out [n] += sum over m of slope * (A W^T + A2 W2^T) / lengths.
struct Product {
  const void* rows = nullptr;  // packed: `steps` steps
  int steps = 0;
  const void* low = nullptr;  // packed rows of the adapter's inner values
  int low_steps = 0, rank = 0;
  const float* factor = nullptr;  // entry (r, column) at r * factor_r + column * factor_c
  ptrdiff_t factor_r = 0, factor_c = 0;
  float factor_scale = 1.0f;

  const Matrix* weight = nullptr;
  bool backward = false;
  int first = 0, count = 0;  // backward: the weight's rows that are summed over; 16 divides first

  int m = 0, columns = 0;
  int column0 = 0;              // of the first of `out`
  const float* gain = nullptr;  // by column
  const float* bias = nullptr;
  float alpha = 1.0f;
  const void* slope = nullptr;  // elements [m, columns]
  const float* lengths = nullptr;
  const float* add = nullptr;  // laid out as `out`, may be `out`
  void* out = nullptr;
  int ld = 0;
  bool out_elements = false;
  Dropout dropout;  // of the product, before `add`
};

// The rank-sized product of an adapter, u = rows * panel.
struct LowRank {
  const void* rows = nullptr;
  int steps = 0;
  const void* panel = nullptr;  // by 16 columns of the rank
  int rank = 0, m = 0;
  void* packed = nullptr;      // as rows of a product
  void* transposed = nullptr;  // as packed rows of u^T, `column_steps(m)` steps
};

// grad(r, c) += scale * sum over m of u[m, r] * x[m, c].
struct Gradient {
  const void* transposed = nullptr;
  int rank = 0, m = 0;
  const void* x = nullptr;  // elements
  int ld = 0, columns = 0;
  float scale = 1.0f;
  float* out = nullptr;
  ptrdiff_t out_r = 0, out_c = 0;
};

// By column, what rows add to the gradients of a norm's gain and bias; null: not wanted.
struct NormSums {
  float *gain = nullptr, *bias = nullptr;
};

struct NormSpec {
  const float* weight = nullptr;
  const float* bias = nullptr;
  int n = 0;
  float eps = 0.0f;
  bool layer = false;
};

// Queries or keys of rows: normalized where `norm` has a weight, then rotated.
struct Heads {
  int heads = 0, head_dim = 0;
  NormSpec norm;
  bool norm_all = false;
  const float* table = nullptr;  // cos | sin of half entries each, a row of it for every row
  int half = 0;
  bool interleaved = false;
};

struct AttentionSpec {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f, softcap = 0.0f;
  int window = 0;
};

// One sequence in a batch: rows first … first + length; `padded` rows before it, each sequence
// rounded up to kPanel.
struct Sequence {
  int first = 0, length = 0, padded = 0;
};

// All [rows, heads * head_dim] of elements. Panels of a head: `lanes` with rows as the lanes,
// `sums` with rows as what is summed over. lse, dot: [heads][rows].
struct AttentionData {
  AttentionSpec spec;
  int rows = 0, padded = 0;
  const void *q = nullptr, *k = nullptr, *v = nullptr, *dout = nullptr;
  void* out = nullptr;
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  void *q_lanes = nullptr, *q_sums = nullptr, *k_lanes = nullptr, *k_sums = nullptr;
  void *v_lanes = nullptr, *v_sums = nullptr, *d_lanes = nullptr, *d_sums = nullptr;
  float *lse = nullptr, *dot = nullptr;
};

// The head's tile of some columns of the vocabulary, for packed rows.
struct HeadTile {
  const float* logits = nullptr;  // [m, width]
  int m = 0, width = 0, ld = 0, column0 = 0;
  const int32_t* targets = nullptr;
  float scale = 1.0f, softcap = 0.0f;
  float *top = nullptr, *sum = nullptr, *target = nullptr, *target_slope = nullptr;
  const float* weights = nullptr;  // of rows, for `head_slopes`
  void* probabilities = nullptr;   // row-major elements [m, width], or null
  float* dhidden = nullptr;        // [m, hidden], rescaled when a row's largest logit grows
  int hidden = 0;
};

struct Kernels {
  const char* name;
  int element;     // bytes
  int tile_rows;   // rows of a packed block
  int step_unit;   // divides the steps of every product
  int query_rows;  // rows of a unit of attention

  // Rows [block0, block1) blocks of `tile_rows` of row-major elements into packed rows.
  void (*pack_rows)(const void* x, int ld, int m, int cols, int block0, int block1, void* out);
  // Blocks of `tile_rows` columns of the same into packed rows of x^T, `column_steps(m)` steps.
  void (*pack_columns)(const void* x, int ld, int m, int cols, int block0, int block1, void* out);
  // out [n] += the sum over rows of columns [column0, column0 + n) of elements
  void (*add_columns)(const void* x, int ld, int m, int column0, int n, float* out);
  void (*to_elements)(const float* x, float scale, int ld, int cols, int row0, int row1, void* out,
                      int out_ld);
  void (*to_floats)(const void* x, int n, float* out);
  // x *= gain, by column.
  void (*scale_columns)(void* x, int cols, const float* gain, int row0, int row1);
  void (*drop)(const void* x, int ld, int cols, int row0, int row1, const Dropout& d, void* out);
  void (*norm)(const NormSpec& n, const float* x, int row0, int row1, void* out, int out_ld);
  // out = add + alpha * norm(x)
  void (*norm_add)(const NormSpec& n, const float* x, float alpha, const float* add, int row0,
                   int row1, float* out);
  // dx = (add: +=) gradient of norm at x, of alpha * dy
  void (*norm_back)(const NormSpec& n, const float* x, const float* dy, float alpha, bool add,
                    int row0, int row1, float* dx, NormSums sums);
  void (*heads)(const Heads& h, const void* x, int ld, int row0, int row1, void* out,
                float* scratch);
  void (*heads_back)(const Heads& h, const void* x, int ld, const float* dy, int row0, int row1,
                     void* dx, float* scratch, NormSums sums);
  void (*activate)(Activation a, const void* gate, const void* up, int ld, int n, int row0,
                   int row1, void* out);
  void (*activate_back)(Activation a, const void* gate, const void* up, const float* dy, int ld,
                        int n, int row0, int row1, void* dgate, void* dup);
  void (*weight_row)(const Matrix& w, int row, float* out);
  void (*factor_panel)(const float* factor, int rank, int n, ptrdiff_t r, ptrdiff_t c, float scale,
                       void* out);
  void (*low_rank)(const LowRank& job, int block0, int block1);
  void (*product)(const Product& job, int panel, int block0, int block1, void* scratch);
  void (*gradient)(const Gradient& job, int panel, void* scratch);
  void (*attend_pack)(const AttentionData& a, const Sequence& s, int head, bool backward);
  void (*attend)(const AttentionData& a, const Sequence& s, int head, int row, void* scratch);
  void (*attend_back_q)(const AttentionData& a, const Sequence& s, int head, int row,
                        void* scratch);
  void (*attend_back_kv)(const AttentionData& a, const Sequence& s, int kv_head, int row,
                         void* scratch);
  void (*head_tile)(const HeadTile& t, int row0, int row1);
  // Once `top` and `sum` are those of whole rows: the gradient at W h + b into `probabilities`.
  void (*head_slopes)(const HeadTile& t, int row0, int row1);

  LOCALLLM_INLINE int pair() const { return 4 / element; }
  LOCALLLM_INLINE int row_blocks(int m) const { return (m + tile_rows - 1) / tile_rows; }
  // Steps of a product over n entries, as the weights' blocks have them.
  LOCALLLM_INLINE int steps(int n) const { return round_up(n, kBlock) / pair(); }
  LOCALLLM_INLINE int column_steps(int m) const {
    return round_up((m + pair() - 1) / pair(), step_unit);
  }
  LOCALLLM_INLINE int low_steps(int rank) const { return column_steps(rank); }
  LOCALLLM_INLINE size_t column_bytes(int m, int cols) const {
    return static_cast<size_t>(round_up(cols, tile_rows)) * static_cast<size_t>(column_steps(m)) *
           4;
  }
  LOCALLLM_INLINE size_t packed_bytes(int m, int steps) const {
    return static_cast<size_t>(row_blocks(m)) * static_cast<size_t>(steps) *
               static_cast<size_t>(tile_rows) * 4 +
           64;
  }
};

}  // namespace localllm::train
