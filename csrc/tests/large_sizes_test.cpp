#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
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

constexpr int64_t kLast = 4;  // elements that are looked at, which every last unit has

struct Cpu {
  static constexpr bool kIsCpu = true;
  template <class T>
  static void epilogue(const EpilogueParams<T>& p) {
    const int64_t units = cpu::epilogue_units(p);
    cpu::epilogue(p, units - 1, units);
  }
  static void feedback_step(const FeedbackParams<float>& p) {
    const int64_t units = cpu::feedback_units(p);
    cpu::feedback_step(p, units - 1, units);
  }
  static void spread(const SpreadParams<float>& p) {
    const int64_t units = cpu::spread_units(p);
    cpu::spread(p, units - 1, units);
  }
  static void max_pool(const MaxPoolParams& p) {
    const int64_t units = cpu::max_pool_units(p);
    cpu::max_pool(p, units - 1, units);
  }
  static void max_pool_backward(const MaxPoolBackwardParams& p) {
    cpu::max_pool_backward(p, p.shape.samples - 1, p.shape.samples);
  }
  static int64_t moment_parts(const MomentParams& p) { return cpu::moment_units(p); }
  static int64_t part_rows(const MomentParams& p) { return cpu::moment_part_rows(p.channels); }
  static void moments(const MomentParams& p) { cpu::moments(p, p.parts - 1, p.parts); }
  static void combine(const CombineParams& p) {
    const int64_t units = cpu::combine_units(p);
    cpu::combine(p, units - 1, units);
  }
};

struct Cuda {
  static constexpr bool kIsCpu = false;
  template <class T>
  static void epilogue(const EpilogueParams<T>& p) {
    CHECK(cuda::launch_epilogue(p, nullptr) == cudaSuccess);
  }
  static void feedback_step(const FeedbackParams<float>& p) {
    CHECK(cuda::launch_feedback_step(&p, 1, nullptr, nullptr, nullptr) == cudaSuccess);
  }
  static void spread(const SpreadParams<float>& p) {
    CHECK(cuda::launch_spread(p, nullptr) == cudaSuccess);
  }
  static void max_pool(const MaxPoolParams& p) {
    CHECK(cuda::launch_max_pool(p, nullptr) == cudaSuccess);
  }
  static void max_pool_backward(const MaxPoolBackwardParams& p) {
    CHECK(cuda::launch_max_pool_backward(p, nullptr) == cudaSuccess);
  }
  static int64_t moment_parts(const MomentParams& p) { return cuda::moment_parts(p.rows, p.channels); }
  static int64_t part_rows(const MomentParams& p) { return (p.rows + p.parts - 1) / p.parts; }
  static void moments(const MomentParams& p) { CHECK(cuda::launch_moments(p, nullptr) == cudaSuccess); }
  static void combine(const CombineParams& p) {
    CHECK(cuda::launch_combine(p, nullptr) == cudaSuccess);
  }
};

// features: of a sample, for kernels that take four at once, or not.
template <class Backend, class T>
void test_epilogue(int64_t features) {
  constexpr int64_t kSamples = 5;
  const int64_t size = kSamples * features, first = size - kLast;
  Repeating<T> z(size, 1), tz(size, 2), y(size, 3), ty(size, 4), pre(size, 5);
  const auto z_last = z.slice(first, kLast), tz_last = tz.slice(first, kLast);
  EpilogueParams<T> p{};
  p.z = z.data(), p.tz = tz.data(), p.y = y.data(), p.ty = ty.data(), p.pre = pre.data();
  p.samples = kSamples, p.features = p.channels = features;
  p.activation = Activation::gelu;
  p.noise = {kState, 2, Noise::gaussian};
  Backend::epilogue(p);
  for (int64_t i = 0; i < kLast; ++i) {
    const double a = to_float(z_last[i]), ta = to_float(tz_last[i]);
    const double u = noise(p.noise, kSamples - 1, features - kLast + i);
    CHECK_NEAR(to_float(pre.data()[first + i]), a, kTolerance<T>);
    CHECK_NEAR(to_float(y.data()[first + i]), activate(p.activation, a), 2 * kTolerance<T>);
    CHECK_NEAR(to_float(ty.data()[first + i]), slope(p.activation, a) * ta + u, 8 * kTolerance<T>);
  }
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
  Cpu::epilogue(p);
  for (int64_t n = kSamples - kLast; n < kSamples; ++n) {
    for (int64_t i = kFeatures - kLast; i < kFeatures; ++i) {
      const double a = z.data()[i * kPitch + n], ta = tz.data()[i * kPitch + n];
      const double tangent = slope(p.activation, a) * ta + noise(p.noise, n, i);
      CHECK_NEAR(y.data()[n * kFeatures + i], activate(p.activation, a), kTolerance<float>);
      CHECK_NEAR(ty.data()[n * kFeatures + i], tangent, 8 * kTolerance<float>);
    }
  }
}

