// A store on disk: a header, one entry a weight, then their bytes, each 64-byte aligned.
//
// The file is a cache of this machine for this build: native byte order, and structures as they
// lie in memory. Its layout number changes with any of them. Checksums find what a disk or a
// crash did to it: damaged weights would answer, and answer wrongly.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "core/store.h"

namespace localllm {

namespace {

constexpr char kMagic[8] = {'l', 'o', 'c', 'l', 'p', 'a', 'c', 'k'};
constexpr uint64_t kLayout = 3;

struct Header {
  char magic[8];
  uint64_t layout;
  uint64_t entry_bytes;
  uint64_t entries;
  uint64_t file_bytes;
  uint64_t checksum;  // of the entries
};

struct Entry {
  char name[120];
  uint64_t at;
  uint64_t bytes;
  uint64_t checksum;    // of the data
  int64_t vector_size;  // -1 for a matrix
  Matrix matrix;        // its data pointer is meaningless here
};

constexpr uint64_t align64(uint64_t n) { return (n + 63) / 64 * 64; }

uint64_t matrix_bytes(const Matrix& w) { return w.panel_bytes * static_cast<uint64_t>(w.panels()); }

}  // namespace

// Each step is one-to-one in the word it takes. Eight lanes run beside each other, which makes it
// about as fast as memory.
uint64_t content_checksum(const void* data, uint64_t bytes, uint64_t seed) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
  constexpr uint64_t kLanes = 8;
  const auto* p = static_cast<const uint8_t*>(data);
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  uint64_t words[kLanes];
  uint64_t at = 0;
  for (; at + sizeof(words) <= bytes; at += sizeof(words)) {
    std::memcpy(words, p + at, sizeof(words));
    for (uint64_t i = 0; i < kLanes; ++i) lanes[i] = (lanes[i] ^ words[i]) * kOdd;
  }
  std::memset(words, 0, sizeof(words));
  if (at < bytes) std::memcpy(words, p + at, bytes - at);
  uint64_t sum = seed ^ bytes;
  for (uint64_t i = 0; i < kLanes; ++i) {
    lanes[i] = (lanes[i] ^ words[i]) * kOdd;
    sum = (sum ^ lanes[i] ^ (lanes[i] >> 32)) * kOdd;
  }
  return sum;
}

namespace {

class File {
 public:
  File(const std::string& path, const char* mode) : path_(path), file_(fopen(path.c_str(), mode)) {
    if (!file_) fail();
  }
  ~File() {
    if (file_) fclose(file_);
  }
  void write(const void* data, uint64_t bytes) {
    if (bytes && fwrite(data, bytes, 1, file_) != 1) fail();
    at_ += bytes;
  }
  void align() {
    static constexpr char zeros[64] = {};
    write(zeros, align64(at_) - at_);
  }
  uint64_t at() const { return at_; }
  // The next byte goes here.
  void seek(uint64_t at) {
    if (fseeko(file_, static_cast<off_t>(at), SEEK_SET) != 0) fail();
    at_ = at;
  }
  void close() {
    FILE* file = file_;
    file_ = nullptr;
    if (fclose(file) != 0) fail();
  }

 private:
  [[noreturn]] void fail() const {
    throw std::runtime_error("cannot write " + path_ + ": " + std::strerror(errno));
  }
  std::string path_;
  FILE* file_;
  uint64_t at_ = 0;
};

// The matrix an entry describes must lie inside its bytes, whatever the file holds.
bool sound(const Entry& e, uint64_t file_bytes) {
  if (e.at % 64 || e.at > file_bytes || e.bytes > file_bytes - e.at) return false;
  if (memchr(e.name, 0, sizeof(e.name)) == nullptr) return false;
  if (e.vector_size >= 0) return static_cast<uint64_t>(e.vector_size) * sizeof(float) == e.bytes;
  const Matrix& w = e.matrix;
  return w.rows > 0 && w.cols > 0 && w.panel_bytes > 0 && w.kind <= WeightKind::kQ8 &&
         w.panel_bytes <= e.bytes && matrix_bytes(w) == e.bytes &&
         panel_bytes_needed(w) <= w.panel_bytes;
}

}  // namespace

struct PackedWriter::Content {
  Content(const std::string& path, size_t weights) : file(path, "wb"), announced(weights) {}
  File file;
  size_t announced;
  std::vector<std::unique_ptr<Entry>> entries;
};

PackedWriter::PackedWriter(const std::string& path, size_t weights)
    : content_(std::make_unique<Content>(path, weights)) {
  content_->file.seek(align64(sizeof(Header) + weights * sizeof(Entry)));
}

PackedWriter::~PackedWriter() = default;

void PackedWriter::add_affine(const std::string& name, const AffineSource& source) {
  Arena arena;
  add_packed(name, pack_affine(source, arena));
}

