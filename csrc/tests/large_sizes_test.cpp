#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "tests/kernel_cases.h"

// The CPU kernels on arrays of more than 2^32 elements: their last units, whose indices an arithmetic
// of 32 bits would get wrong, against the reference on those elements alone.

namespace {

using namespace fdfa;
using namespace fdfa::test;

// An array of which memory holds one window that repeats throughout. What is used of it at a time must
// lie at different places of the window.
template <class T>
class Repeating {
 public:
  Repeating(int64_t size, uint32_t key) : bytes_(round_up(size * sizeof(T))) {
    const int file = memfd_create("window", 0);
    if (file < 0 || ftruncate(file, kWindow) != 0) fail();
    data_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (data_ == MAP_FAILED) fail();
    for (int64_t at = 0; at < bytes_; at += kWindow) {
      if (mmap(data_ + at, kWindow, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) ==
          MAP_FAILED)
        fail();
    }
    close(file);
    // A cheap sequence: multiples of an odd number, their upper bits as fractions.
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bfloat16>) {
      for (int64_t i = 0; i < kWindow / static_cast<int64_t>(sizeof(T)); ++i) {
        const uint32_t word = static_cast<uint32_t>(i + 1) * (2654435761u + 2 * key);
        data()[i] = from_float<T>(static_cast<float>(word >> 8) / 8388608.0f - 1.0f);
      }
    }
  }
  ~Repeating() { munmap(data_, bytes_); }
  Repeating(const Repeating&) = delete;

  T* data() { return reinterpret_cast<T*>(data_); }

  std::vector<T> slice(int64_t first, int64_t count) {
    return std::vector<T>(data() + first, data() + first + count);
  }

  void check_close_to(const std::vector<T>& expected, int64_t first, double tolerance,
                      const char* name) {
    for (size_t i = 0; i < expected.size(); ++i) {
      const double reference = to_float(expected[i]);
      check_near(to_float(data()[first + i]), reference, tolerance * (1.0 + std::abs(reference)), name,
                 __FILE__, __LINE__);
    }
  }

 private:
  // No power of two: an index that has lost its upper bits is of another place.
  static constexpr int64_t kWindow = int64_t{3} << 23;

  static int64_t round_up(int64_t bytes) { return (bytes + kWindow - 1) / kWindow * kWindow; }
  [[noreturn]] static void fail() {
    std::perror("large_sizes_test: cannot map an array");
    std::exit(1);
  }

  int64_t bytes_;
  char* data_;
};

// The noise of samples from this one on.
struct NoiseFrom {
  NoiseFrom(int64_t sample) : state{kState[0], kState[1], kState[2] + sample} {}
  int64_t state[3];
};

template <class T>
void test_epilogue() {
  constexpr int64_t kSamples = (int64_t{1} << 21) + 3, kFeatures = 2053, kLast = 2;
  constexpr int64_t kFirst = (kSamples - kLast) * kFeatures, kCount = kLast * kFeatures;
  Repeating<T> z(kSamples * kFeatures, 1), tz(kSamples * kFeatures, 2), y(kSamples * kFeatures, 3),
      ty(kSamples * kFeatures, 4), pre(kSamples * kFeatures, 5);
  const auto z_last = z.slice(kFirst, kCount), tz_last = tz.slice(kFirst, kCount);
  std::vector<T> y_last(kCount), ty_last(kCount), pre_last(kCount);
  EpilogueParams<T> p{};
  p.z = z.data(), p.tz = tz.data(), p.y = y.data(), p.ty = ty.data(), p.pre = pre.data();
  p.samples = kSamples, p.features = p.channels = kFeatures;
  p.activation = Activation::gelu;
  p.noise = {kState, 2, Noise::gaussian};
  const int64_t units = cpu::epilogue_units(p);
  cpu::epilogue(p, units - kLast * (units / kSamples), units);
  const NoiseFrom noise(kSamples - kLast);
  p.z = z_last.data(), p.tz = tz_last.data();
  p.y = y_last.data(), p.ty = ty_last.data(), p.pre = pre_last.data();
  p.samples = kLast;
  p.noise.state = noise.state;
  epilogue(p);
  y.check_close_to(y_last, kFirst, kTolerance<T>, "y");
  ty.check_close_to(ty_last, kFirst, kTolerance<T>, "ty");
  pre.check_close_to(pre_last, kFirst, kTolerance<T>, "pre");
}

