#include "common/divisor.h"

#include "common/philox.h"
#include "tests/check.h"

// Quotients by multiplication are those of the machine's division.

namespace {

using namespace fdfa;

constexpr int32_t kLargest = 0x7FFFFFFF;

void test_quotients(int32_t d) {
  const Divisor divisor(d);
  const auto check = [&](int64_t n) {
    if (n < 0 || n > kLargest) return;
    const auto dividend = static_cast<int32_t>(n);
    if (dividend / divisor == dividend / d) return;
    CHECK_NEAR(dividend / divisor, dividend / d, 0);
  };
  for (int64_t n = 0; n < 300; ++n) check(n);
  // Where the quotient changes: an error shows at the ends of a run of equal ones, of large ones first.
  for (int64_t multiple = kLargest / d, i = 0; i < 300; ++i, --multiple) {
    for (int64_t offset = -1; offset <= 1; ++offset) check(multiple * d + offset);
  }
  for (uint32_t i = 0; i < 300; ++i) {
    const int64_t n = philox4x32_10({i, 0, 0, 0}, 1, 0).x0 >> 1;
    for (int64_t offset = -1; offset <= 1; ++offset) check(n / d * d + offset);
  }
  check(kLargest);
}

}  // namespace

int main() {
  for (int32_t d = 1; d < 5000; ++d) test_quotients(d);
  for (int power = 0; power < 31; ++power) {
    for (int64_t offset = -3; offset <= 3; ++offset) {
      const int64_t d = (int64_t{1} << power) + offset;
      if (d >= 1) test_quotients(static_cast<int32_t>(d));
    }
  }
  for (int32_t d = kLargest - 100; d < kLargest; ++d) test_quotients(d);
  test_quotients(kLargest);
  for (uint32_t i = 0; i < 5000; ++i) {
    test_quotients(static_cast<int32_t>(philox4x32_10({i, 0, 0, 0}, 2, 0).x0 >> (1 + i % 24)) | 1);
  }
  return test::failures();
}
