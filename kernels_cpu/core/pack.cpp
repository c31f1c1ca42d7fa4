#include "core/pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace localllm {

namespace {

size_t align64(size_t n) { return (n + 63) / 64 * 64; }

int stored_bits(WeightKind kind) {
  switch (kind) {
    case WeightKind::kQ4: return 4;
    case WeightKind::kQ5: return 5;
    case WeightKind::kQ6: return 6;
    default: return 8;
  }
}

// Narrower codes are widened, which changes no value.
WeightKind kind_for(int bits) {
  if (bits <= 4) return WeightKind::kQ4;
  if (bits == 5) return WeightKind::kQ5;
  if (bits == 6) return WeightKind::kQ6;
  return WeightKind::kQ8;
}

template <int BITS>
int code_in_stream(const uint32_t* words, int c) {
  const int64_t at = static_cast<int64_t>(c) * BITS;
  const uint32_t* word = words + at / 32;
  const int shift = static_cast<int>(at % 32);
  uint64_t two = word[0];
  if (32 % BITS != 0 && shift + BITS > 32) two |= static_cast<uint64_t>(word[1]) << 32;
  return static_cast<int>(two >> shift) & ((1 << BITS) - 1);
}

// Input k of a block, row l of the panel: dword l of vector k / 4, byte k % 4. 4-bit codes of
// vectors 2i and 2i+1 share bytes; 5- and 6-bit codes keep their high bits behind the nibbles.
template <int STORED>
void put_code(uint8_t* block, int l, int k, int code) {
  const int v = k / 4, byte = l * 4 + k % 4;
  if (STORED == 8) {
    block[v * 64 + byte] = static_cast<uint8_t>(code ^ 0x80);  // as signed: code - 128
    return;
  }
  block[v / 2 * 64 + byte] |= static_cast<uint8_t>((code & 15) << (4 * (v & 1)));
  if (STORED == 5) block[256 + byte] |= static_cast<uint8_t>((code >> 4) << v);
  if (STORED == 6)
    block[256 + v / 4 * 64 + byte] |= static_cast<uint8_t>((code >> 4) << (2 * (v % 4)));
}

size_t block_bytes(const Matrix& w) { return static_cast<size_t>(stored_bits(w.kind)) * 64; }
size_t block_at(const Matrix& w, int b);

// One row's codes into the blocks of its panel.
template <int BITS>
void pack_row(const uint32_t* stream, const Matrix& w, int l, uint8_t* panel) {
  constexpr int stored = BITS < 4 ? 4 : BITS;
  for (int first = 0; first < w.cols; first += kGroup) {
    uint8_t* block = panel + block_at(w, first / kGroup);
    const int n = w.cols - first < kGroup ? w.cols - first : kGroup;
    for (int k = 0; k < n; ++k)
      put_code<stored>(block, l, k, code_in_stream<BITS>(stream, first + k));
  }
}

using PackRow = void (*)(const uint32_t*, const Matrix&, int, uint8_t*);
PackRow row_packer(int bits) {
  switch (bits) {
    case 2: return pack_row<2>;
    case 3: return pack_row<3>;
    case 4: return pack_row<4>;
    case 5: return pack_row<5>;
    case 6: return pack_row<6>;
    default: return pack_row<8>;
  }
}

int get_code(const uint8_t* block, int bits, int l, int k) {
  const int v = k / 4, byte = l * 4 + k % 4;
  if (bits == 8) return static_cast<int8_t>(block[v * 64 + byte]);
  int code = block[v / 2 * 64 + byte] >> (4 * (v & 1)) & 15;
  if (bits == 5) code |= (block[256 + byte] >> v & 1) << 4;
  if (bits == 6) code |= (block[256 + v / 4 * 64 + byte] >> (2 * (v % 4)) & 3) << 4;
  return code;
}

void place_table(const GroupSource& s, GroupTable* t) {
  t->present = s.values != nullptr;
  if (!t->present) return;
  t->half = s.half;
  t->multiplier = s.multipliers == nullptr ? 0 : s.signed_multipliers ? -1 : 1;
  t->groups_per_value = s.groups_per_row / s.values_per_row;
}

size_t value_bytes(const GroupTable& t, int groups) {
  return static_cast<size_t>(groups / t.groups_per_value) * kLanes * (t.half ? 2 : 4);
}

// Lays out a record of so many blocks.
void place_record(Matrix* w, int blocks) {
  const int groups = w->groups_in(blocks);
  size_t at = 0;
  for (GroupTable* t : {&w->scales, &w->biases}) {
    if (!t->present) continue;
    t->values_at = at;
    at += value_bytes(*t, groups);
    t->multipliers_at = at;
    if (t->multiplier) at += static_cast<size_t>(groups) * kLanes;
  }
  w->record_blocks = blocks;
  w->codes_at = align64(at);
  w->record_bytes = w->codes_at + block_bytes(*w) * static_cast<size_t>(blocks);
}

// The fewest blocks that hold whole groups and values, doubled while padding costs over 2 %.
void choose_record(Matrix* w) {
  const auto whole = [&](int blocks) {
    const int groups = w->groups_in(blocks);
    return blocks * kGroup % w->group == 0 && groups % w->scales.groups_per_value == 0 &&
           groups % w->biases.groups_per_value == 0;
  };
  int blocks = 1;
  while (!whole(blocks)) ++blocks;
  place_record(w, blocks);
  const auto padding = [&] {
    const GroupTable& last = w->biases.present ? w->biases : w->scales;
    const int groups = w->groups_in(w->record_blocks);
    const size_t used = last.multiplier ? last.multipliers_at + static_cast<size_t>(groups) * kLanes
                                        : last.values_at + value_bytes(last, groups);
    return w->codes_at - used;
  };
  for (; 50 * padding() > w->record_bytes && blocks < 8; place_record(w, blocks)) blocks *= 2;
}

size_t panel_bytes_of(const Matrix& w) {
  const int records = (w.blocks() + w.record_blocks - 1) / w.record_blocks;
  const int tail = w.blocks() - (records - 1) * w.record_blocks;
  return static_cast<size_t>(records - 1) * w.record_bytes + w.codes_at +
         static_cast<size_t>(tail) * block_bytes(w);
}

// Where group g and block b of a panel lie.
size_t record_of_group(const Matrix& w, int g) {
  return static_cast<size_t>(g / w.groups_in(w.record_blocks)) * w.record_bytes;
}
size_t block_at(const Matrix& w, int b) {
  return static_cast<size_t>(b / w.record_blocks) * w.record_bytes + w.codes_at +
         static_cast<size_t>(b % w.record_blocks) * block_bytes(w);
}

void pack_table(const GroupSource& s, const GroupTable& t, const Matrix& w, int row,
                uint8_t* panel) {
  if (!t.present) return;
  const size_t width = s.half ? 2 : 4, l = static_cast<size_t>(row % kLanes);
  const int in_record = w.groups_in(w.record_blocks);
  const auto* values = static_cast<const uint8_t*>(s.values);
  const auto* multipliers = static_cast<const uint8_t*>(s.multipliers);
  for (int g = 0; g < s.groups_per_row; ++g) {
    uint8_t* record = panel + record_of_group(w, g);
    const int inside = g % in_record;
    const auto value = static_cast<size_t>(inside / t.groups_per_value);
    if (inside % t.groups_per_value == 0)
      std::memcpy(
          record + t.values_at + (value * kLanes + l) * width,
          values + (static_cast<size_t>(row) * s.values_per_row + g / t.groups_per_value) * width,
          width);
    if (t.multiplier)
      record[t.multipliers_at + static_cast<size_t>(inside) * kLanes + l] =
          multipliers[static_cast<size_t>(row) * s.groups_per_row + g];
  }
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
  float f;
  uint32_t u = sign | 0x7f800000 | mantissa << 13;
  if (exponent == 0) {
    f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, sizeof(u));
    u |= sign;
  } else if (exponent != 31) {
    u = sign | (exponent + 112) << 23 | mantissa << 13;
  }
  std::memcpy(&f, &u, sizeof(f));
  return f;
}

