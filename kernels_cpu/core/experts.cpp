#include "core/experts.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "core/bandwidth.h"

namespace localllm {

namespace {

constexpr int kCandidates = 64;  // slots looked at for the coldest one
constexpr size_t kLeastMemory = size_t{1} << 20, kMeasured = size_t{256} << 20;
constexpr size_t kTimedAlone = 16;
constexpr double kHalfLife = 128.0;  // steps after which a choice counts half

constexpr size_t align64(size_t n) { return (n + 63) / 64 * 64; }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The slots are the cache; the system shall not keep the same bytes once more.
void forget_pages(int file, uint64_t at, uint64_t bytes) {
#ifdef POSIX_FADV_DONTNEED
  posix_fadvise(file, static_cast<off_t>(at), static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
#else
  (void)file, (void)at, (void)bytes;
#endif
}

int open_uncached(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error("cannot read " + path + ": " + std::strerror(errno));
#ifdef F_NOCACHE
  fcntl(file, F_NOCACHE, 1);
#endif
  fsync(file);  // pages still to be written cannot be forgotten
  forget_pages(file, 0, 0);
  return file;
}

}  // namespace

ExpertCache::ExpertCache(const WeightStore& store, const Program& program, size_t budget,
                         const std::vector<float>& uses, ThreadPool* pool)
    : store_(store), pool_(pool) {
  int mixtures = 0, most_chosen = 1;
  for (const Layer& layer : program.layers) {
    first_.push_back(static_cast<int>(experts_.size()));
    mixtures += !layer.moe.experts.empty();
    most_chosen = std::max(most_chosen, layer.config.top_k);
    for (const FeedForward& f : layer.moe.experts) {
      Expert e;
      e.source = &f;
      experts_.push_back(e);
      size_t bytes = 0;
      for (const Matrix* w : {f.gate, f.up, f.down}) bytes += align64(store.left(*w).bytes);
      slot_bytes_ = std::max(slot_bytes_, bytes);
    }
  }
  half_life_ = kHalfLife * std::max(1, mixtures);
  const size_t slots = slot_bytes_ ? std::min(experts_.size(), budget / slot_bytes_) : size_t{0};
  if (slots < static_cast<size_t>(most_chosen))
    throw std::invalid_argument("no memory for the " + std::to_string(most_chosen) +
                                " experts that one token needs");
  slots_.resize(slots);
  memory_ = Region::allocate(std::max(slots * slot_bytes_, kLeastMemory));
  file_ = open_uncached(store.path());

  // Where use is unknown, the first experts of every layer.
  std::vector<int> first;
  for (int e = 0; first.size() < experts_.size(); ++e)
    for (size_t layer = 0; layer < program.layers.size(); ++layer)
      if (e < static_cast<int>(program.layers[layer].moe.experts.size()))
        first.push_back(first_[layer] + e);
  if (uses.size() == experts_.size()) {
    std::stable_sort(first.begin(), first.end(), [&](int a, int b) {
      return uses[static_cast<size_t>(a)] > uses[static_cast<size_t>(b)];
    });
    // What is known counts as much as the choices of one half life.
    double most = 1.0;
    for (const float n : uses) most = std::max(most, static_cast<double>(n));
    for (size_t i = 0; i < uses.size(); ++i) experts_[i].heat = kHalfLife * uses[i] / most;
  }
  first.resize(slots);
  for (size_t i = 0; i < first.size(); ++i)
    experts_[static_cast<size_t>(first[i])].slot = static_cast<int>(i);
  // Steps wait for one expert, seldom for more, and one at a time is slower than many: the last
  // few are read like that, and the one in the middle is typical.
  const size_t together = first.size() - std::min(kTimedAlone, (first.size() + 1) / 2);
  try {
    if (together > 0) read({first.begin(), first.begin() + static_cast<ptrdiff_t>(together)});
    std::vector<double> speeds;
    for (size_t i = together; i < first.size(); ++i) {
      counts_ = {};
      read({first[i]});
      speeds.push_back(static_cast<double>(counts_.bytes) / std::max(counts_.seconds, 1e-9));
    }
    const auto middle = speeds.begin() + static_cast<ptrdiff_t>(speeds.size() / 2);
    std::nth_element(speeds.begin(), middle, speeds.end());
    read_speed_ = *middle;
  } catch (...) {
    close(file_);
    throw;
  }
  counts_ = {};
  memory_speed_ = read_bandwidth(memory_.data(), std::min(memory_.size(), kMeasured), pool_);
}

ExpertCache::~ExpertCache() { close(file_); }

std::vector<uint64_t> ExpertCache::uses() const {
  std::vector<uint64_t> result;
  for (const Expert& e : experts_) result.push_back(e.uses);
  return result;
}

std::vector<bool> ExpertCache::residents() const {
  std::vector<bool> result;
  for (const Expert& e : experts_) result.push_back(e.slot >= 0);
  return result;
}

double ExpertCache::heat(const Expert& e) const {
  return e.heat * std::exp2(-static_cast<double>(now_ - e.used) / half_life_);
}

int ExpertCache::coldest() {
  int best = -1;
  double least = 0;
  for (int looked = 0; looked < slots() && (looked < kCandidates || best < 0); ++looked) {
    const int slot = hand_;
    hand_ = (hand_ + 1) % slots();
    const int owner = slots_[static_cast<size_t>(slot)].expert;
    if (owner < 0) return slot;
    const Expert& e = experts_[static_cast<size_t>(owner)];
    if (e.used == now_) continue;  // this fetch needs it
    const double h = heat(e);
    if (best < 0 || h < least) best = slot, least = h;
  }
  return best;
}

void ExpertCache::fetch(int layer, const int* experts, int count) {
  if (count > slots()) throw std::invalid_argument("more experts at once than there are slots");
  ++now_;
  const int first = first_[static_cast<size_t>(layer)];
  for (int i = 0; i < count; ++i) {
    Expert& e = experts_[static_cast<size_t>(first + experts[i])];
    e.heat = heat(e) + 1.0;
    e.used = now_;
    ++e.uses;
  }
  std::vector<int> missing;
  for (int i = 0; i < count; ++i) {
    Expert& e = experts_[static_cast<size_t>(first + experts[i])];
    if (e.slot >= 0) continue;
    e.slot = coldest();
    Slot& slot = slots_[static_cast<size_t>(e.slot)];
    if (slot.expert >= 0) experts_[static_cast<size_t>(slot.expert)].slot = -1;
    slot.expert = first + experts[i];
    missing.push_back(first + experts[i]);
  }
  counts_.chosen += static_cast<uint64_t>(count);
  counts_.read += missing.size();
  if (!missing.empty()) read(missing);
}

void ExpertCache::read(const std::vector<int>& experts) {
  const auto start = std::chrono::steady_clock::now();
  std::mutex mutex;
  std::string problem;
  pool_->parallel(static_cast<int>(experts.size()), 1, [&](int from, int to, int) {
    for (int i = from; i < to; ++i) {
      Expert& e = experts_[static_cast<size_t>(experts[static_cast<size_t>(i)])];
      Slot& slot = slots_[static_cast<size_t>(e.slot)];
      const size_t at = static_cast<size_t>(e.slot) * slot_bytes_;
      const std::string wrong = read_one(e, &slot, memory_.data() + at);
      if (wrong.empty()) {
        slot.expert = experts[static_cast<size_t>(i)];
        continue;
      }
      slot.expert = -1;
      e.slot = -1;
      const std::lock_guard<std::mutex> lock(mutex);
      problem = wrong;
    }
  });
  counts_.seconds += seconds_since(start);
  for (const int expert : experts) {
    const FeedForward& f = *experts_[static_cast<size_t>(expert)].source;
    for (const Matrix* w : {f.gate, f.up, f.down}) counts_.bytes += store_.left(*w).bytes;
  }
  if (!problem.empty()) throw std::runtime_error(store_.path() + ": " + problem);
}

std::string ExpertCache::read_one(const Expert& e, Slot* slot, uint8_t* to) const {
  const FeedForward& source = *e.source;
  slot->weights = source;
  const std::pair<const Matrix*, Matrix*> parts[] = {
      {source.gate, &slot->gate}, {source.up, &slot->up}, {source.down, &slot->down}};
  for (const auto& [from, matrix] : parts) {
    const FilePiece& piece = store_.left(*from);
    for (uint64_t done = 0; done < piece.bytes;) {
      const ssize_t n =
          pread(file_, to + done, piece.bytes - done, static_cast<off_t>(piece.at + done));
      if (n == 0) return "was cut short while in use";
      if (n < 0 && errno != EINTR) return std::string("cannot be read: ") + std::strerror(errno);
      if (n > 0) done += static_cast<uint64_t>(n);
    }
    forget_pages(file_, piece.at, piece.bytes);
    if (content_checksum(to, piece.bytes) != piece.checksum) return "is damaged";
    *matrix = *from;
    matrix->data = to;
    to += align64(piece.bytes);
  }
  slot->weights.gate = &slot->gate;
  slot->weights.up = &slot->up;
  slot->weights.down = &slot->down;
  return {};
}

}  // namespace localllm
