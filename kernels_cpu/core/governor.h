// Decides whether steps of few rows use all threads or the caller's alone.
//
// A thread that another process pushed off its core holds its chunk until it runs again, some
// milliseconds later, and a decode step that waits for it takes twice as long as on one thread. So
// lost time is measured; where there is much of it, steps are tried alone, and the quicker way is
// kept for a while that doubles as long as it proves right. The bits are the same either way.
#pragma once

namespace localllm {

class Governor {
 public:
  static constexpr int kMostRows = 64;  // larger steps have work enough to share

  // Before a step: whether it should run on the caller's thread alone.
  bool alone(int rows);
  // After it. `seconds` it took, of which the caller was `lost`, waiting or pushed off its core;
  // `now` on any steady clock, in seconds.
  void record(int rows, double seconds, double lost, double now);

 private:
  static constexpr double kWindow = 0.012;   // seconds of steps judged together
  static constexpr double kMuchLost = 0.15;  // share of the time
  // One after the other before steps are tried alone: what takes a core for a moment, as an app
  // that draws does, has gone before that would help.
  static constexpr int kBadWindows = 4;
  static constexpr double kShortest = 0.05, kLongest = 2.0;

  void change(bool alone, double until);

  int rows_ = 0;
  bool alone_ = false;
  bool trial_ = false;
  double until_ = 0;                           // when the present way is due for another look
  double stay_ = kShortest;                    // how long it may be kept
  double together_mean_ = 0, alone_mean_ = 0;  // seconds a step, 0: not known
  int steps_ = 0, bad_windows_ = 0;
  double seconds_ = 0, lost_ = 0;
};

}  // namespace localllm