float bfloat_to_float(uint16_t b) {
  const uint32_t u = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}

float table_value(const Matrix& w, const GroupTable& t, const uint8_t* panel, int g, int l) {
  const uint8_t* record = panel + record_of_group(w, g);
  const int inside = g % w.groups_in(w.record_blocks);
  const size_t at = static_cast<size_t>(inside / t.groups_per_value) * kLanes + l;
  float value;
  if (t.half) {
    uint16_t half;
    std::memcpy(&half, record + t.values_at + at * 2, 2);
    value = half_to_float(half);
  } else {
    std::memcpy(&value, record + t.values_at + at * 4, 4);
  }
  if (!t.multiplier) return value;
  const uint8_t m = record[t.multipliers_at + static_cast<size_t>(inside) * kLanes + l];
  return value *
         (t.multiplier > 0 ? static_cast<float>(m) : static_cast<float>(static_cast<int8_t>(m)));
}

void check(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

void check_groups(const GroupSource& s, int groups) {
  check(s.groups_per_row == groups, "group values do not cover the row");
  check(s.values_per_row > 0 && s.groups_per_row % s.values_per_row == 0,
        "groups do not divide evenly over their values");
  check(s.multipliers != nullptr || s.values_per_row == s.groups_per_row,
        "groups without multipliers need a value each");
}

}  // namespace

