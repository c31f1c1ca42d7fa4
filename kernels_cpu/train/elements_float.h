// Products of float32.
#pragma once

namespace localllm::LOCALLLM_ISA {
namespace {

using Elem = float;
constexpr int kPair = 1;

inline Vec load_elem(const Elem* p) { return load(p); }
inline void store_elem(Elem* p, const Vec& a) { store(p, a); }
inline float to_float(Elem x) { return x; }
inline Elem to_elem(float x) { return x; }

using Operand = Vec;
inline Operand load_operand(const Elem* p) { return load(p); }
inline Operand broadcast(const Elem* p) { return set1(*p); }
#ifdef LOCALLLM_SLOW_FMA
inline Vec multiply_add(const Operand& a, const Operand& b, const Vec& c) {
  return add(mul(a, b), c);
}
#else
inline Vec multiply_add(const Operand& a, const Operand& b, const Vec& c) { return fma(a, b, c); }
#endif
// Two vectors of rows r, r + 1 as steps of a panel: for one float a step is one row.
inline void store_steps(Elem* p, ptrdiff_t step, const Vec& even, const Vec& odd) {
  store(p, even);
  store(p + step, odd);
}

}  // namespace
}  // namespace localllm::LOCALLLM_ISA
