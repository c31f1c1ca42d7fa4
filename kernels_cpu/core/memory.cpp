#include "core/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace localllm {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kArenaRegion = size_t{64} << 20;
constexpr size_t kReadAtOnce = size_t{1} << 30;  // macOS refuses reads of 2 GiB and more

// An open file, not empty.
struct FileHandle {
  explicit FileHandle(const std::string& path)
      : path(path), descriptor(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor < 0) throw failure();
  }
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  ~FileHandle() { close(descriptor); }
  size_t size() const {
    struct stat info;
    if (fstat(descriptor, &info) != 0) throw failure();
    if (info.st_size <= 0) throw std::runtime_error(path + " is empty");
    return static_cast<size_t>(info.st_size);
  }
  std::runtime_error failure() const {
    return std::runtime_error("cannot read " + path + ": " + std::strerror(errno));
  }
  const std::string path;
  const int descriptor;
};

size_t physical_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : 0;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

Region Region::allocate(size_t bytes) {
  Region r;
  if (bytes == 0) bytes = 1;
  const bool large = bytes >= kHugePage;
  r.size_ = round_up(bytes, 4096);
  r.mapped_size_ = r.size_ + (large ? kHugePage : 0);
  r.mapped_ =
      mmap(nullptr, r.mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (r.mapped_ == MAP_FAILED) {
    r.mapped_ = nullptr;
    throw std::bad_alloc();
  }
  const auto start = reinterpret_cast<uintptr_t>(r.mapped_);
  r.data_ = reinterpret_cast<uint8_t*>(large ? round_up(start, kHugePage) : start);
#ifdef MADV_HUGEPAGE
  // Only a wish: where huge pages are refused, small ones serve.
  if (large) madvise(r.data_, r.size_, MADV_HUGEPAGE);
#endif
  return r;
}

Region Region::from_file(const std::string& path) {
  const FileHandle file(path);
  const size_t size = file.size();
  if (size > physical_memory() / 8) {
    Region r = map_file(path);
    madvise(r.mapped_, r.mapped_size_, MADV_WILLNEED);
    return r;
  }
  Region r = allocate(size);
  r.size_ = size;
  for (size_t at = 0; at < size;) {
    const size_t want = size - at < kReadAtOnce ? size - at : kReadAtOnce;
    const ssize_t n = pread(file.descriptor, r.data_ + at, want, static_cast<off_t>(at));
    if (n == 0) throw std::runtime_error(path + " was cut short while being read");
    if (n < 0 && errno != EINTR) throw file.failure();
    if (n > 0) at += static_cast<size_t>(n);
  }
  return r;
}

Region Region::map_file(const std::string& path) {
  const FileHandle file(path);
  const size_t size = file.size();
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.descriptor, 0);
  if (mapped == MAP_FAILED) throw file.failure();
  Region r;
  r.mapped_ = mapped;
  r.mapped_size_ = r.size_ = size;
  r.data_ = static_cast<uint8_t*>(mapped);
  return r;
}

Region::Region(Region&& other) noexcept { *this = std::move(other); }

Region& Region::operator=(Region&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_size_, other.mapped_size_);
  return *this;
}

Region::~Region() {
  if (mapped_) munmap(mapped_, mapped_size_);
}

uint8_t* Arena::allocate(size_t bytes) {
  bytes = round_up(bytes, 64);
  if (regions_.empty() || at_ + bytes > regions_.back().size()) {
    regions_.push_back(Region::allocate(bytes > kArenaRegion ? bytes : kArenaRegion));
    at_ = 0;
  }
  uint8_t* p = regions_.back().data() + at_;
  at_ += bytes;
  used_ += bytes;
  return p;
}

}  // namespace localllm
