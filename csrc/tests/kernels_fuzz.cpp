#include <chrono>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "common/divisor.h"
#include "common/max_pool.h"
#include "cpu/kernels.h"
#include "tests/check.h"
#include "tests/reference.h"

// Random parameters for all CPU kernels, with every instruction set of this CPU, against the reference.
// Every array lies on the heap in exactly its size, so that the address sanitizer sees a read or write
// one byte beyond it. Built with the thread sanitizer, threads share the units of each call.
//
//   kernels_fuzz [seconds] [seed]

namespace {

using namespace fdfa;

std::string described;  // the call under way, for whoever looks into a failure

void print_call() {
  std::printf("%s\n", described.c_str());
  std::fflush(stdout);
}

}  // namespace

// The two sanitizers' ways to say that they have found something.
extern "C" void __sanitizer_set_death_callback(void (*)());
extern "C" void __ubsan_on_report();
void __ubsan_on_report() { print_call(); }

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t between(int64_t least, int64_t most) {
    const uint64_t count = static_cast<uint64_t>(most) - static_cast<uint64_t>(least) + 1;
    return static_cast<int64_t>(static_cast<uint64_t>(least) + engine_() % count);
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  bool coin() { return one_in(2); }
  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }
  // Whole vectors, an element less or more, or anything; at times nothing.
  int64_t extent(int64_t most, int64_t least = 0) {
    const int64_t near = (int64_t{1} << between(0, 7)) + between(-1, 1);
    return std::clamp(coin() ? near : between(least, most), least, most);
  }
  // A feature count, at times of several runs of an epilogue.
  int64_t features() { return one_in(8) ? between(1000, 2100) : extent(200); }

 private:
  std::mt19937_64 engine_;
};

enum class Values {
  grid,    // few digits, so that sums are exact and both sides are on the same side of relu's kink
  any,     // infinite, NaN and subnormal ones too: for the sanitizers alone
  winners  // of a pool of so few values that windows have equals, and NaN
};

template <class T>
T value(Random& random, Values kind) {
  if constexpr (std::is_integral_v<T> || std::is_same_v<T, double>) {
    return static_cast<T>(random.between(0, 255));
  } else {
    const auto number = static_cast<double>(random.between(-64, 64)) / 64;
    if (kind == Values::grid) return from_float<T>(static_cast<float>(number));
    const auto inf = std::numeric_limits<float>::infinity(), nan = inf - inf;
    if (kind == Values::winners) {
      return from_float<T>(random.one_in(40) ? nan : static_cast<float>(random.between(-2, 2)));
    }
    const float special[] = {inf, -inf, nan, -nan, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f, 100.0f, -100.0f};
    return from_float<T>(random.coin() ? static_cast<float>(number) : special[random.between(0, 10)]);
  }
}

// Equal memory for the kernel and for the reference. Its start is that of an element, as a view's is;
// the elements before it must keep their values.
template <class T>
class Twin {
 public:
  Twin(Random& random, int64_t size, Values kind = Values::grid)
      : size_(size), shift_(random.coin() ? 0 : random.between(1, 17)) {
    for (auto& side : sides_) side.reset(new T[shift_ + size_]);
    for (int64_t i = 0; i < shift_ + size_; ++i) {
      sides_[0][i] = sides_[1][i] = value<T>(random, kind);
    }
  }

  // side 0: the kernel's, 1: the reference's. Null where there is nothing, as torch has it.
  T* operator[](int side) const { return size_ > 0 ? sides_[side].get() + shift_ : nullptr; }
  int64_t size() const { return size_; }

  void set(int64_t i, T value) {
    for (auto& side : sides_) side[shift_ + i] = value;
  }

  // Relative to 1 + |value|.
  void check(const char* name, double tolerance = 0.0) const {
    for (int64_t i = 0; i < shift_ + size_; ++i) {
      const double actual = number(sides_[0][i]), expected = number(sides_[1][i]);
      const double allowed = i < shift_ ? 0.0 : tolerance * (1 + std::abs(expected));
      test::check_near(actual, expected, allowed, name, __FILE__, __LINE__);
    }
  }

