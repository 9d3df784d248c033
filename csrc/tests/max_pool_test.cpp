#include "common/max_pool.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/noise.h"
#include "common/philox.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "tests/check.h"

// Max-pooling and its backward on the CPU, by every instruction set, and, in emulation, on CUDA against
// a search over the padded window. The argument "small" takes few cases, for the run under a thread
// sanitizer.

namespace {

using namespace fdfa;

constexpr int64_t kState[3] = {7, 3, 2};

struct Case {
  int64_t samples;
  int32_t height, width, channels, kernel[2], stride[2], padding[2];
};

PoolShape shape_of(const Case& c) {
  const auto out = [&](int32_t extent, int i) {
    return (extent + 2 * c.padding[i] - c.kernel[i]) / c.stride[i] + 1;
  };
  return {c.samples,
          c.height,
          c.width,
          c.channels,
          out(c.height, 0),
          out(c.width, 1),
          {c.kernel[0], c.kernel[1]},
          {c.stride[0], c.stride[1]},
          {c.padding[0], c.padding[1]}};
}

// Of the same bits, so that NaN is NaN and zeros have a sign.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Pooled {
  std::vector<float> y, ty;
  std::vector<uint8_t> winners;

  bool operator==(const Pooled& other) const {
    return same(y, other.y) && same(ty, other.ty) && winners == other.winners;
  }
};

struct Images {
  std::vector<float> x, tx, delta;  // delta is of the pooled ones
};

Images make_images(const PoolShape& s) {
  Images images{std::vector<float>(s.samples * s.image()), std::vector<float>(s.samples * s.image()),
                std::vector<float>(s.samples * s.out_image())};
  for (size_t i = 0; i < images.x.size(); ++i) {
    const Philox4 r = philox4x32_10({static_cast<uint32_t>(i), 0, 0, 0}, 1, 0);
    // Few values, so that windows have equals, and some NaN.
    images.x[i] =
        r.x0 % 37 == 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(r.x0 % 5) - 2;
    images.tx[i] = static_cast<float>(i);
  }
  // Whole numbers, whose sums have no rounding.
  for (size_t i = 0; i < images.delta.size(); ++i) images.delta[i] = static_cast<float>(i % 101) - 50;
  return images;
}

// Without noise.
Pooled search(const PoolShape& s, const Images& images, bool has_tangent, std::vector<float>& dx) {
  Pooled out;
  const std::vector<float>& x = images.x;
  dx.assign(x.size(), 0.0f);
  size_t at = 0;
  for (int64_t n = 0; n < s.samples; ++n)
    for (int64_t i = 0; i < s.out_height; ++i)
      for (int64_t j = 0; j < s.out_width; ++j)
        for (int64_t channel = 0; channel < s.channels; ++channel, ++at) {
          int64_t best = -1, winner = -1;
          for (int64_t a = 0; a < s.kernel[0]; ++a)
            for (int64_t b = 0; b < s.kernel[1]; ++b) {
              const int64_t row = i * s.stride[0] - s.padding[0] + a;
              const int64_t column = j * s.stride[1] - s.padding[1] + b;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              const int64_t from = ((n * s.height + row) * s.width + column) * s.channels + channel;
              const bool best_is_nan = best >= 0 && x[best] != x[best];
              if (best >= 0 && (best_is_nan || (x[from] <= x[best]))) continue;
              best = from;
              winner = a * s.kernel[1] + b;
            }
          out.y.push_back(x[best]);
          out.winners.push_back(static_cast<uint8_t>(winner));
          out.ty.push_back(has_tangent ? images.tx[best] : 0.0f);
          dx[best] += images.delta[at];
        }
  return out;
}

