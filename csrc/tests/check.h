#pragma once

#include <cmath>
#include <cstdio>

// A failed check prints its place and values and is counted; a test's main returns failures().

namespace fdfa::test {

inline int& failure_count() {
  static int count = 0;
  return count;
}

inline int failures() {
  if (failure_count() > 0) std::printf("%d checks failed\n", failure_count());
  return failure_count() > 0 ? 1 : 0;
}

inline void check(bool ok, const char* what, const char* file, int line) {
  if (ok || ++failure_count() > 20) return;  // the first twenty say enough
  std::printf("%s:%d: %s\n", file, line, what);
}

inline void check_near(double value, double expected, double tolerance, const char* what,
                       const char* file, int line) {
  const bool same = value == expected || (std::isnan(value) && std::isnan(expected));
  const bool near = std::isfinite(expected) && std::abs(value - expected) <= tolerance;
  if (same || near || ++failure_count() > 20) return;
  std::printf("%s:%d: %s = %.9g, expected %.9g within %.3g\n", file, line, what, value, expected,
              tolerance);
}

}  // namespace fdfa::test

#define CHECK(condition) ::fdfa::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_NEAR(value, expected, tolerance) \
  ::fdfa::test::check_near((value), (expected), (tolerance), #value, __FILE__, __LINE__)