 private:
  static double number(T x) {
    if constexpr (std::is_arithmetic_v<T>) {
      return static_cast<double>(x);
    } else {
      return to_float(x);
    }
  }

  int64_t size_, shift_;
  std::unique_ptr<T[]> sides_[2];
};

#ifdef __SANITIZE_THREAD__
constexpr bool kInThreads = true;
#else
constexpr bool kInThreads = false;
#endif

// The units in parts, as threads would take them.
template <class F>
void in_parts(Random& random, int64_t units, const F& kernel) {
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < units;) {
    const int64_t end = random.coin() ? units : random.between(begin, units);
    if (begin < end) {
      if (kInThreads) {
        threads.emplace_back(kernel, begin, end);
      } else {
        kernel(begin, end);
      }
    }
    begin = end;
  }
  for (std::thread& thread : threads) thread.join();
}

struct Fuzz {
  Random random;
  int64_t calls = 0;
  std::ostringstream text = {};

  // Of the parameters that come, by name.
  template <class... Args>
  void describe(const char* kernel, const Args&... args) {
    text.str({});
    text << cpu::isa() << " " << kernel;
    ((text << ' ' << args), ...);
    described = text.str();
    ++calls;
  }
  static std::string show(const PoolShape& s) {
    std::ostringstream out;
    out << "shape " << s.samples << ' ' << s.height << ' ' << s.width << ' ' << s.channels << " to "
        << s.out_height << ' ' << s.out_width << " by " << s.kernel[0] << ' ' << s.kernel[1]
        << " stride " << s.stride[0] << ' ' << s.stride[1] << " padding " << s.padding[0] << ' '
        << s.padding[1];
    return out.str();
  }
  static std::string show(const Patches& p) {
    std::ostringstream out;
    out << "patches " << p.size << " of " << p.height << ' ' << p.width << ' ' << p.channels;
    return out.str();
  }

  Activation activation() { return static_cast<Activation>(random.between(0, kActivationCount - 1)); }
  Noise noise() { return random.of({Noise::gaussian, Noise::rademacher, Noise::none}); }

  Patches patches(bool pixels_only = false) {
    const auto side = [&] {
      return static_cast<int32_t>(random.between(0, random.one_in(4) ? 12 : 6));
    };
    const int32_t height = side(), width = side();
    const int32_t most = std::max({1, height, width});
    const auto channels = static_cast<int32_t>(random.extent(random.one_in(4) ? 40 : 10, 1));
    return {pixels_only ? 1 : static_cast<int32_t>(random.between(1, most)), height, width, channels};
  }

  PoolShape pool_shape() {
    PoolShape s{};
    s.samples = random.between(0, 3);
    s.channels = static_cast<int32_t>(random.extent(random.one_in(4) ? 70 : 20));
    int32_t* const sides[] = {&s.height, &s.width};
    int32_t* const outs[] = {&s.out_height, &s.out_width};
    for (int i = 0; i < 2; ++i) {
      const auto side = static_cast<int32_t>(random.between(1, 9));
      int32_t kernel = 0, padding = 0;
      do {
        kernel = static_cast<int32_t>(random.between(1, 16));
        padding = static_cast<int32_t>(random.between(0, kernel / 2));
      } while (side + 2 * padding < kernel);
      s.kernel[i] = kernel;
      s.padding[i] = padding;
      s.stride[i] =
          static_cast<int32_t>(random.one_in(10) ? random.between(1, 1 << 30) : random.between(1, 5));
      *sides[i] = side;
      *outs[i] = (side + 2 * padding - kernel) / s.stride[i] + 1;
    }
    return s;
  }

  struct Noises {  // what NoiseParams point to
    Twin<int64_t> state;
    Twin<float> given;
    int64_t block;
    Noise kind;
    Patches patches;