// What run(params) makes of them in memory `shift` elements off its alignment.
template <class Run>
Pooled pool_by(const PoolShape& s, const Images& images, bool has_tangent, const NoiseParams& noise,
               bool wants_winners, int shift, const Run& run) {
  const auto shifted = [&](const auto& values) {
    auto result = values;
    result.insert(result.begin(), shift, 0);
    return result;
  };
  const std::vector<float> x = shifted(images.x), tx = shifted(images.tx);
  const size_t size = images.delta.size() + shift;
  Pooled out{std::vector<float>(size, -99), std::vector<float>(size, -99),
             std::vector<uint8_t>(size, 99)};
  const bool has_ty = has_tangent || !noise.is_none();
  run(MaxPoolParams{x.data() + shift, has_tangent ? tx.data() + shift : nullptr, out.y.data() + shift,
                    has_ty ? out.ty.data() + shift : nullptr,
                    wants_winners ? out.winners.data() + shift : nullptr, s, noise});
  for (auto* values : {&out.y, &out.ty}) values->erase(values->begin(), values->begin() + shift);
  out.winners.erase(out.winners.begin(), out.winners.begin() + shift);
  if (!has_ty) out.ty.assign(size - shift, 0.0f);
  return out;
}

struct Cpu {
  static void run(const MaxPoolParams& p) {
    const int64_t units = cpu::max_pool_units(p);
    cpu::max_pool(p, 0, units / 2);
    cpu::max_pool(p, units / 2, units);
  }
  static void run(const MaxPoolBackwardParams& p) {
    const int64_t units = cpu::max_pool_backward_units(p);
    cpu::max_pool_backward(p, 0, units / 2);
    cpu::max_pool_backward(p, units / 2, units);
  }
  static void run(const EpilogueParams<float>& p) { cpu::epilogue(p, 0, cpu::epilogue_units(p)); }
};

struct EmulatedCuda {
  static void run(const MaxPoolParams& p) { CHECK(cuda::launch_max_pool(p, nullptr) == cudaSuccess); }
  static void run(const MaxPoolBackwardParams& p) {
    CHECK(cuda::launch_max_pool_backward(p, nullptr) == cudaSuccess);
  }
  static void run(const EpilogueParams<float>& p) {
    CHECK(cuda::launch_epilogue(p, nullptr) == cudaSuccess);
  }
};

// With noise it is, to the last bit, as the pool without and the device's own perturbation after it.
template <class Device>
void test_forward(const PoolShape& s, const Images& images, bool has_tangent, const NoiseParams& noise,
                  bool wants_winners, int shift, Pooled expected) {
  if (!noise.is_none()) {
    EpilogueParams<float> perturbation{};
    const std::vector<float> tangent = expected.ty;
    perturbation.tz = has_tangent ? tangent.data() : nullptr;
    perturbation.ty = expected.ty.data();
    perturbation.samples = s.samples;
    perturbation.features = perturbation.channels = s.out_image();
    perturbation.noise = noise;
    Device::run(perturbation);
  }
  if (!wants_winners) std::fill(expected.winners.begin(), expected.winners.end(), 99);
  const auto run = [](const MaxPoolParams& p) { Device::run(p); };
  CHECK(pool_by(s, images, has_tangent, noise, wants_winners, shift, run) == expected);
}

template <class Device>
void test_backward(const PoolShape& s, const Images& images, const std::vector<uint8_t>& winners,
                   int shift, const std::vector<float>& expected) {
  std::vector<float> delta(shift), dx(images.x.size() + shift, -99);
  std::vector<uint8_t> given(shift);
  delta.insert(delta.end(), images.delta.begin(), images.delta.end());
  given.insert(given.end(), winners.begin(), winners.end());
  Device::run(MaxPoolBackwardParams{given.data() + shift, delta.data() + shift, dx.data() + shift, s});
  CHECK(same({dx.begin() + shift, dx.end()}, expected));
}

