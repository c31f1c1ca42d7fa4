// Steps with more threads than processors while another thread cancels them at any moment: a step
// ends whole, with the right bits, or cancelled, and the next one is not the worse for it.
#include <chrono>
#include <cstdio>
#include <thread>

#include "synthetic.h"

using namespace localllm;
using namespace localllm::synthetic;
using Clock = std::chrono::steady_clock;

int main() {
  LayerConfig layer;
  layer.heads = layer.kv_heads = 4;
  layer.head_dim = 32;
  layer.scale = 0.125f;
  layer.rope = 0;
  layer.rope_half = 16;
  layer.pre_norm = {true, false, 1e-5f};
  const Model model({64, 128, 8, 256, layer, Format::kQ4Bias}, 3);
  constexpr int kTokens = 64;
  std::vector<int32_t> tokens(kTokens);
  for (int i = 0; i < kTokens; ++i) tokens[static_cast<size_t>(i)] = i;
  const int32_t table[] = {0, 1};
  const std::vector<Model::Part> parts{{tokens.data(), 0, kTokens, table}};
  const Kernels& kernels = *find_kernels(usable_kernels().back());
  const auto wanted =
      model.run(*model.decoder(kernels, 1, KvKind::kFloat16, 32, 2), parts, nullptr);

  const int threads = std::min(32, 2 * static_cast<int>(std::thread::hardware_concurrency()) + 3);
  const auto decoder = model.decoder(kernels, threads, KvKind::kFloat16, 32, 2);
  if (decoder->threads() != threads) return std::fprintf(stderr, "too few threads\n"), 1;
  const auto start = Clock::now();
  bool whole = model.run(*decoder, parts) == wanted;
  const auto step = Clock::now() - start;

  std::atomic<bool> over{false};
  std::thread other([&] {
    Random random(5);
    while (!over) {
      std::this_thread::sleep_for(step * (1 + random.below(16)) / 8);
      decoder->cancel();
    }
  });
  int finished = 0, cancelled = 0;
  const auto end = start + std::chrono::seconds(60);
  while (whole && (finished < 20 || cancelled < 20) && Clock::now() < end) {
    bool done = false;
    const auto got = model.run(*decoder, parts, &done);
    ++(done ? finished : cancelled);
    if (done) whole = got == wanted;
  }
  over = true;
  other.join();
  bool done = false;
  whole = whole && model.run(*decoder, parts, &done) == wanted && done;
  std::printf("%d steps finished, %d cancelled, %d threads\n", finished, cancelled, threads);
  if (!whole) std::fprintf(stderr, "a step after a cancelled one gives other bits\n");
  return !whole || finished < 20 || cancelled < 20;
}