    NoiseParams params(int side) const {
      NoiseParams p{state[side], block, kind};
      if (patches.size == 0) return p;
      p.given = given[side];
      p.patches = patches;
      return p;
    }
  };
  Noises noises(Noise kind, int64_t samples, const Patches& patches = {}) {
    Noises n{{random, 3},
             {random, patches.size > 0 ? samples * patches.features() : 0},
             random.between(0, 1 << 20),
             patches.size > 0 ? Noise::none : kind,
             patches};
    n.state.set(0, random.between(std::numeric_limits<int64_t>::min(),
                                  std::numeric_limits<int64_t>::max() - 1));
    n.state.set(1, random.between(0, int64_t{1} << 33));
    n.state.set(2, random.between(0, int64_t{1} << 33));
    return n;
  }

  template <class T>
  void epilogue() {
    const bool in_patches = random.one_in(4), transposed = !in_patches && random.one_in(4);
    const Patches image = in_patches ? patches() : Patches{};
    const int64_t channels = in_patches ? image.channels : random.extent(130, 1);
    const int64_t features = in_patches         ? test::image_features(image)
                             : random.one_in(3) ? channels
                             : transposed       ? channels
                                                : random.features() / channels * channels;
    const int64_t samples = random.extent(features > 300 ? 3 : random.one_in(4) ? 40 : 9);
    const int64_t pitch = transposed ? samples + random.between(0, 20) : 0;
    const bool has_z = transposed || !random.one_in(4), has_tz = random.coin(),
               has_bias = random.coin();
    const bool mapped = has_z && random.one_in(3), in_place = !transposed && random.coin();
    const Activation f = activation();
    const Noises u = noises(noise(), samples, image);
    const bool has_noise = in_patches || u.kind != Noise::none;
    const bool has_ty = has_tz || has_noise || !has_z || random.coin();
    const bool has_pre = has_z && derivative_needs_pre_activation(f);
    const auto values = random.one_in(5) ? Values::any : Values::grid;
    describe("epilogue", sizeof(T), "bytes, samples", samples, "features", features, "channels",
             channels, "pitch", pitch, "z", has_z, "tz", has_tz, "ty", has_ty, "bias", has_bias,
             "mapped", mapped, "in place", in_place, "f", static_cast<int>(f), "noise",
             static_cast<int>(u.kind), show(image));

    const int64_t size = samples * features;
    const int64_t read = transposed && size > 0 ? (features - 1) * pitch + samples : size;
    const Twin<T> z(random, read, values), tz(random, read, values), bias(random, channels, values);
    const Twin<T> y(random, size), ty(random, size), pre(random, size), zero(random, 1);
    const Twin<float> scale(random, channels), slope(random, channels), offset(random, channels);
    const auto params = [&](int side) {
      EpilogueParams<T> p{};
      if (has_z) {
        p.z = z[side];
        p.y = (in_place ? z : y)[side];
      }
      if (has_tz) p.tz = tz[side];
      if (has_ty) p.ty = (in_place && has_tz ? tz : ty)[side];
      if (has_bias) p.bias = bias[side];
      if (has_pre) p.pre = pre[side];
      p.samples = samples;
      p.features = features;
      p.channels = channels;
      p.activation = f;
      p.noise = u.params(side);
      p.transposed_pitch = pitch;
      if (mapped) {
        p.map.scale = scale[side];
        if (has_tz) p.map.slope = slope[side], p.map.offset = offset[side];
      }
      p.zeros[0] = zero[side];
      return p;
    };
    const EpilogueParams<T> p = params(0);
    in_parts(random, cpu::epilogue_units(p), [&](auto... range) { cpu::epilogue(p, range...); });
    if (values == Values::any) return;
    test::epilogue(params(1));
    z.check("z or y", test::kTolerance<T>);
    tz.check("tz or ty", test::kTolerance<T>);
    y.check("y", test::kTolerance<T>);
    ty.check("ty", test::kTolerance<T>);
    pre.check("pre", test::kTolerance<T>);
    zero.check("zero");
    bias.check("bias");
    u.given.check("given noise");
  }

