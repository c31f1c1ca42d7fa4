// The table of functions each instruction set provides, and the plain views they work on.
//
// One arithmetic: every float in every result is defined by a fixed sequence of correctly rounded
// float32 operations (simd/*.h), so all tables return the same bits for the same input.
#pragma once

#include <cstddef>
#include <cstdint>

// For functions in headers that files of several instruction sets share: not even a debug build
// emits them on their own, so none compiled for one set can be linked into another's file.
#define LOCALLLM_INLINE inline __attribute__((always_inline))

namespace localllm {

constexpr int kLanes = 16;        // rows in a weight panel, lanes in a virtual vector
constexpr int kGroup = 32;        // activations quantized together; inputs in a code block
constexpr int kStep = 32;         // tokens in an attention step
constexpr int kPart = 512;        // tokens in an attention part
constexpr int kSampleBlock = 64;  // logits that the sampler takes or skips together
constexpr int kPanelBlock = 512;  // bytes of an unpacked code block: 32 inputs x 16 rows
constexpr int kAdapterRanks = 4;  // ranks of an adapter's A that are summed side by side

enum class WeightKind : int32_t { kFloat32, kFloat16, kBfloat16, kQ4, kQ5, kQ6, kQ8 };
// kClampedSwiglu takes the gate and up together (gpt-oss).
enum class Activation : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kClampedSwiglu, kSigmoid };

// One float per weight group and row: values, optionally times small integers (K-quants).
struct GroupTable {
  bool present = false;
  bool half = false;         // values are float16, else float32
  int multiplier = 0;        // 0 none, 1 uint8, -1 int8
  int groups_per_value = 1;  // > 1 only with a multiplier
  size_t values_at = 0;      // offsets inside a record
  size_t multipliers_at = 0;
};

// A packed matrix [rows, cols]: panels of 16 rows, each read from first byte to last. A dense
// panel holds [cols][16] values. A quantized one holds records: the group tables of some inputs,
// then their code blocks, 32 inputs each. In a block the codes of inputs 4v..4v+3 of row l stand in
// dword l of vector v (see pack.cpp), so that a byte dot product against four broadcast
// activations needs no horizontal sum.
//   weight = scale * (code + offset) + bias
struct Matrix {
  int rows = 0, cols = 0;
  WeightKind kind = WeightKind::kFloat32;
  int group = 0;   // inputs sharing a scale: 16, or a multiple of 32
  int offset = 0;  // added to every stored code
  GroupTable scales, biases;
  int record_blocks = 0;    // code blocks in a record; the last record of a panel may have fewer
  size_t codes_at = 0;      // offset of the codes inside a record
  size_t record_bytes = 0;  // from one record to the next
  size_t panel_bytes = 0;
  const uint8_t* data = nullptr;

  LOCALLLM_INLINE bool quantized() const { return kind >= WeightKind::kQ4; }
  LOCALLLM_INLINE int panels() const { return (rows + kLanes - 1) / kLanes; }
  LOCALLLM_INLINE int blocks() const { return (cols + kGroup - 1) / kGroup; }
  LOCALLLM_INLINE const uint8_t* panel(int i) const {
    return data + static_cast<size_t>(i) * panel_bytes;
  }
  // Entries of a group table for so many blocks.
  LOCALLLM_INLINE int groups_in(int blocks) const { return blocks * kGroup / group; }
};

// What a matmul needs to know of 32 quantized activations x = scale * q.
struct GroupInfo {
  float scale;          // largest magnitude / 127
  float sum_x;          // scale * sum_q
  float half_sum_x[2];  // the same for inputs 0-15 and 16-31
  int32_t sum_q;
  int32_t half_sum_q[2];
  int32_t unused;
};

// Rows entering a matmul. `q` is null when activations stay in float32.
struct Input {
  int rows = 0;
  const float* x = nullptr;
  ptrdiff_t x_stride = 0;
  const int8_t* q = nullptr;
  ptrdiff_t q_stride = 0;
  const GroupInfo* info = nullptr;
  ptrdiff_t info_stride = 0;
};

// One side of a low-rank adapter, in float32, float16 or bfloat16. Zeros fill up lanes and ranks.
//   A [rank, size]: panels of 4 ranks, each [size / 16][4][16]
//   B [size, rank]: panels of 16 outputs, each [rank][16]
struct AdapterMatrix {
  WeightKind kind = WeightKind::kFloat32;
  int rank = 0, size = 0;
  const uint8_t* data = nullptr;
};

