#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fdfa {

// n / d for 0 <= n < 2^31 and a d, 1 <= d < 2^31, that the host knows: floor(n m / 2^s), a
// multiplication and a shift where a GPU's division takes up to 20 instructions.
//
// With L the least such that d <= 2^L, s = 31 + L and m = ceil(2^s / d), which 32 bits hold. m d
// exceeds 2^s by some e < d <= 2^L, so n m / 2^s exceeds n / d by n e / (2^s d) < 2^31 2^L / (2^s d) =
// 1 / d: too little to reach the next whole number.
class Divisor {
 public:
  explicit Divisor(int32_t d) : shift_(31) {
    while (int64_t{1} << (shift_ - 31) < d) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + d - 1) / d);
  }

  friend FDFA_HD int32_t operator/(int32_t n, const Divisor& d) {
    return static_cast<int32_t>(static_cast<uint64_t>(n) * d.multiplier_ >> d.shift_);
  }

 private:
  uint32_t multiplier_;
  int shift_;
};

}  // namespace fdfa