  template <class T>
  void feedback_step() {
    const bool in_patches = random.one_in(5);
    const Patches image = in_patches ? patches() : Patches{};
    const int64_t features = in_patches ? image.features() : random.extent(random.one_in(3) ? 200 : 70);
    const int64_t samples = random.extent(random.one_in(8) ? 140 : 9);
    const int64_t outputs = random.extent(random.one_in(8) ? 70 : 12, 1);
    const Rule rule = random.of({Rule::ema, Rule::adam, Rule::gradient, Rule::fixed});
    const bool fixed = rule == Rule::fixed, adam = rule == Rule::adam;
    const Noises u = noises(fixed ? Noise::none : noise(), samples);
    const bool has_source = !fixed && u.kind == Noise::none, has_saved = random.coin();
    const bool transposed = !in_patches && random.one_in(4), in_place = !transposed && random.coin();
    const bool has_bias = random.coin(), shares_source = random.coin();
    const Activation f = activation();
    const auto values = random.one_in(5) ? Values::any : Values::grid;
    const int64_t updates = random.of<int64_t>({0, 1, 7, 999, 1 << 20});
    describe("feedback_step", sizeof(T), "bytes, samples", samples, "features", features, "outputs",
             outputs, "rule", static_cast<int>(rule), "noise", static_cast<int>(u.kind), "saved",
             has_saved, "transposed", transposed, "in place", in_place, "bias", has_bias, "f",
             static_cast<int>(f), "updates", updates, show(image));

    const int64_t size = samples * features, matrix = outputs * features;
    const Twin<float> feedback(random, matrix, values), exp_avg(random, matrix, values);
    Twin<float> exp_avg_sq(random, matrix);
    const Twin<float> gradient(random, matrix), bias_grad(random, features);
    const Twin<float> error(random, samples * outputs, values);
    const Twin<float> factor(random, samples * outputs, values);
    const Twin<T> saved(random, size, values), source(random, size, values), delta(random, size);
    Twin<int64_t> counter(random, 1);
    counter.set(0, updates);
    for (int64_t i = 0; i < matrix; ++i) exp_avg_sq.set(i, 1 + exp_avg_sq[0][i] / 2);
    const auto params = [&](int side) {
      FeedbackParams<T> p{};
      p.feedback = feedback[side];
      if (adam) p.exp_avg = exp_avg[side], p.exp_avg_sq = exp_avg_sq[side], p.updates = counter[side];
      if (rule == Rule::gradient) p.gradient = gradient[side];
      p.error = error[side];
      if (!fixed) p.factor = factor[side];
      if (has_source) p.source = (in_place && shares_source ? saved : source)[side];
      if (has_saved) p.saved_activation = saved[side];
      p.delta = (in_place ? saved : delta)[side];
      p.samples = samples;
      p.features = features;
      p.outputs = outputs;
      p.activation = f;
      p.noise = u.params(side);
      p.rule = rule;
      p.scale = 0.3f;
      p.decay = 0.7f;
      p.beta1 = 0.9;
      p.beta2 = 0.999;
      p.lr = 0.03f;
      p.eps = 1e-8f;
      p.transposed = transposed;
      if (has_bias) p.bias_grad = bias_grad[side];
      p.patches = image;
      return p;
    };
    const FeedbackParams<T> p = params(0);
    in_parts(random, cpu::feedback_units(p), [&](auto... range) { cpu::feedback_step(p, range...); });
    if (values == Values::any) return;
    test::feedback_step(params(1));
    feedback.check("B", test::kTolerance<float>);
    exp_avg.check("exp_avg", test::kTolerance<float>);
    exp_avg_sq.check("exp_avg_sq", test::kTolerance<float>);
    gradient.check("gradient", test::kTolerance<float>);
    delta.check("delta", test::kTolerance<T>);
    saved.check("saved_activation or delta", test::kTolerance<T>);
    bias_grad.check("bias_grad", 4 * test::kTolerance<T> * std::sqrt(static_cast<double>(samples)));
    error.check("error");
    factor.check("factor");
    source.check("source");
    counter.check("updates");
  }