// How far ahead of a tile that reads packed weights from memory they are asked for, in bytes; 0:
// not at all. LOCALLLM_STREAM_AHEAD in the environment goes before what is known of the processor
// (core/cpu_features.cpp).
ptrdiff_t stream_ahead();

struct NormParams {
  const float* gain;  // offset already added
  const float* bias;  // or null
  float eps;
  bool layer;  // LayerNorm, else RMSNorm
};

enum class KvKind : int32_t { kFloat32, kFloat16, kInt8, kInt4 };

// How the cache lies in memory. A block holds tiles of `tile` tokens, a tile one piece for each kv
// head, a piece records of 32 entries of the head: those of K, then those of V. Attention reads a
// block from its first byte to its last, which is what the hardware's prefetcher likes.
//   record of K: [float16 scales [tile] when quantized] codes [entry][tile]
//   record of V: [float16 scales [tile] when quantized] codes [tile][32]
// 4-bit codes go two to a byte, of one token: in K entries 2i and 2i + 1 (low nibble first), in V
// entries i and i + 16.
struct KvLayout {
  KvKind kind = KvKind::kFloat16;
  int block = 32;  // tokens in a block
  int tile = 32;   // kStep where that divides the block, else the block
  int head_dim = 0;
  int padded_dim = 0;  // head_dim rounded up to 32
  size_t record_bytes = 0;
  size_t values_at = 0;  // of the first record of V inside a piece
  size_t piece_bytes = 0;

  LOCALLLM_INLINE bool quantized() const { return kind == KvKind::kInt8 || kind == KvKind::kInt4; }
  LOCALLLM_INLINE size_t scale_bytes() const {
    return quantized() ? 2 * static_cast<size_t>(tile) : 0;
  }
  // Heads are rotated, so that their entries are alike before few bits round them. Scores stay the
  // same when queries turn with the keys; what comes of the values is turned back.
  LOCALLLM_INLINE bool rotated() const { return quantized(); }
};

// The cache of one sequence and layer, from one kv head on: that head's piece of token t's tile is
// at base + table[t / block] * block_stride + t % block / tile * tile_stride, the next head's
// piece_bytes further.
struct KvHead {
  const KvLayout* layout;
  const uint8_t* base;
  size_t block_stride, tile_stride;
  const int32_t* table;
  LOCALLLM_INLINE const uint8_t* piece(int token) const {
    return base + static_cast<size_t>(table[token / layout->block]) * block_stride +
           static_cast<size_t>(token % layout->block / layout->tile) * tile_stride;
  }
};

// Softmax state of one row: 16 partial sums, the maximum, the weighted sum of values.
struct AttentionState {
  static constexpr int kMaxAt = 16, kOutAt = 32;
  LOCALLLM_INLINE static constexpr int size(int padded_dim) { return kOutAt + padded_dim; }
};

struct AttentionRow {
  const float* q;  // [head_dim], scaled
  float* state;
  int position;
};

struct AttentionParams {
  int window = 0;        // 0: none
  float softcap = 0.0f;  // 0: none. Scores are then multiplied by log2(e) afterwards.
};

// One token of one head of a gated delta net; out [values].
struct DeltaRow {
  const float *q, *k, *v;
  float beta, decay;
  float* out;
};

struct Kernels {
  const char* name;

  void (*norm)(const float* x, int n, const NormParams& p, float* out);
  // x [n] -> q [n rounded up to 32] and one GroupInfo per 32. A group holding NaN or infinity
  // becomes scale NaN, q 0.
  void (*quantize)(const float* x, int n, int8_t* q, GroupInfo* info);
  void (*add_scaled)(const float* y, int n, float scale, float* x);  // x = fma(y, scale, x)
  void (*scale)(float* x, int n, float scale);
  // out = act(gate) * up, or act(gate) when up is null. Biases may be null.
  void (*activate)(Activation kind, const float* gate, const float* up, int n, float* out);
  // Rotates pairs (i, half + i): x [2 * half].
  void (*rope)(const float* cos, const float* sin, int half, float* x);
  void (*softmax)(float* x, int n);
  // x = x * scale, then softcap; NaN becomes the one quiet NaN.
  void (*finish_logits)(float* x, int n, float scale, float softcap);