Matrix pack_affine(const AffineSource& source, Arena& arena) {
  const AffineSource& s = source;
  check(s.rows > 0 && s.cols > 0, "empty matrix");
  check((s.bits >= 2 && s.bits <= 6) || s.bits == 8, "codes must have 2, 3, 4, 5, 6 or 8 bits");
  check(s.group == 16 || (s.group > 0 && s.group % kGroup == 0),
        "the group must be 16 or a multiple of 32");
  check(s.cols % s.group == 0, "rows must hold whole groups");
  check(s.zero_point >= -256 && s.zero_point <= 256, "zero point out of range");
  check(s.scales.values != nullptr, "scales are missing");
  check_groups(s.scales, s.cols / s.group);
  if (s.biases.values) check_groups(s.biases, s.cols / s.group);

  Matrix w;
  w.rows = s.rows;
  w.cols = s.cols;
  w.kind = kind_for(s.bits);
  w.group = s.group;
  w.offset = (w.kind == WeightKind::kQ8 ? 128 : 0) - s.zero_point;
  place_table(s.scales, &w.scales);
  place_table(s.biases, &w.biases);
  choose_record(&w);
  w.panel_bytes = panel_bytes_of(w);
  uint8_t* data = arena.allocate(w.panel_bytes * static_cast<size_t>(w.panels()));
  w.data = data;

  const PackRow pack_row = row_packer(s.bits);
  const size_t words = (static_cast<size_t>(s.cols) * s.bits + 31) / 32;
  for (int row = 0; row < s.rows; ++row) {
    uint8_t* panel = data + static_cast<size_t>(row / kLanes) * w.panel_bytes;
    const int l = row % kLanes;
    pack_table(s.scales, w.scales, w, row, panel);
    pack_table(s.biases, w.biases, w, row, panel);
    pack_row(s.codes + static_cast<size_t>(row) * words, w, l, panel);
  }
  return w;
}

size_t panel_bytes_needed(const Matrix& w) {
  constexpr size_t never = ~size_t{0};
  const auto cols = static_cast<size_t>(w.cols);
  if (!w.quantized()) return cols * kLanes * (w.kind == WeightKind::kFloat32 ? 4 : 2);
  if (w.group != 16 && (w.group <= 0 || w.group % kGroup)) return never;
  if (w.cols % w.group) return never;
  if (w.record_blocks <= 0 || w.record_blocks > 2 * w.blocks() + 16) return never;
  if (w.codes_at > w.panel_bytes) return never;
  const int groups = w.groups_in(w.record_blocks);
  if (groups <= 0 || w.record_blocks * kGroup % w.group || !w.scales.present) return never;
  for (const GroupTable* t : {&w.scales, &w.biases}) {
    if (!t->present) continue;
    if (t->groups_per_value <= 0 || groups % t->groups_per_value) return never;
    const auto inside = [&](size_t at, size_t bytes) {
      return bytes <= w.codes_at && at <= w.codes_at - bytes;
    };
    if (!inside(t->values_at, value_bytes(*t, groups))) return never;
    if (t->multiplier && !inside(t->multipliers_at, static_cast<size_t>(groups) * kLanes))
      return never;
  }
  const size_t record = w.codes_at + block_bytes(w) * static_cast<size_t>(w.record_blocks);
  return w.record_bytes == record ? panel_bytes_of(w) : never;
}

Matrix pack_dense(const void* values, WeightKind kind, int rows, int cols, Arena& arena) {
  check(rows > 0 && cols > 0, "empty matrix");
  check(kind <= WeightKind::kBfloat16, "not a dense kind");
  const size_t width = kind == WeightKind::kFloat32 ? 4 : 2;
  Matrix w;
  w.rows = rows;
  w.cols = cols;
  w.kind = kind;
  w.panel_bytes = align64(static_cast<size_t>(cols) * kLanes * width);
  uint8_t* data = arena.allocate(w.panel_bytes * static_cast<size_t>(w.panels()));
  w.data = data;
  const auto* from = static_cast<const uint8_t*>(values);
  for (int row = 0; row < rows; ++row) {
    uint8_t* panel = data + static_cast<size_t>(row / kLanes) * w.panel_bytes;
    for (int c = 0; c < cols; ++c)
      std::memcpy(panel + (static_cast<size_t>(c) * kLanes + row % kLanes) * width,
                  from + (static_cast<size_t>(row) * cols + c) * width, width);
  }
  return w;
}

void read_row(const Matrix& w, int row, float* out) {
  const uint8_t* panel = w.data + static_cast<size_t>(row / kLanes) * w.panel_bytes;
  const int l = row % kLanes;
  if (!w.quantized()) {
    const size_t width = w.kind == WeightKind::kFloat32 ? 4 : 2;
    for (int c = 0; c < w.cols; ++c) {
      const uint8_t* p = panel + (static_cast<size_t>(c) * kLanes + l) * width;
      uint16_t two;
      if (w.kind == WeightKind::kFloat32) {
        std::memcpy(out + c, p, 4);
        continue;
      }
      std::memcpy(&two, p, 2);
      out[c] = w.kind == WeightKind::kFloat16 ? half_to_float(two) : bfloat_to_float(two);
    }
    return;
  }
  const int bits = stored_bits(w.kind);
  for (int g = 0; g * w.group < w.cols; ++g) {
    const float scale = table_value(w, w.scales, panel, g, l);
    const float bias = w.biases.present ? table_value(w, w.biases, panel, g, l) : 0.0f;
    for (int c = g * w.group; c < (g + 1) * w.group; ++c) {
      const uint8_t* block = panel + block_at(w, c / kGroup);
      const int code = get_code(block, bits, l, c % kGroup) + w.offset;
      const float value = scale * static_cast<float>(code);
      out[c] = w.biases.present ? value + bias : value;
    }
  }
}

}  // namespace localllm
