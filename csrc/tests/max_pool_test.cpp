#include "common/max_pool.h"

#include <limits>
#include <vector>

#include "common/philox.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "tests/check.h"

// Max-pooling and its backward on the CPU and, in emulation, on CUDA against a search over the padded
// window.

namespace {

using namespace fdfa;

struct Case {
  int64_t samples, height, width, channels, kernel[2], stride[2], padding[2];
};

bool same(float a, float b) { return a == b || (a != a && b != b); }

void test_case(const Case& c) {
  const int64_t size = c.samples * c.height * c.width * c.channels;
  std::vector<float> x(size), tx(size);
  for (int64_t i = 0; i < size; ++i) {
    const Philox4 r = philox4x32_10({static_cast<uint32_t>(i), 0, 0, 0}, 1, 0);
    // Few values, so that windows have equals, and some NaN.
    x[i] = r.x0 % 37 == 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(r.x0 % 5) - 2;
    tx[i] = static_cast<float>(i);
  }
  const auto out = [&](int64_t extent, int i) {
    return (extent + 2 * c.padding[i] - c.kernel[i]) / c.stride[i] + 1;
  };
  const int64_t out_height = out(c.height, 0), out_width = out(c.width, 1);
  std::vector<float> y(c.samples * out_height * out_width * c.channels, -99), ty = y, cuda_y = y,
                                                                              cuda_ty = y;
  MaxPoolParams p{x.data(),
                  tx.data(),
                  y.data(),
                  ty.data(),
                  {c.samples,
                   c.height,
                   c.width,
                   c.channels,
                   out_height,
                   out_width,
                   {c.kernel[0], c.kernel[1]},
                   {c.stride[0], c.stride[1]},
                   {c.padding[0], c.padding[1]}}};
  cpu::max_pool(p, 0, 1);
  cpu::max_pool(p, 1, cpu::max_pool_units(p));
  p.y = cuda_y.data();
  p.ty = cuda_ty.data();
  CHECK(cuda::launch_max_pool(p, nullptr) == cudaSuccess);

  // Whole numbers, whose sums have no rounding.
  std::vector<float> delta(y.size()), dx(size, -99), cuda_dx = dx, expected_dx(size, 0.0f);
  for (size_t i = 0; i < delta.size(); ++i) delta[i] = static_cast<float>(i % 101) - 50;
  MaxPoolBackwardParams b{x.data(), delta.data(), dx.data(), p.shape};
  cpu::max_pool_backward(b, 0, 1);
  cpu::max_pool_backward(b, 1, cpu::max_pool_backward_units(b));
  b.dx = cuda_dx.data();
  CHECK(cuda::launch_max_pool_backward(b, nullptr) == cudaSuccess);

  int64_t at = 0;
  for (int64_t n = 0; n < c.samples; ++n)
    for (int64_t i = 0; i < out_height; ++i)
      for (int64_t j = 0; j < out_width; ++j)
        for (int64_t channel = 0; channel < c.channels; ++channel, ++at) {
          int64_t best = -1;
          for (int64_t a = 0; a < c.kernel[0]; ++a)
            for (int64_t b = 0; b < c.kernel[1]; ++b) {
              const int64_t row = i * c.stride[0] - c.padding[0] + a;
              const int64_t column = j * c.stride[1] - c.padding[1] + b;
              if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
              const int64_t from = ((n * c.height + row) * c.width + column) * c.channels + channel;
              const bool best_is_nan = best >= 0 && x[best] != x[best];
              if (best < 0 || (!best_is_nan && (x[from] > x[best] || x[from] != x[from]))) best = from;
            }
          CHECK(same(y[at], x[best]) && ty[at] == tx[best]);
          CHECK(same(cuda_y[at], x[best]) && cuda_ty[at] == tx[best]);
          expected_dx[best] += delta[at];
        }
  CHECK(dx == expected_dx);
  CHECK(cuda_dx == expected_dx);
}

}  // namespace

int main() {
  for (const int64_t channels : {1, 3, 8, 15, 40, 130}) {
    test_case({2, 8, 6, channels, {2, 2}, {2, 2}, {0, 0}});
    test_case({1, 7, 9, channels, {3, 3}, {2, 2}, {1, 1}});
    test_case({2, 5, 8, channels, {3, 2}, {1, 3}, {1, 0}});
    test_case({1, 6, 7, channels, {5, 7}, {1, 1}, {2, 3}});
  }
  return test::failures();
}