// The last columns of B, and of all samples' errors and activations.
template <class Backend>
void test_feedback_step(int64_t features, bool transposed, Noise kind) {
  constexpr int64_t kSamples = 65, kOutputs = 65;
  Repeating<float> feedback(kOutputs * features, 1), exp_avg(kOutputs * features, 2),
      exp_avg_sq(kOutputs * features, 3), saved(kSamples * features, 4), source(kSamples * features, 5),
      delta(kSamples * features, 6), bias_grad(features, 7);
  const auto columns = [&](Repeating<float>& of, int64_t rows) {
    std::vector<float> found;
    for (int64_t row = 0; row < rows; ++row) {
      for (const float value : of.slice((row + 1) * features - kLast, kLast)) found.push_back(value);
    }
    return found;
  };
  for (int64_t at = features - kLast; at < kOutputs * features; at += features) {
    for (int64_t i = 0; i < kLast; ++i) exp_avg_sq.data()[at + i] += 1.0f;
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
  p.samples = kSamples, p.features = features, p.outputs = kOutputs;
  p.activation = Activation::relu;
  p.noise = {kState, 2, kind};
  p.rule = Rule::adam;
  p.scale = 0.3f, p.decay = 0.7f, p.beta1 = 0.9, p.beta2 = 0.999, p.lr = 0.03f, p.eps = 1e-8f;
  p.transposed = transposed;

  std::vector<float> b = columns(feedback, kOutputs), m = columns(exp_avg, kOutputs),
                     v = columns(exp_avg_sq, kOutputs), saved_last = columns(saved, kSamples),
                     s = columns(source, kSamples), delta_last(kSamples * kLast), bias_last(kLast);
  for (int64_t at = 0; kind != Noise::none && at < kSamples * kLast; ++at) {
    s[at] = static_cast<float>(noise(p.noise, at / kLast, features - kLast + at % kLast));
  }
  FeedbackParams<float> e = p;
  e.feedback = b.data(), e.exp_avg = m.data(), e.exp_avg_sq = v.data();
  e.source = s.data();
  e.saved_activation = saved_last.data();
  e.delta = delta_last.data();
  e.bias_grad = bias_last.data();
  e.features = kLast;
  e.transposed = false;
  feedback_step(e);
  Backend::feedback_step(p);

  for (int64_t at = 0; at < kOutputs * kLast; ++at) {
    const int64_t from = (at / kLast + 1) * features - kLast + at % kLast;
    CHECK_NEAR(feedback.data()[from], b[at], kSumTolerance<float>);
    CHECK_NEAR(exp_avg.data()[from], m[at], kSumTolerance<float>);
    CHECK_NEAR(exp_avg_sq.data()[from], v[at], kSumTolerance<float>);
  }
  for (int64_t at = 0; at < kSamples * kLast; ++at) {
    const int64_t n = at / kLast, i = features - kLast + at % kLast;
    const int64_t from = transposed ? i * kSamples + n : n * features + i;
    CHECK_NEAR(delta.data()[from], delta_last[at], 8 * kSumTolerance<float>);
  }
  for (int64_t i = 0; i < kLast; ++i) {
    CHECK_NEAR(bias_grad.data()[features - kLast + i], bias_last[i], 64 * kSumTolerance<float>);
  }
}

template <class Backend>
void test_spread(const Patches& patches) {
  constexpr int64_t kSamples = 5;
  const int64_t image = patches.image(), features = patches.features();
  Repeating<float> projected(kSamples * features, 1), saved(kSamples * image, 2),
      delta(kSamples * image, 3);
  const SpreadParams<float> p{projected.data(), saved.data(), delta.data(),
                              kSamples,         patches,      Activation::sigmoid};
  Backend::spread(p);
  for (int64_t i = image - kLast; i < image; ++i) {
    const double of_patch = projected.data()[(kSamples - 1) * features + patch_feature(patches, i)];
    const int64_t at = (kSamples - 1) * image + i;
    CHECK_NEAR(delta.data()[at], of_patch * slope_at(p.activation, saved.data()[at]),
               kTolerance<float>);
  }
}

// What the last image has in common with one that is alone.
struct LastImage {
  explicit LastImage(const PoolShape& shape)
      : one(shape), state{kState[0], kState[1], kState[2] + shape.samples - 1} {
    one.samples = 1;
  }
  PoolShape one;
  int64_t state[3];
};

template <class Backend>
void test_max_pool(int32_t channels) {
  const PoolShape shape{60000, 40, 40, channels, 20, 20, {3, 3}, {2, 2}, {1, 1}};
  const int64_t image = shape.image(), out_image = shape.out_image();
  const int64_t size = shape.samples * image, out_size = shape.samples * out_image;
  Repeating<float> x(size, 1), tx(size, 2), y(out_size, 3), ty(out_size, 4), delta(out_size, 5),
      dx(size, 6);
  Repeating<uint8_t> winners(out_size, 7);
  const auto x_last = x.slice(size - image, image), tx_last = tx.slice(size - image, image),
             delta_last = delta.slice(out_size - out_image, out_image);
  std::vector<float> y_last(out_image), ty_last(out_image), dx_last(image);
  std::vector<uint8_t> winners_last(out_image);
  const LastImage last(shape);

  Backend::max_pool({x.data(),
                     tx.data(),
                     y.data(),
                     ty.data(),
                     winners.data(),
                     shape,
                     {kState, 2, Noise::gaussian},
                     {}});
  max_pool({x_last.data(),
            tx_last.data(),
            y_last.data(),
            ty_last.data(),
            winners_last.data(),
            last.one,
            {last.state, 2, Noise::gaussian},
            {}});
  for (int64_t i = 1; i <= kLast; ++i) {
    CHECK(y.data()[out_size - i] == y_last[out_image - i]);
    CHECK_NEAR(ty.data()[out_size - i], ty_last[out_image - i], 8 * kTolerance<float>);
    CHECK(winners.data()[out_size - i] == winners_last[out_image - i]);
  }
  std::copy(winners_last.begin(), winners_last.end(), winners.data() + out_size - out_image);
  Backend::max_pool_backward({winners.data(), delta.data(), dx.data(), shape});
  max_pool_backward({winners_last.data(), delta_last.data(), dx_last.data(), last.one});
  for (int64_t i = 1; i <= kLast; ++i) {
    CHECK_NEAR(dx.data()[size - i], dx_last[image - i], 4 * kTolerance<float>);
  }
}

void test_pooled_epilogue() {
  const PoolShape shape{60000, 40, 40, 64, 20, 20, {3, 3}, {2, 2}, {1, 1}};
  const int64_t image = shape.image(), out_image = shape.out_image();
  const int64_t size = shape.samples * image, out_size = shape.samples * out_image;
  Repeating<float> z(size, 1), tz(size, 2), y(size, 3), pre(size, 4), pooled(out_size, 5),
      tangent(out_size, 6);
  const auto z_last = z.slice(size - image, image), tz_last = tz.slice(size - image, image);
  std::vector<float> y_last(image), ty_last(image), pre_last(image), pooled_last(out_image),
      tangent_last(out_image);
  const LastImage last(shape);
  EpilogueParams<float> p{};
  p.z = z.data(), p.tz = tz.data(), p.y = y.data(), p.pre = pre.data();
  p.samples = shape.samples, p.features = image, p.channels = shape.channels;
  p.activation = Activation::silu;
  p.noise = {kState, 2, Noise::gaussian};
  cpu::pooled_epilogue({p, pooled.data(), tangent.data(), shape}, shape.samples - 1, shape.samples);
  p.z = z_last.data(), p.tz = tz_last.data();
  p.y = y_last.data(), p.ty = ty_last.data(), p.pre = pre_last.data();
  p.samples = 1;
  p.noise.state = last.state;
  epilogue(p);
  max_pool({y_last.data(),
            ty_last.data(),
            pooled_last.data(),
            tangent_last.data(),
            nullptr,
            last.one,
            kNoNoise,
            {}});
  for (int64_t i = 1; i <= kLast; ++i) {
    CHECK_NEAR(y.data()[size - i], y_last[image - i], kTolerance<float>);
    CHECK_NEAR(pre.data()[size - i], pre_last[image - i], kTolerance<float>);
    CHECK_NEAR(pooled.data()[out_size - i], pooled_last[out_image - i], kTolerance<float>);
    CHECK_NEAR(tangent.data()[out_size - i], tangent_last[out_image - i], 8 * kTolerance<float>);
  }
}

template <class Backend>
void test_batch_norm(int64_t channels) {
  constexpr int64_t kRows = (int64_t{1} << 26) + 100;
  const int64_t size = kRows * channels;
  Repeating<float> x(size, 1), t(size, 2), out(size, 3);
  Array<float> pivot(channels, 4), scale(channels, 5), slope(channels, 6), offset(channels, 7);
  MomentParams p{x.data(), t.data(), pivot.data(), nullptr, kRows, channels, 0};
  p.parts = Backend::moment_parts(p);
  Repeating<double> sums(p.parts * 4 * channels, 8);
  p.sums = sums.data();
  Backend::moments(p);
  const int64_t rows = kRows - (p.parts - 1) * Backend::part_rows(p), first = size - rows * channels;
  CHECK(rows > 1);
  const auto x_last = x.slice(first, rows * channels), t_last = t.slice(first, rows * channels);
  std::vector<double> expected(4 * channels);
  moments({x_last.data(), t_last.data(), pivot.data(), expected.data(), rows, channels, 1}, rows);
  for (int64_t kind = 0; kind < 4; ++kind) {
    for (int64_t c = channels - kLast; c < channels; ++c) {
      const double sum = sums.data()[(p.parts - 1) * 4 * channels + kind * channels + c];
      CHECK_NEAR(sum, expected[kind * channels + c], kTolerance<float> * static_cast<double>(rows));
    }
  }
  const ChannelMap map{scale.data(), slope.data(), offset.data()};
  Backend::combine({x.data(), t.data(), out.data(), map, kRows, channels});
  for (int64_t c = channels - kLast; c < channels; ++c) {
    const int64_t at = size - channels + c;
    const double value = double{scale.data()[c]} * t.data()[at] +
                         double{slope.data()[c]} * x.data()[at] + offset.data()[c];
    CHECK_NEAR(out.data()[at], value, 4 * kTolerance<float>);
  }
}

template <class Backend>
void test_kernels() {
  for (const int64_t features : {(int64_t{1} << 30) - 116, (int64_t{1} << 30) - 117}) {
    test_epilogue<Backend, float>(features);
    test_epilogue<Backend, bfloat16>(features);
  }
  // In the window, the rows of such matrices lie hundreds of elements apart.
  for (const int64_t features : {67109004, 67109056}) {
    for (const bool transposed : {false, true}) {
      if (transposed && !Backend::kIsCpu) continue;
      test_feedback_step<Backend>(features, transposed, Noise::none);
      test_feedback_step<Backend>(features, transposed, Noise::rademacher);
    }
  }
  for (const int32_t channels : {28, 31}) test_spread<Backend>({16, 8192, 4096, channels});
  for (const int32_t channels : {64, 69}) {
    test_max_pool<Backend>(channels);
    test_batch_norm<Backend>(channels);
  }
}

}  // namespace

int main() {
  test_kernels<Cpu>();  // of one instruction set: all are compiled from one source
  test_transposed_epilogue();
  test_pooled_epilogue();
  emulation::run_last_block_alone(true);
  test_kernels<Cuda>();
  return failures();
}