  template <class T>
  void spread() {
    const Patches image = patches(random.one_in(10));
    const int64_t samples = random.between(0, 5), size = samples * test::image_features(image);
    const bool has_saved = random.coin(), in_place = random.coin();
    const Activation f = activation();
    const auto values = random.one_in(5) ? Values::any : Values::grid;
    describe("spread", sizeof(T), "bytes, samples", samples, "saved", has_saved, "in place", in_place,
             "f", static_cast<int>(f), show(image));
    const Twin<float> projected(random, samples * image.features(), values);
    const Twin<T> saved(random, size, values), delta(random, size);
    const auto params = [&](int side) {
      return SpreadParams<T>{projected[side],
                             has_saved ? saved[side] : nullptr,
                             (in_place ? saved : delta)[side],
                             samples,
                             image,
                             f};
    };
    const SpreadParams<T> p = params(0);
    in_parts(random, cpu::spread_units(p), [&](auto... range) { cpu::spread(p, range...); });
    if (values == Values::any) return;
    test::spread(params(1));
    delta.check("delta", test::kTolerance<T>);
    saved.check("saved_activation or delta", test::kTolerance<T>);
    projected.check("projected");
  }

  void max_pool() {
    const PoolShape s = pool_shape();
    const bool in_patches = random.one_in(4);
    Patches image = in_patches ? patches() : Patches{};
    if (in_patches) {
      const int32_t most = std::max(s.out_height, s.out_width);
      image = {std::min(image.size, most), s.out_height, s.out_width, s.channels};
    }
    const Noises u = noises(noise(), s.samples, image);
    const bool has_tangent = random.coin();
    const bool has_ty = has_tangent || in_patches || u.kind != Noise::none;
    const bool wants_winners = s.kernel[0] * s.kernel[1] <= 256 && random.coin();
    describe("max_pool", show(s), "tangent", has_tangent, "noise", static_cast<int>(u.kind), "winners",
             wants_winners, show(image));
    const Twin<float> x(random, s.samples * s.image(), Values::winners);
    const Twin<float> tx(random, s.samples * s.image());
    const int64_t out = s.samples * s.out_image();
    const Twin<float> y(random, out), ty(random, out), zero(random, 1);
    const Twin<uint8_t> winners(random, out);
    const auto params = [&](int side) {
      return MaxPoolParams{x[side],
                           has_tangent ? tx[side] : nullptr,
                           y[side],
                           has_ty ? ty[side] : nullptr,
                           wants_winners ? winners[side] : nullptr,
                           s,
                           u.params(side),
                           {zero[side], nullptr}};
    };
    const MaxPoolParams p = params(0);
    in_parts(random, cpu::max_pool_units(p), [&](auto... range) { cpu::max_pool(p, range...); });
    test::max_pool(params(1));
    y.check("y");
    ty.check("ty", 1e-6);
    winners.check("winners");
    x.check("x");
    tx.check("tx");
    zero.check("zero");
  }

  // Winners need not be those of a pool: what is none of a window's places has no element.
  void max_pool_backward() {
    const PoolShape s = pool_shape();
    describe("max_pool_backward", show(s));
    const int64_t out = s.samples * s.out_image();
    Twin<uint8_t> winners(random, out);
    const int64_t places = std::min<int64_t>(int64_t{s.kernel[0]} * s.kernel[1], 256);
    for (int64_t i = 0; i < out; ++i) {
      winners.set(i, static_cast<uint8_t>(random.one_in(9) ? 255 : random.between(0, places - 1)));
    }
    const Twin<float> delta(random, out), dx(random, s.samples * s.image());
    const auto params = [&](int side) {
      return MaxPoolBackwardParams{winners[side], delta[side], dx[side], s};
    };
    const MaxPoolBackwardParams p = params(0);
    in_parts(random, cpu::max_pool_backward_units(p),
             [&](auto... range) { cpu::max_pool_backward(p, range...); });
    test::max_pool_backward(params(1));
    dx.check("dx");
    delta.check("delta");
    winners.check("winners");
  }

