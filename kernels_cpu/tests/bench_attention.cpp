// Times attention alone: a decoder whose other parts are tiny. Prints milliseconds, the best of
// several.
//   kernels_cpu/tests/build.sh bench_attention g++ "-O3 -DNDEBUG"
//   kernels_cpu/tests/bench_attention.cpp
//   ./bench_attention [KERNELS] [THREADS] [CASE, such as smollm2 or smollm28 for 8 bits]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <numeric>

#include "synthetic.h"

using namespace localllm;
using namespace localllm::synthetic;

namespace {

struct Case {
  const char* name;
  int heads, kv_heads, head_dim, window, layers;
};

bool alone = true;

double seconds() {
  // Of this thread: neighbours that take the processor do not count.
  timespec t;
  clock_gettime(alone ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void time_case(const Case& c, KvKind kind, const char* kind_name, const Kernels& k, int threads,
               bool scattered) {
  LayerConfig layer;
  layer.heads = c.heads;
  layer.kv_heads = c.kv_heads;
  layer.head_dim = c.head_dim;
  layer.window = c.window;
  layer.scale = 0.05f;
  layer.pre_norm = {true, false, 1e-5f};
  const Model model({64, 32, c.layers, 32, layer, Format::kQ4Zero}, 7);
  const int context = 4096, block = 32, blocks = context / block;
  auto decoder = model.decoder(k, threads, kind, block, blocks);
  std::vector<int32_t> tokens(context), table(blocks);
  for (int i = 0; i < context; ++i) tokens[static_cast<size_t>(i)] = i * 7 % 64;
  std::iota(table.begin(), table.end(), 0);
  Random random(3);
  if (scattered)
    for (int i = blocks - 1; i > 0; --i)
      std::swap(table[static_cast<size_t>(i)], table[static_cast<size_t>(random.below(i + 1))]);
  const auto run = [&](int start, int n) {
    const double t = seconds();
    model.run(*decoder, {{tokens.data() + start, start, n, table.data()}});
    return 1e3 * (seconds() - t);
  };
  double prefill = 1e9, decode = 1e9, near = 1e9;
  for (int start = 0; start < context; start += 512) run(start, 512);
  for (int i = 0; i < 40; ++i) {
    decode = std::min(decode, run(context - 1, 1));
    near = std::min(near, run(1, 1));
    if (i < 8) prefill = std::min(prefill, run(0, 512));
  }
  std::printf("%-10s %-5s %s%s prefill 512 %7.2f ms, decode at 4096 %6.2f ms (at 1: %.2f)\n",
              c.name, kind_name, k.name, scattered ? " scattered" : "", prefill, decode, near);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : usable_kernels().back();
  const int threads = argc > 2 ? std::atoi(argv[2]) : 1;
  alone = threads == 1;
  const std::string only = argc > 3 ? argv[3] : "";
  const Case all[] = {
      {"smollm2", 9, 3, 64, 0, 30}, {"qwen3", 16, 4, 128, 0, 8}, {"gemma3", 4, 1, 256, 512, 18}};
  const std::pair<KvKind, const char*> kinds[] = {
      {KvKind::kFloat16, "16"}, {KvKind::kInt8, "8"}, {KvKind::kInt4, "4"}};
  for (const Case& c : all)
    for (const auto& [kind, kind_name] : kinds) {
      if (!only.empty() && only != c.name && only != std::string(c.name) + kind_name) continue;
      time_case(c, kind, kind_name, *find_kernels(name), threads, false);
      if (kind == KvKind::kFloat16)
        time_case(c, kind, kind_name, *find_kernels(name), threads, true);
    }
}