// patch: of the noise, which is made for each of them beforehand; 0: for each feature.
void test_case(const Case& c, bool has_tangent, Noise kind, int32_t patch = 0) {
  const PoolShape s = shape_of(c);
  NoiseParams noise{kState, 4, patch > 0 ? Noise::none : kind};
  std::vector<float> given;
  if (patch > 0) {
    noise.patches = {patch, s.out_height, s.out_width, s.channels};
    given.resize(s.samples * noise.patches.features());
    for (size_t i = 0; i < given.size(); ++i) given[i] = static_cast<float>(i % 29) / 8;
    noise.given = given.data();
  }
  const Images images = make_images(s);
  std::vector<float> dx;
  const Pooled expected = search(s, images, has_tangent, dx);
  const std::string best = cpu::isa();
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!cpu::select_isa(isa)) continue;
    test_forward<Cpu>(s, images, has_tangent, noise, /*wants_winners=*/true, 0, expected);
    test_forward<Cpu>(s, images, has_tangent, noise, /*wants_winners=*/false, 0, expected);
    test_backward<Cpu>(s, images, expected.winners, 0, dx);
  }
  cpu::select_isa(best.c_str());
  for (int shift : {0, 1}) {  // as quads, where the channels are, and one by one
    test_forward<EmulatedCuda>(s, images, has_tangent, noise, /*wants_winners=*/shift == 0, shift,
                               expected);
    test_backward<EmulatedCuda>(s, images, expected.winners, shift, dx);
  }
}

// Its y, the pools of it and of the tangent that is not kept, as an epilogue and a pool after it make
// them.
void test_pooled_epilogue(const PoolShape& shape, bool has_tangent, Activation activation) {
  const int64_t features = shape.image(), size = shape.samples * features;
  const int64_t pooled_size = shape.samples * shape.out_image();
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
  const MaxPoolParams m{y.data(),
                        ty.data(),
                        pooled.data(),
                        pooled_ty.data(),
                        /*winners=*/nullptr,
                        shape,
                        kNoNoise};
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

// Windows side by side, and overlapping or apart, with padding.
void test_channels(int32_t channels) {
  const Case cases[] = {{2, 8, 6, channels, {2, 2}, {2, 2}, {0, 0}},
                        {1, 7, 9, channels, {3, 3}, {2, 2}, {1, 1}},
                        {2, 5, 8, channels, {3, 2}, {1, 3}, {1, 0}},
                        {1, 6, 7, channels, {5, 7}, {1, 1}, {2, 3}}};
  for (int i = 0; i < 4; ++i) {
    test_case(cases[i], true, static_cast<Noise>(i % kNoiseCount));
    test_case(cases[i], false, static_cast<Noise>((i + 1) % kNoiseCount));
    test_case(cases[i], i % 2 == 0, Noise::gaussian, /*patch=*/1 + i);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "small") == 0) {
    test_case({1, 8, 6, 15, {2, 2}, {2, 2}, {0, 0}}, true, Noise::gaussian);
    test_case({1, 5, 5, 4, {3, 3}, {2, 2}, {1, 1}}, true, Noise::gaussian);
    return test::failures();
  }
  for (const int32_t channels : {1, 2, 4, 8, 15, 16, 40}) test_channels(channels);
  // Several thread blocks of features that are no quads; the last of 256 places; nothing at all.
  test_case({2, 8, 6, 130, {2, 2}, {2, 2}, {0, 0}}, true, Noise::gaussian);
  test_case({1, 16, 17, 4, {16, 16}, {1, 1}, {0, 0}}, true, Noise::none);
  test_case({0, 4, 4, 4, {2, 2}, {2, 2}, {0, 0}}, true, Noise::gaussian);
  for (const bool has_tangent : {false, true})
    for (const auto f : {Activation::relu, Activation::gelu}) {
      test_pooled_epilogue({3, 24, 24, 15, 12, 12, {2, 2}, {2, 2}, {0, 0}}, has_tangent, f);
      test_pooled_epilogue({2, 7, 9, 3, 4, 5, {3, 3}, {2, 2}, {1, 1}}, has_tangent, f);
      test_pooled_epilogue({1, 6, 7, 40, 5, 4, {2, 4}, {1, 1}, {0, 0}}, has_tangent, f);
    }
  return test::failures();
}