  // As an epilogue and a pool after it make it, to the last bit: a rounding would decide who wins.
  void pooled_epilogue() {
    const PoolShape s = pool_shape();
    const int64_t features = s.image(), size = s.samples * features;
    const bool in_patches = random.one_in(4);
    Patches image = in_patches ? patches() : Patches{};
    if (in_patches) {
      image = {std::min(image.size, std::max(s.height, s.width)), s.height, s.width, s.channels};
    }
    const Noises u = noises(noise(), s.samples, image);
    const bool has_tangent = random.coin(), has_bias = random.coin(), mapped = random.one_in(3);
    const bool has_ty = has_tangent || in_patches || u.kind != Noise::none, in_place = !mapped;
    const Activation f = activation();
    const bool has_pre = derivative_needs_pre_activation(f);
    describe("pooled_epilogue", show(s), "tangent", has_tangent, "bias", has_bias, "mapped", mapped,
             "f", static_cast<int>(f), "noise", static_cast<int>(u.kind), show(image));
    const int64_t out = s.samples * s.out_image();
    const Twin<float> z(random, size), tz(random, size), bias(random, s.channels), y(random, size),
        pre(random, size), scale(random, s.channels), slope(random, s.channels),
        offset(random, s.channels), pooled(random, out), pooled_tangent(random, out), zero(random, 1);
    const auto params = [&](int side) {
      EpilogueParams<float> p{};
      p.z = z[side];
      p.y = (in_place ? z : y)[side];
      if (has_tangent) p.tz = tz[side];
      if (has_bias) p.bias = bias[side];
      if (has_pre) p.pre = pre[side];
      p.samples = s.samples;
      p.features = features;
      p.channels = s.channels;
      p.activation = f;
      p.noise = u.params(side);
      if (mapped) {
        p.map.scale = scale[side];
        if (has_tangent) p.map.slope = slope[side], p.map.offset = offset[side];
      }
      p.zeros[1] = zero[side];
      return p;
    };
    const PooledEpilogueParams p{params(0), pooled[0], has_ty ? pooled_tangent[0] : nullptr, s};
    in_parts(random, cpu::pooled_epilogue_units(p),
             [&](auto... range) { cpu::pooled_epilogue(p, range...); });
    EpilogueParams<float> e = params(1);
    std::vector<float> ty(size);
    if (has_ty) e.ty = ty.data();
    if (size > 0) cpu::epilogue(e, 0, cpu::epilogue_units(e));
    MaxPoolParams m{e.y, e.ty, pooled[1], has_ty ? pooled_tangent[1] : nullptr, nullptr, s, kNoNoise};
    m.zeros[0] = zero[1];
    if (const int64_t units = cpu::max_pool_units(m); units > 0) cpu::max_pool(m, 0, units);
    z.check("z or y");
    y.check("y");
    tz.check("tz");
    pre.check("pre");
    pooled.check("pooled");
    pooled_tangent.check("pooled_tangent");
    if (p.epilogue.samples > 0) zero.check("zero");
  }