void PackedWriter::add_dense(const std::string& name, const void* values, WeightKind kind, int rows,
                             int cols) {
  Arena arena;
  add_packed(name, pack_dense(values, kind, rows, cols, arena));
}

void PackedWriter::add_packed(const std::string& name, const Matrix& matrix) {
  add(name, matrix.data, matrix_bytes(matrix), -1, &matrix);
}

void PackedWriter::add_vector(const std::string& name, const float* values, int n) {
  add(name, values, static_cast<uint64_t>(n) * sizeof(float), n, nullptr);
}

void PackedWriter::add(const std::string& name, const void* data, uint64_t bytes,
                       int64_t vector_size, const Matrix* matrix) {
  auto e = std::make_unique<Entry>();
  std::memset(static_cast<void*>(e.get()), 0, sizeof(Entry));
  if (name.size() >= sizeof(e->name)) throw std::runtime_error("weight name too long: " + name);
  std::memcpy(e->name, name.data(), name.size());
  e->at = content_->file.at();
  e->bytes = bytes;
  e->checksum = content_checksum(data, bytes);
  e->vector_size = vector_size;
  if (matrix) {
    e->matrix = *matrix;
    e->matrix.data = nullptr;
  }
  content_->file.write(data, bytes);
  content_->file.align();
  content_->entries.push_back(std::move(e));
}

void PackedWriter::finish() {
  const auto& entries = content_->entries;
  if (entries.size() != content_->announced)
    throw std::runtime_error("not as many weights as were announced");
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.layout = kLayout;
  header.entry_bytes = sizeof(Entry);
  header.entries = entries.size();
  header.file_bytes = content_->file.at();
  for (const auto& e : entries)
    header.checksum = content_checksum(e.get(), sizeof(Entry), header.checksum);
  content_->file.seek(0);
  content_->file.write(&header, sizeof(header));
  for (const auto& e : entries) content_->file.write(e.get(), sizeof(Entry));
  content_->file.close();
}

void WeightStore::save(const std::string& path) const {
  PackedWriter writer(path, matrices_.size() + vectors_.size());
  for (const auto& [name, w] : matrices_) writer.add_packed(name, w);
  for (const auto& [name, v] : vectors_) writer.add_vector(name, v.data, v.size);
  writer.finish();
}

namespace {

// layers.N.moe.up.weight.E, one matrix of a stack.
bool is_expert(const std::string& name) {
  const size_t dot = name.rfind('.');
  return dot != std::string::npos && dot + 1 < name.size() &&
         name.find_first_not_of("0123456789", dot + 1) == std::string::npos &&
         name.find(".moe.") != std::string::npos;
}

}  // namespace

std::shared_ptr<WeightStore> WeightStore::open(const std::string& path, bool leave_experts) {
  auto store = std::make_shared<WeightStore>();
  store->path_ = path;
  Region whole = leave_experts ? Region::map_file(path) : Region::from_file(path);
  const Region& file = whole;
  const auto damaged = [&] { return std::runtime_error(path + " is damaged or of another build"); };
  Header header;
  if (file.size() < sizeof(header)) throw damaged();
  std::memcpy(&header, file.data(), sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0 || header.layout != kLayout ||
      header.entry_bytes != sizeof(Entry) || header.file_bytes != file.size() ||
      header.entries > (file.size() - sizeof(header)) / sizeof(Entry))
    throw damaged();
  uint64_t sum = 0;
  for (uint64_t i = 0; i < header.entries; ++i) {
    Entry e;
    std::memcpy(static_cast<void*>(&e), file.data() + sizeof(header) + i * sizeof(Entry),
                sizeof(Entry));
    sum = content_checksum(&e, sizeof(Entry), sum);
    if (!sound(e, file.size())) throw damaged();
    const bool left = leave_experts && e.vector_size < 0 && is_expert(e.name);
    const uint8_t* data = file.data() + e.at;
    if (!left && content_checksum(data, e.bytes) != e.checksum) throw damaged();
    if (leave_experts && !left) {
      uint8_t* own = store->arena_.allocate(e.bytes);
      std::memcpy(own, data, e.bytes);
      data = own;
    }
    if (e.vector_size >= 0) {
      store->vectors_[e.name] = {reinterpret_cast<const float*>(data),
                                 static_cast<int>(e.vector_size)};
    } else {
      Matrix& matrix = store->matrices_[e.name] = e.matrix;
      matrix.data = left ? nullptr : data;
      if (left) store->left_[&matrix] = {e.at, e.bytes, e.checksum};
    }
  }
  if (sum != header.checksum) throw damaged();
  store->bytes_ = leave_experts ? store->arena_.used() : file.size();
  if (!leave_experts) store->file_ = std::move(whole);
  return store;
}

}  // namespace localllm