void test_transposed_epilogue() {
  constexpr int64_t kSamples = (1 << 15) + 5, kFeatures = (1 << 17) + 9, kPitch = kSamples + 2;
  Repeating<float> z(kFeatures * kPitch, 1), tz(kFeatures * kPitch, 2), y(kSamples * kFeatures, 3),
      ty(kSamples * kFeatures, 4);
  EpilogueParams<float> p{};
  p.z = z.data(), p.tz = tz.data(), p.y = y.data(), p.ty = ty.data();
  p.samples = kSamples, p.features = p.channels = kFeatures;
  p.activation = Activation::tanh;
  p.noise = {kState, 2, Noise::gaussian};
  p.transposed_pitch = kPitch;
  const int64_t units = cpu::epilogue_units(p);
  cpu::epilogue(p, units - 1, units);
  for (int64_t n = kSamples - kSamples % 16; n < kSamples; ++n) {
    for (int64_t i = kFeatures - kFeatures % 128; i < kFeatures; ++i) {
      const double a = z.data()[i * kPitch + n], ta = tz.data()[i * kPitch + n];
      const double tangent = slope(p.activation, a) * ta + noise(p.noise, n, i);
      CHECK_NEAR(y.data()[n * kFeatures + i], activate(p.activation, a), kTolerance<float>);
      CHECK_NEAR(ty.data()[n * kFeatures + i], tangent, 8 * kTolerance<float>);
    }
  }
}

// The last columns of B, and of all samples' errors and activations.
void test_feedback_step(bool transposed, Noise kind) {
  constexpr int64_t kSamples = 65, kFeatures = (int64_t{1} << 26) + 12293, kOutputs = 65;
  constexpr int64_t kCount = kFeatures % 64, kFirst = kFeatures - kCount;
  Repeating<float> feedback(kOutputs * kFeatures, 1), exp_avg(kOutputs * kFeatures, 2),
      exp_avg_sq(kOutputs * kFeatures, 3), saved(kSamples * kFeatures, 4),
      source(kSamples * kFeatures, 5), delta(kSamples * kFeatures, 6), bias_grad(kFeatures, 7);
  for (int64_t k = 0; k < kOutputs; ++k) {
    for (int64_t i = kFirst; i < kFeatures; ++i) exp_avg_sq.data()[k * kFeatures + i] += 1.0f;
  }
  Array<float> error(kSamples * kOutputs, 8), factor(kSamples * kOutputs, 9);
  const int64_t updates = 5;
  FeedbackParams<float> p{};
  p.feedback = feedback.data(), p.exp_avg = exp_avg.data(), p.exp_avg_sq = exp_avg_sq.data();
  p.updates = &updates;
  p.error = error.data(), p.factor = factor.data();
  p.source = kind == Noise::none ? source.data() : nullptr;
  p.saved_activation = saved.data();
  p.delta = delta.data();
  p.bias_grad = bias_grad.data();
  p.samples = kSamples, p.features = kFeatures, p.outputs = kOutputs;
  p.activation = Activation::relu;
  p.noise = {kState, 2, kind};
  p.rule = Rule::adam;
  p.scale = 0.3f, p.decay = 0.7f, p.beta1 = 0.9, p.beta2 = 0.999, p.lr = 0.03f, p.eps = 1e-8f;
  p.transposed = transposed;

  const auto columns = [](Repeating<float>& of, int64_t rows) {
    std::vector<float> found;
    for (int64_t row = 0; row < rows; ++row) {
      for (const float value : of.slice(row * kFeatures + kFirst, kCount)) found.push_back(value);
    }
    return found;
  };
  std::vector<float> b = columns(feedback, kOutputs), m = columns(exp_avg, kOutputs),
                     v = columns(exp_avg_sq, kOutputs), saved_last = columns(saved, kSamples),
                     s = columns(source, kSamples), delta_last(kSamples * kCount), bias_last(kCount);
  for (int64_t n = 0; kind != Noise::none && n < kSamples; ++n) {
    for (int64_t i = 0; i < kCount; ++i)
      s[n * kCount + i] = static_cast<float>(noise(p.noise, n, kFirst + i));
  }
  FeedbackParams<float> e = p;
  e.feedback = b.data(), e.exp_avg = m.data(), e.exp_avg_sq = v.data();
  e.source = s.data();
  e.saved_activation = saved_last.data();
  e.delta = delta_last.data();
  e.bias_grad = bias_last.data();
  e.features = kCount;
  feedback_step(e);

  const int64_t units = cpu::feedback_units(p);
  cpu::feedback_step(p, units - 1, units);
  const auto check_rows = [](Repeating<float>& actual, const std::vector<float>& expected,
                             const char* name) {
    for (int64_t row = 0; row * kCount < static_cast<int64_t>(expected.size()); ++row) {
      const std::vector<float> part(expected.begin() + row * kCount,
                                    expected.begin() + (row + 1) * kCount);
      actual.check_close_to(part, row * kFeatures + kFirst, kSumTolerance<float>, name);
    }
  };
  check_rows(feedback, b, "B");
  check_rows(exp_avg, m, "exp_avg");
  check_rows(exp_avg_sq, v, "exp_avg_sq");
  bias_grad.check_close_to(bias_last, kFirst, kSumTolerance<float> * 8, "bias_grad");
  if (transposed) {
    delta.check_close_to(delta_last, kFirst * kSamples, kSumTolerance<float>, "delta");
  } else {
    check_rows(delta, delta_last, "delta");
  }
}

