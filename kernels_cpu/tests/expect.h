// Ends a test with words for what did not hold.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}
