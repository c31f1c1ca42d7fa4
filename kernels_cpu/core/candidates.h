// Tables of kernels with what they need of a processor, and the choice among them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "core/cpu_features.h"

namespace localllm {

using Features = std::vector<std::string>;

// Table: has a `name`.
template <class Table>
class Candidates {
 public:
  struct Candidate {
    const Table* kernels;
    Features needs;
  };

  // Slowest first.
  explicit Candidates(std::vector<Candidate> all) {
    const Features features = usable_cpu_features();
    for (Candidate& c : all)
      if (std::all_of(c.needs.begin(), c.needs.end(), [&](const std::string& need) {
            return std::find(features.begin(), features.end(), need) != features.end();
          }))
        usable_.push_back(c.kernels);
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Table* table : usable_) names.push_back(table->name);
    return names;
  }

  // Null when it is unknown or cannot run here.
  const Table* find(const std::string& name) const {
    for (const Table* table : usable_)
      if (table->name == name) return table;
    return nullptr;
  }

 private:
  std::vector<const Table*> usable_;
};

inline Features with(Features features, std::initializer_list<const char*> more) {
  features.insert(features.end(), more.begin(), more.end());
  return features;
}

}  // namespace localllm
