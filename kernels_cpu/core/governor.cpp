#include "core/governor.h"

#include <algorithm>

namespace localllm {

bool Governor::alone(int rows) {
  if (rows > kMostRows) return false;
  if (rows != rows_) {  // steps of other sizes cannot be compared
    *this = Governor();
    rows_ = rows;
  }
  return alone_;
}

void Governor::change(bool alone, double until) {
  alone_ = alone;
  until_ = until;
}

void Governor::record(int rows, double seconds, double lost, double now) {
  if (rows != rows_) return;
  ++steps_;
  seconds_ += seconds;
  lost_ += lost;
  if (seconds_ < kWindow) return;
  const double mean = seconds_ / steps_;
  const bool much_lost = lost_ > kMuchLost * seconds_;
  steps_ = 0;
  seconds_ = lost_ = 0;

  if (alone_) {
    alone_mean_ = mean;
    if (trial_) {
      trial_ = false;
      change(mean < together_mean_, now + stay_);
      stay_ = std::min(2 * stay_, kLongest);
    } else if (now >= until_) {
      change(false, now);  // see whether the neighbour has gone
    }
    return;
  }
  together_mean_ = mean;
  if (!much_lost) {
    stay_ = kShortest;
    alone_mean_ = 0;
    bad_windows_ = 0;
  } else if (now >= until_ && (alone_mean_ > 0 || ++bad_windows_ >= kBadWindows)) {
    trial_ = alone_mean_ == 0 || mean <= alone_mean_;
    change(true, now + stay_);
    if (!trial_) stay_ = std::min(2 * stay_, kLongest);
  }
}

}  // namespace localllm
