#include "common/dtype.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "common/philox.h"
#include "tests/check.h"

namespace {

using namespace fdfa;

struct Format {
  int mantissa_bits, min_exponent, max_exponent;  // of normal numbers
};
constexpr Format kHalf{10, -14, 15}, kBrain{7, -126, 127};

// The value of a bit pattern, from the definition of the format.
double decode(uint16_t bits, Format f) {
  const int fraction = bits & ((1 << f.mantissa_bits) - 1);
  const int exponent = (bits & 0x7FFF) >> f.mantissa_bits;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const double scaled = std::ldexp(fraction, -f.mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(scaled, f.min_exponent);
  if (exponent + f.min_exponent - 1 <= f.max_exponent) {
    return sign * std::ldexp(1.0 + scaled, exponent + f.min_exponent - 1);
  }
  return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                       : std::numeric_limits<double>::quiet_NaN();
}

// The nearest value of the format, ties to even; std::nearbyint rounds that way by default.
double round_to(double x, Format f) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double unit = std::ldexp(1.0, exponent - f.mantissa_bits);
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::abs(rounded) >= std::ldexp(1.0, f.max_exponent + 1) ? std::copysign(INFINITY, x)
                                                                  : rounded;
}

bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

template <class T>
void test_all_patterns(Format f) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const T x{static_cast<uint16_t>(i)};
    const float value = to_float(x);
    CHECK(same(value, decode(x.bits, f)));
    const T back = from_float<T>(value);
    CHECK(std::isnan(value) ? std::isnan(to_float(back)) : back.bits == x.bits);
  }
}

template <class T>
void check_rounding(uint32_t bits, Format f) {
  const float x = float_from_bits(bits);
  CHECK(same(to_float(from_float<T>(x)), round_to(x, f)));
}

template <class T>
void test_rounding(Format f) {
  // Every number of the format, the point half way to the next and the floats beside both.
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint32_t bits = bits_from_float(to_float(T{static_cast<uint16_t>(i)}));
    const uint32_t half_way = 1u << (22 - f.mantissa_bits);
    for (const uint32_t centre : {bits, bits + half_way}) {
      for (const uint32_t offset : {0u - 1u, 0u, 1u}) check_rounding<T>(centre + offset, f);
    }
  }
  for (uint32_t i = 0; i < 1000000; ++i) {
    const Philox4 r = philox4x32_10({i, 0, 0, 0}, 0, 0);
    check_rounding<T>(r.x0, f);  // any float
    // Exponents from -26 to 18, where halves are subnormal, normal and too large.
    check_rounding<T>((r.x1 & 0x807FFFFF) | ((101 + r.x2 % 45) << 23), f);
  }
  // The smallest floats, the largest, infinities and NaNs of either kind.
  for (const uint32_t bits :
       {0u, 1u, 0x007FFFFFu, 0x00800000u, 0x33000000u, 0x33000001u, 0x477FEFFFu, 0x477FF000u,
        0x7F7FFFFFu, 0x7F800000u, 0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu}) {
    check_rounding<T>(bits, f);
    check_rounding<T>(bits | 0x80000000u, f);
  }
}

}  // namespace

int main() {
  test_all_patterns<float16>(kHalf);
  test_all_patterns<bfloat16>(kBrain);
  test_rounding<float16>(kHalf);
  test_rounding<bfloat16>(kBrain);
  return fdfa::test::failures();
}