void test_spread() {
  const Patches patches{2, 33, 65, 36};
  const int64_t image = patches.image(), features = patches.features(), last = 59999;
  Repeating<float> projected((last + 1) * features, 1), saved((last + 1) * image, 2),
      delta((last + 1) * image, 3);
  const auto projected_last = projected.slice(last * features, features),
             saved_last = saved.slice(last * image, image);
  std::vector<float> delta_last(image);
  SpreadParams<float> p{projected.data(), saved.data(), delta.data(),
                        last + 1,         patches,      Activation::sigmoid};
  const int64_t units = cpu::spread_units(p);
  cpu::spread(p, units - patches.rows(), units);
  p.projected = projected_last.data(), p.saved_activation = saved_last.data();
  p.delta = delta_last.data();
  p.samples = 1;
  spread(p);
  delta.check_close_to(delta_last, last * image, kTolerance<float>, "delta of pixels");
}

void test_max_pool() {
  const PoolShape shape{50000, 40, 40, 64, 20, 20, {3, 3}, {2, 2}, {1, 1}};
  const int64_t last = shape.samples - 1, image = shape.image(), out_image = shape.out_image();
  const int64_t size = shape.samples * image, out_size = shape.samples * out_image;
  Repeating<float> x(size, 1), tx(size, 2), y(out_size, 3), ty(out_size, 4), dx(size, 5), pre(size, 6);
  Repeating<uint8_t> winners(out_size, 7);
  const auto x_last = x.slice(last * image, image), tx_last = tx.slice(last * image, image);
  std::vector<float> y_last(out_image), ty_last(out_image), dx_last(image);
  std::vector<uint8_t> winners_last(out_image);
  const NoiseFrom noise(last);
  PoolShape one = shape;
  one.samples = 1;

  MaxPoolParams p{
      x.data(), tx.data(), y.data(), ty.data(), winners.data(), shape, {kState, 2, Noise::gaussian},
      {}};
  const int64_t units = cpu::max_pool_units(p);
  cpu::max_pool(p, units - shape.out_height, units);
  max_pool({x_last.data(),
            tx_last.data(),
            y_last.data(),
            ty_last.data(),
            winners_last.data(),
            one,
            {noise.state, 2, Noise::gaussian},
            {}});
  y.check_close_to(y_last, last * out_image, 0.0, "pooled");
  ty.check_close_to(ty_last, last * out_image, kTolerance<float>, "tangent of pooled");
  CHECK(winners.slice(last * out_image, out_image) == winners_last);

  cpu::max_pool_backward({winners.data(), y.data(), dx.data(), shape}, last, last + 1);
  max_pool_backward({winners_last.data(), y_last.data(), dx_last.data(), one});
  dx.check_close_to(dx_last, last * image, kTolerance<float>, "dx");

  EpilogueParams<float> e{};
  e.z = x.data(), e.tz = tx.data(), e.y = dx.data(), e.pre = pre.data();
  e.samples = shape.samples, e.features = image, e.channels = shape.channels;
  e.activation = Activation::silu;
  e.noise = {kState, 2, Noise::gaussian};
  cpu::pooled_epilogue({e, y.data(), ty.data(), shape}, last, last + 1);
  std::vector<float> finished(image), finished_tangent(image), pre_last(image);
  e.z = x_last.data(), e.tz = tx_last.data();
  e.y = finished.data(), e.ty = finished_tangent.data(), e.pre = pre_last.data();
  e.samples = 1;
  e.noise.state = noise.state;
  epilogue(e);
  max_pool({finished.data(),
            finished_tangent.data(),
            y_last.data(),
            ty_last.data(),
            winners_last.data(),
            one,
            kNoNoise,
            {}});
  dx.check_close_to(finished, last * image, kTolerance<float>, "y before its pool");
  pre.check_close_to(pre_last, last * image, kTolerance<float>, "pre before its pool");
  y.check_close_to(y_last, last * out_image, kTolerance<float>, "pooled y");
  ty.check_close_to(ty_last, last * out_image, kTolerance<float>, "pooled ty");
}

