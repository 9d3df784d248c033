#include "common/max_pool.h"

#include <algorithm>
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

  std::vector<float> plain_y(y.size(), -99), cuda_plain_y = plain_y;
  p.tx = p.ty = nullptr;
  p.y = plain_y.data();
  cpu::max_pool(p, 0, cpu::max_pool_units(p));
  p.y = cuda_plain_y.data();
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
          CHECK(same(plain_y[at], x[best]) && same(cuda_plain_y[at], x[best]));
          expected_dx[best] += delta[at];
        }
  CHECK(dx == expected_dx);
  CHECK(cuda_dx == expected_dx);
}

// Its y, the pools of it and of the tangent that is not kept, as an epilogue and a pool after it make
// them.
void test_pooled_epilogue(const PoolShape& shape, bool has_tangent, Activation activation) {
  constexpr int64_t kState[3] = {7, 3, 2};
  const int64_t features = shape.height * shape.width * shape.channels, size = shape.samples * features;
  const int64_t pooled_size = shape.samples * shape.out_height * shape.out_width * shape.channels;
  std::vector<float> z(size), tz(size), bias(shape.channels);
  for (int64_t i = 0; i < size; ++i) {
    z[i] = static_cast<float>(i * 37 % 101) / 50 - 1;
    tz[i] = static_cast<float>(i * 41 % 103) / 50 - 1;
  }
  for (int64_t c = 0; c < shape.channels; ++c) bias[c] = static_cast<float>(c % 7) / 7;
  std::vector<float> y(size), ty(size), pre(size), pooled(pooled_size), pooled_ty(pooled_size);
  const bool has_pre = derivative_needs_pre_activation(activation);
  EpilogueParams<float> e{z.data(),
                          has_tangent ? tz.data() : nullptr,
                          bias.data(),
                          y.data(),
                          ty.data(),
                          has_pre ? pre.data() : nullptr,
                          shape.samples,
                          features,
                          shape.channels,
                          activation,
                          {kState, 1, Noise::gaussian},
                          false,
                          {},
                          {}};
  cpu::epilogue(e, 0, cpu::epilogue_units(e));
  const MaxPoolParams m{y.data(), ty.data(), pooled.data(), pooled_ty.data(), shape};
  cpu::max_pool(m, 0, cpu::max_pool_units(m));

  std::vector<float> y2 = z, pre2(size), pooled2(pooled_size), pooled_ty2(pooled_size);
  e.z = e.y = y2.data();
  e.ty = nullptr;
  e.pre = has_pre ? pre2.data() : nullptr;
  const PooledEpilogueParams p{e, pooled2.data(), pooled_ty2.data(), shape};
  cpu::pooled_epilogue(p, 0, 1);
  cpu::pooled_epilogue(p, 1, cpu::pooled_epilogue_units(p));
  CHECK(y2 == y && pre2 == pre && pooled2 == pooled && pooled_ty2 == pooled_ty);

  // Activations alone, in place again.
  y2 = z;
  e.tz = nullptr;
  e.noise.kind = Noise::none;
  const PooledEpilogueParams plain{e, pooled2.data(), nullptr, shape};
  std::fill(pooled2.begin(), pooled2.end(), -99.0f);
  cpu::pooled_epilogue(plain, 0, cpu::pooled_epilogue_units(plain));
  CHECK(y2 == y && pooled2 == pooled);
}

}  // namespace

int main() {
  for (const int64_t channels : {1, 3, 8, 15, 40, 130}) {
    test_case({2, 8, 6, channels, {2, 2}, {2, 2}, {0, 0}});
    test_case({1, 7, 9, channels, {3, 3}, {2, 2}, {1, 1}});
    test_case({2, 5, 8, channels, {3, 2}, {1, 3}, {1, 0}});
    test_case({1, 6, 7, channels, {5, 7}, {1, 1}, {2, 3}});
  }
  for (const bool has_tangent : {false, true})
    for (const auto f : {Activation::relu, Activation::gelu}) {
      test_pooled_epilogue({3, 24, 24, 15, 12, 12, {2, 2}, {2, 2}, {0, 0}}, has_tangent, f);
      test_pooled_epilogue({2, 7, 9, 3, 4, 5, {3, 3}, {2, 2}, {1, 1}}, has_tangent, f);
      test_pooled_epilogue({1, 6, 7, 40, 5, 4, {2, 4}, {1, 1}, {0, 0}}, has_tangent, f);
    }
  return test::failures();
}
