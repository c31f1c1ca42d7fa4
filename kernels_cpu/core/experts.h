// Experts that are more than memory holds: all lie in the packed file, those in use in memory too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/program.h"
#include "core/store.h"
#include "core/threads.h"

namespace localllm {

// A slot of memory holds one expert of any layer. One that is chosen and has no slot takes that of
// the coldest among some; how warm an expert is, is how often it was chosen, older choices counting
// less. What is resident decides only how long a step takes, never what it computes.
class ExpertCache {
 public:
  struct Counts {
    uint64_t chosen = 0;  // experts that steps asked for
    uint64_t read = 0;    // of them, those that were not in memory
    uint64_t bytes = 0;   // that these took from the file
    double seconds = 0;   // that reading took
  };

  // The experts of `program` that `store` left in its file. budget: bytes for slots. uses: how
  // often each was chosen before, layer by layer; empty where that is unknown. Fills the slots with
  // the most used ones, which also tells how fast one is read. Throws std::invalid_argument
  // for a budget too small for one token, std::runtime_error when reading fails.
  ExpertCache(const WeightStore& store, const Program& program, size_t budget,
              const std::vector<float>& uses, ThreadPool* pool);
  ~ExpertCache();
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  int slots() const { return static_cast<int>(slots_.size()); }
  int experts() const { return static_cast<int>(experts_.size()); }
  size_t slot_bytes() const { return slot_bytes_; }
  // Bytes a second of reading one expert after the other, as steps do.
  double read_speed() const { return read_speed_; }
  // Bytes a second at which the slots are read.
  double memory_speed() const { return memory_speed_; }
  const Counts& counts() const { return counts_; }
  // How often each was chosen, layer by layer.
  std::vector<uint64_t> uses() const;
  std::vector<bool> residents() const;

  bool resident(int layer, int expert) const { return entry(layer, expert).slot >= 0; }
  // Brings these experts of a layer, at most slots(), into memory; they stay until the next call.
  // Throws std::runtime_error when they cannot be read.
  void fetch(int layer, const int* experts, int count);
  // One that the last `fetch` asked for.
  const FeedForward& at(int layer, int expert) const {
    return slots_[static_cast<size_t>(entry(layer, expert).slot)].weights;
  }

 private:
  struct Expert {
    const FeedForward* source = nullptr;
    int slot = -1;
    double heat = 0;  // as of the fetch `used`
    uint64_t used = 0, uses = 0;
  };
  struct Slot {
    Matrix gate, up, down;
    FeedForward weights{};
    int expert = -1;  // index in experts_, -1 while it holds none
  };

  const Expert& entry(int layer, int expert) const {
    return experts_[static_cast<size_t>(first_[static_cast<size_t>(layer)] + expert)];
  }
  double heat(const Expert& e) const;
  int coldest();
  // Reads experts into the slots they were given.
  void read(const std::vector<int>& experts);
  // Empty when all went well.
  std::string read_one(const Expert& e, Slot* slot, uint8_t* to) const;

  const WeightStore& store_;
  ThreadPool* pool_;
  int file_ = -1;
  std::vector<Expert> experts_;
  std::vector<int> first_;  // of each layer, in experts_
  std::vector<Slot> slots_;
  Region memory_;
  size_t slot_bytes_ = 0;
  int hand_ = 0;  // the slot at which the next search begins
  uint64_t now_ = 0;
  double half_life_ = 0;  // in fetches
  double read_speed_ = 0, memory_speed_ = 0;
  Counts counts_;
};

}  // namespace localllm