void test_batch_norm() {
  constexpr int64_t kRows = (int64_t{1} << 26) + 1, kChannels = 67;
  const int64_t part_rows = cpu::moment_part_rows(kChannels), last_rows = kRows % part_rows;
  Repeating<float> x(kRows * kChannels, 1), t(kRows * kChannels, 2), out(kRows * kChannels, 3);
  Array<float> pivot(kChannels, 4), scale(kChannels, 5), slope(kChannels, 6), offset(kChannels, 7);
  MomentParams p{x.data(), t.data(), pivot.data(), nullptr, kRows, kChannels, 0};
  p.parts = cpu::moment_units(p);
  Repeating<double> sums(p.parts * 4 * kChannels, 8);
  p.sums = sums.data();
  cpu::moments(p, p.parts - 1, p.parts);
  const int64_t first = (kRows - last_rows) * kChannels, last = (p.parts - 1) * 4 * kChannels;
  const auto x_last = x.slice(first, last_rows * kChannels),
             t_last = t.slice(first, last_rows * kChannels);
  std::vector<double> expected(4 * kChannels);
  moments({x_last.data(), t_last.data(), pivot.data(), expected.data(), last_rows, kChannels, 1},
          last_rows);
  for (int64_t i = 0; i < 4 * kChannels; ++i) {
    CHECK_NEAR(sums.data()[last + i], expected[i], kTolerance<float> * last_rows);
  }

  const ChannelMap map{scale.data(), slope.data(), offset.data()};
  const CombineParams c{x.data(), t.data(), out.data(), map, kRows, kChannels};
  const int64_t units = cpu::combine_units(c);
  cpu::combine(c, units - 2, units);
  for (int64_t i = kRows * kChannels - 1024; i < kRows * kChannels; ++i) {
    const int64_t channel = i % kChannels;
    const double value = double{scale.data()[channel]} * t.data()[i] +
                         double{slope.data()[channel]} * x.data()[i] + offset.data()[channel];
    CHECK_NEAR(out.data()[i], value, 4 * kTolerance<float>);
  }
}

}  // namespace

int main() {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!cpu::select_isa(isa)) {
      std::printf("%s: not on this CPU\n", isa);
      continue;
    }
    test_epilogue<float>();
    test_epilogue<bfloat16>();
    test_transposed_epilogue();
    for (const bool transposed : {false, true}) {
      test_feedback_step(transposed, Noise::none);
      test_feedback_step(transposed, Noise::rademacher);
    }
    test_spread();
    test_max_pool();
    test_batch_norm();
    std::printf("%s: done\n", cpu::isa());
  }
  return failures();
}
