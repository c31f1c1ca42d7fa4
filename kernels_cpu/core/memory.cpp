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

Region Region::map_file(const std::string& path) {
  const auto fail = [&](const char* what) {
    return std::runtime_error(std::string(what) + " " + path + ": " + std::strerror(errno));
  };
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw fail("cannot open");
  struct stat info;
  if (fstat(fd, &info) != 0 || info.st_size <= 0) {
    const auto error = fail("cannot map");
    close(fd);
    throw error;
  }
  Region r;
  r.mapped_size_ = r.size_ = static_cast<size_t>(info.st_size);
  r.mapped_ = mmap(nullptr, r.size_, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (r.mapped_ == MAP_FAILED) {
    r.mapped_ = nullptr;
    throw fail("cannot map");
  }
  r.data_ = static_cast<uint8_t*>(r.mapped_);
#ifdef MADV_HUGEPAGE
  madvise(r.data_, r.size_, MADV_HUGEPAGE);
#endif
  madvise(r.data_, r.size_, MADV_WILLNEED);
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
