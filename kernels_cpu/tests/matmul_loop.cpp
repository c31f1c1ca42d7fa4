// Multiplies rows by one random matrix, again and again, for whoever counts or times it:
// matmul_loop KERNELS BITS ROWS TIMES
#include <cstdio>
#include <cstdlib>

#include "core/rows_buffer.h"
#include "synthetic.h"

using namespace localllm;

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const Kernels* k = find_kernels(argv[1]);
  if (!k) {
    std::fprintf(stderr, "these kernels cannot run here\n");
    return 1;
  }
  const int bits = std::atoi(argv[2]), rows = std::atoi(argv[3]), times = std::atoi(argv[4]);
  constexpr int kOut = 64, kIn = 256;
  synthetic::Random random(3);
  std::vector<uint32_t> codes(static_cast<size_t>(kOut) * kIn * bits / 32);
  for (uint32_t& c : codes) c = random.bits();
  std::vector<float> scales(static_cast<size_t>(kOut) * kIn / 32);
  for (float& s : scales) s = random.uniform();
  AffineSource source;
  source.codes = codes.data();
  source.rows = kOut;
  source.cols = kIn;
  source.bits = bits;
  source.group = 32;
  source.zero_point = 1 << (bits - 1);
  source.scales = {scales.data(), false, kIn / 32, nullptr, false, kIn / 32};
  Arena arena;
  const Matrix w = pack_affine(source, arena);

  MatmulRows in;
  in.reserve(rows, kIn);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kIn; ++i) in.row(r)[i] = random.uniform();
    k->quantize(in.row(r), kIn, in.q(r), in.info(r));
  }
  std::vector<float> out(static_cast<size_t>(rows) * kOut);
  Scratch<uint8_t> scratch;
  scratch.reserve(matmul_scratch(w));
  for (int i = 0; i < times; ++i)
    k->matmul(w, in.input(0, rows, true), out.data(), kOut, 0, w.panels(), scratch.data());
  std::printf("%a\n", static_cast<double>(out[0]));
}