  // out[row * stride + r] for the matrix rows r of panels [first, last).
  // scratch: at least matmul_scratch(matrix) bytes, 64-byte aligned.
  void (*matmul)(const Matrix& w, const Input& in, float* out, ptrdiff_t stride, int first,
                 int last, void* scratch);

  // Entries of one token into its piece; `slot` is the token's place in the tile.
  void (*write_kv)(const KvLayout& layout, uint8_t* piece, int slot, const float* k,
                   const float* v);
  void (*reset_state)(float* state, int padded_dim);
  // Rows of `heads` neighbouring kv heads over the tokens of part `part`: [heads][count], each
  // head's ordered by position, and the same positions for every head.
  // scratch: attend_scratch(padded_dim) floats.
  void (*attend)(const KvHead& kv, const AttentionParams& p, const AttentionRow* rows, int count,
                 int heads, int part, float* scratch);
  void (*merge_state)(float* into, const float* from, int padded_dim);
  void (*finish_state)(const float* state, int head_dim, float* out);
  // Normalized Walsh-Hadamard transform, in place, over runs of the largest power of two in n, at
  // most 256.
  void (*rotate)(float* x, int n);

  // Maxima of runs of kSampleBlock logits into out; returns the maximum of all, NaN if any is NaN.
  float (*block_max)(const float* x, int n, float* out);
  // Sum of 2^((x - from) * factor) over the x below a limit, to a relative 1e-5; for no x > from.
  double (*exp_sum_below)(const float* x, int n, float below, float from, float factor);
  // Philox4x32-10 of kSampleBlock / 4 counters (first + i, position, 0, 0): word w of counter i at
  // words[w * kSampleBlock / 4 + i]. Returns the largest word.
  uint64_t (*noise_words)(uint32_t first, uint32_t position, uint64_t seed, uint64_t* words);
  // out[i * stride + j] = scale * (A x[i])[j]; `stride` has room for the ranks rounded up to 4.
  void (*adapter_down)(const AdapterMatrix& a, float scale, const float* const* x, int rows,
                       float* out, ptrdiff_t stride);
  // out[i] = B t[i * stride], with room for the outputs rounded up to 16.
  void (*adapter_up)(const AdapterMatrix& b, const float* t, ptrdiff_t stride, float* const* out,
                     int rows);

  void (*gate)(const float* g, int n, float* x);  // x *= sigmoid(g)
  void (*product)(const float* a, const float* b, int n, float* out);
  // out = sum of inputs[k] * taps[k], taps [kernel][n], and bias, or null; then SiLU if asked for.
  void (*convolve)(const float* const* inputs, const float* taps, int kernel, const float* bias,
                   int n, bool silu, float* out);
  void (*unit)(float* x, int n, float factor);  // x *= factor / |x|
  // beta = sigmoid(beta), decay = exp(rate * softplus(decay + step)); rate is below 0.
  void (*delta_gates)(const float* rate, const float* step, int heads, float* beta, float* decay);
  // S [keys][values] in `from`: `to` = decay * S + outer(k, beta * (v - decay * k S)), which may be
  // `from`; out = q times that.
  void (*delta_rule)(const DeltaRow& row, int keys, int values, const float* from, float* to);
};

constexpr size_t kTileScratch = size_t{32} << 10;  // what AMX keeps beside its panels

// Floats of scratch that `attend` needs: a step of keys and values, with their scales.
LOCALLLM_INLINE constexpr size_t attend_scratch(int padded_dim) {
  return 2 * (static_cast<size_t>(padded_dim) * kStep + static_cast<size_t>(padded_dim)) + 16;
}

// Bytes of scratch one thread needs for a matmul with w.
LOCALLLM_INLINE size_t matmul_scratch(const Matrix& w) {
  const auto blocks = static_cast<size_t>(w.blocks());
  // Group tables of two panels, each with scales and biases.
  const size_t entries = 2 * (blocks + static_cast<size_t>(w.record_blocks));
  const size_t tables = 2 * 2 * entries * kLanes * sizeof(float);
  // One panel in float32, or the codes of two.
  const size_t panel = blocks * kGroup * kLanes * sizeof(float);
  return tables + panel + kTileScratch + 512;
}

}  // namespace localllm
