// What bindings take and give back, and how they refuse it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

namespace localllm {

template <class T, int N>
using Array =
    nanobind::ndarray<const T, nanobind::ndim<N>, nanobind::c_contig, nanobind::device::cpu>;
using OutMatrix =
    nanobind::ndarray<float, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

inline void check(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

inline int to_int(size_t n) {
  check(n <= 0x7fffffff, "array too large");
  return static_cast<int>(n);
}

}  // namespace localllm