  // The sums, the statistics and maps of them, and what these make of x and t.
  void batch_norm() {
    const int64_t channels = random.extent(random.one_in(8) ? 700 : 70, 1);
    const int64_t rows =
        random.one_in(20) ? random.between(2, 40000 / channels + 2) : random.extent(20, 2);
    const bool has_t = random.coin(), training = !has_t || random.coin(), has_weight = random.coin();
    const bool has_running = !training || random.coin(), counts = random.coin();
    describe("batch_norm rows", rows, "channels", channels, "t", has_t, "training", training, "weight",
             has_weight, "running", has_running, "counts", counts);
    const int64_t size = rows * channels;
    const Twin<float> x(random, size), t(random, size), out(random, size), weight(random, channels),
        bias(random, channels), mean(random, channels), inverse_std(random, channels),
        running_mean(random, channels), weight_grad(random, channels), bias_grad(random, channels),
        map(random, 4 * channels), backward_map(random, 4 * channels);
    Twin<float> variances(random, channels);
    for (int64_t c = 0; c < channels; ++c) variances.set(c, 1 + variances[0][c] / 2);
    const Twin<float>& running_var = variances;
    const Twin<int64_t> batches(random, 1);

    MomentParams m{x[0], has_t ? t[0] : nullptr, x[0], nullptr, rows, channels, 0};
    m.parts = cpu::moment_units(m);
    const Twin<double> sums(random, m.parts * 4 * channels);
    m.sums = sums[0];
    in_parts(random, m.parts, [&](auto... range) { cpu::moments(m, range...); });
    const auto forward = [&](int side) {
      return NormForwardParams{training ? sums[side] : nullptr,
                               x[side],
                               m.parts,
                               rows,
                               channels,
                               has_weight ? weight[side] : nullptr,
                               has_weight ? bias[side] : nullptr,
                               has_running ? running_mean[side] : nullptr,
                               has_running ? running_var[side] : nullptr,
                               0.1,
                               1e-3,
                               mean[side],
                               inverse_std[side],
                               NormMap{map[side], channels},
                               counts ? batches[side] : nullptr};
    };
    const auto backward = [&](int side) {
      return NormBackwardParams{sums[side],      x[side],
                                m.parts,         rows,
                                channels,        has_weight ? weight[side] : nullptr,
                                mean[side],      inverse_std[side],
                                training,        weight_grad[side],
                                bias_grad[side], NormMap{backward_map[side], channels}};
    };
    const auto combined = [&](int side) {
      return CombineParams{x[side],   t[side],
                           out[side], NormMap{backward_map[side], channels}.channel_map(),
                           rows,      channels};
    };
    cpu::norm(forward(0));
    cpu::norm_backward(backward(0));
    const CombineParams p = combined(0);
    in_parts(random, cpu::combine_units(p), [&](auto... range) { cpu::combine(p, range...); });

    m.x = m.pivot = x[1];
    if (has_t) m.t = t[1];
    m.sums = sums[1];
    test::moments(m, cpu::moment_part_rows(channels));
    test::norm(forward(1));
    test::norm_backward(backward(1));
    test::combine(combined(1));
    sums.check("sums", 1e-6);
    for (const Twin<float>* values :
         {&mean, &inverse_std, &running_mean, &running_var, &weight_grad, &bias_grad})
      values->check("statistics and gradients", 1e-4);
    for (const Twin<float>* values : {&map, &backward_map}) values->check("map", 1e-4);
    out.check("out", 1e-3);
    for (const Twin<float>* values : {&x, &t, &weight, &bias}) values->check("an input");
    batches.check("batches");
  }

  // 32 bits count as 64 do, in images nearly as large as the checks allow.
  void large_indices() {
    const auto d = static_cast<int32_t>(random.between(1, std::numeric_limits<int32_t>::max()) >>
                                        random.between(0, 30));
    const auto n = static_cast<int32_t>(random.between(0, std::numeric_limits<int32_t>::max()));
    describe("divisor", n, '/', std::max(d, 1));
    CHECK(n / Divisor(std::max(d, 1)) == n / std::max(d, 1));
    large_window();
    large_patches();
  }

  void large_window() {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    PoolShape s{};
    int64_t padded[2], size[2], kernel[2];
    s.channels = static_cast<int32_t>(int64_t{1} << random.between(0, 20));
    int64_t left = kMost / s.channels;
    for (int i = 0; i < 2; ++i) {
      padded[i] = i == 0 ? std::max<int64_t>(1, left >> random.between(0, 30)) : left;
      left /= padded[i];
      kernel[i] = random.between(1, std::max<int64_t>(1, padded[i] >> random.between(0, 20)));
      const int64_t most = std::min(kernel[i] / 2, (padded[i] - 1) / 2);
      const int64_t padding = random.between(0, most);
      size[i] = padded[i] - 2 * padding;
      if (size[i] > kMost / 2 || kernel[i] > kMost / 2) return;  // which the operators refuse
      const int64_t stride = random.coin() ? random.between(1, 5) : random.between(1, kMost / 2);
      s.kernel[i] = static_cast<int32_t>(kernel[i]);
      s.padding[i] = static_cast<int32_t>(padding);
      s.stride[i] = static_cast<int32_t>(stride);
      (i == 0 ? s.height : s.width) = static_cast<int32_t>(size[i]);
      (i == 0 ? s.out_height : s.out_width) =
          static_cast<int32_t>((padded[i] - kernel[i]) / stride + 1);
    }
    const int64_t row = random.coin() ? s.out_height - 1 : random.between(0, s.out_height - 1);
    const int64_t column = random.coin() ? s.out_width - 1 : random.between(0, s.out_width - 1);
    describe("window", row, column, show(s));
    const PoolWindow w = pool_window(s, static_cast<int32_t>(row), static_cast<int32_t>(column));
    const int64_t at[] = {row, column};
    int64_t first[2], skipped[2], count[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t start = at[i] * s.stride[i] - s.padding[i];
      first[i] = std::max<int64_t>(start, 0);
      skipped[i] = first[i] - start;
      count[i] = std::min(start + s.kernel[i], size[i]) - first[i];
      CHECK(count[i] > 0);
    }
    CHECK(w.first == (first[0] * s.width + first[1]) * s.channels);
    CHECK(w.first_place == skipped[0] * s.kernel[1] + skipped[1]);
    CHECK(w.rows == count[0] && w.columns == count[1]);
    CHECK(w.row_stride == int64_t{s.width} * s.channels && w.column_stride == s.channels);
    const int64_t last = int64_t{w.first} + (w.rows - 1) * int64_t{w.row_stride} +
                         (w.columns - 1) * int64_t{w.column_stride} + s.channels;
    CHECK(last <= s.image());
    CHECK(s.out_image() <= kMost);
  }

