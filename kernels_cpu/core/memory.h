// Memory from the operating system: huge pages where granted, and read-only file mappings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace localllm {

// A mapped range, unmapped on destruction.
class Region {
 public:
  Region() = default;
  // Zeroed, page-aligned, committed when touched. Throws std::bad_alloc.
  static Region allocate(size_t bytes);
  // A file's content, not to be written to: read into huge pages while it is small beside the
  // machine's memory (decoding from 4 KiB pages is 8 % slower), else mapped.
  // Throws std::runtime_error with the system's reason.
  static Region from_file(const std::string& path);
  // The same, mapped, and read only as it is touched.
  static Region map_file(const std::string& path);

  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;
  ~Region();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;  // 2 MiB aligned for allocations
  size_t size_ = 0;
  void* mapped_ = nullptr;
  size_t mapped_size_ = 0;
};

// Hands out 64-byte-aligned pieces of large regions; all are freed together.
class Arena {
 public:
  uint8_t* allocate(size_t bytes);
  size_t used() const { return used_; }

 private:
  std::vector<Region> regions_;
  size_t at_ = 0;
  size_t used_ = 0;
};

// A growing scratch array. Contents are lost when it grows.
template <class T>
class Scratch {
 public:
  T* reserve(size_t count) {
    if (count * sizeof(T) > region_.size()) region_ = Region::allocate(count * sizeof(T) * 5 / 4);
    return data();
  }
  T* data() const { return reinterpret_cast<T*>(region_.data()); }

 private:
  Region region_;
};

}  // namespace localllm