  void large_patches() {
    constexpr int64_t kMost = (int64_t{1} << 30) - 1;
    const int64_t channels = int64_t{1} << random.between(0, 20);
    const int64_t height = std::max<int64_t>(1, kMost / channels >> random.between(0, 30));
    const int64_t width = kMost / channels / height;
    const int64_t largest = std::max(height, width);
    const int64_t size =
        random.one_in(3) ? largest : random.between(1, largest) >> random.between(0, 20);
    const Patches p{static_cast<int32_t>(std::max<int64_t>(1, size)), static_cast<int32_t>(height),
                    static_cast<int32_t>(width), static_cast<int32_t>(channels)};
    const int64_t features = test::image_features(p);
    const int64_t feature = random.one_in(3) ? features - 1 : random.between(0, features - 1);
    describe(show(p).c_str(), "feature", feature);
    const int64_t rows = (height + p.size - 1) / p.size, columns = (width + p.size - 1) / p.size;
    CHECK(p.rows() == rows && p.columns() == columns && p.features() == rows * columns * channels);
    CHECK(p.image() == features);
    const int64_t of_patch = test::patch_feature(p, feature);
    CHECK(p.feature_of(static_cast<int32_t>(feature)) == of_patch);
    const int64_t row = of_patch / channels / columns, column = of_patch / channels % columns;
    const int64_t high = std::min<int64_t>(p.size, height - row * p.size);
    const int64_t wide = std::min<int64_t>(p.size, width - column * p.size);
    CHECK(p.pixels(static_cast<int32_t>(of_patch)) == high * wide);
  }
};

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  __sanitizer_set_death_callback(print_call);
  std::vector<const char*> isas;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (cpu::select_isa(isa)) isas.push_back(isa);
  }
  Fuzz fuzz{Random(seed)};
  const std::function<void()> kernels[] = {[&] { fuzz.epilogue<float>(); },
                                           [&] { fuzz.epilogue<bfloat16>(); },
                                           [&] { fuzz.epilogue<float16>(); },
                                           [&] { fuzz.feedback_step<float>(); },
                                           [&] { fuzz.feedback_step<bfloat16>(); },
                                           [&] { fuzz.feedback_step<float16>(); },
                                           [&] { fuzz.spread<float>(); },
                                           [&] { fuzz.spread<bfloat16>(); },
                                           [&] { fuzz.spread<float16>(); },
                                           [&] { fuzz.max_pool(); },
                                           [&] { fuzz.max_pool_backward(); },
                                           [&] { fuzz.pooled_epilogue(); },
                                           [&] { fuzz.batch_norm(); },
                                           [&] { fuzz.large_indices(); }};
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  while (elapsed() < seconds && test::failure_count() == 0) {
    for (const char* isa : isas) {
      cpu::select_isa(isa);
      for (const auto& kernel : kernels) {
        if (test::failure_count() == 0) kernel();
      }
    }
  }
  if (test::failure_count() > 0) print_call();
  std::printf("%lld calls, seed %llu\n", static_cast<long long>(fuzz.calls),
              static_cast<unsigned long long>(seed));
  return test::failures();
}
