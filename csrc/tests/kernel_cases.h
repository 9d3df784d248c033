#pragma once

#include <cstdio>
#include <initializer_list>
#include <vector>

#include "tests/check.h"
#include "tests/reference.h"

// Every shape, type, rule and optional pointer, for any implementation of the kernels. A Backend has
//   template <class T> static void epilogue(const EpilogueParams<T>&);
//   template <class T> static void feedback_step(const std::vector<FeedbackParams<T>>& blocks,
//                                                int64_t* counter);
//   template <class T> static void spread(const SpreadParams<T>&);

namespace fdfa::test {

// As kTolerance, for a sum of such values, times the square root of their number: deltas reach a few
// times 1.
template <class T>
constexpr double kSumTolerance = 4 * kTolerance<T>;

// An array with a margin at both ends that nobody may write. `shift` moves its start off the alignment
// that vector accesses need.
template <class T>
class Array {
 public:
  Array(int64_t size, uint32_t key, int64_t shift = 0) : size_(size), start_(kMargin + shift) {
    values_.resize(size + 2 * kMargin + shift);
    for (size_t i = 0; i < values_.size(); ++i) {
      const Philox4 r = philox4x32_10({static_cast<uint32_t>(i), 0, 0, 0}, key, 0);
      values_[i] = from_float<T>(static_cast<float>(r.x0) / 2147483648.0f - 1.0f);
    }
  }

  // To so many parts of one.
  void round_to(int parts) {
    for (T& value : values_) value = from_float<T>(std::round(to_float(value) * parts) / parts);
  }

  T* data() { return values_.data() + start_; }
  int64_t size() const { return size_; }

  void check_close_to(const Array& expected, double tolerance, const char* name) const {
    for (int64_t i = 0; i < static_cast<int64_t>(values_.size()); ++i) {
      const double value = to_float(values_[i]), reference = to_float(expected.values_[i]);
      const bool margin = i < start_ || i >= start_ + size_;
      const double allowed = margin ? 0.0 : tolerance * (1.0 + std::abs(reference));
      check_near(value, reference, allowed, margin ? "margin" : name, __FILE__, __LINE__);
    }
  }

 private:
  static constexpr int64_t kMargin = 32;
  int64_t size_, start_;
  std::vector<T> values_;
};

constexpr int64_t kState[3] = {0x5EED00000001, 11, 1000};

struct Sizes {
  std::vector<int64_t> samples, features, outputs;
};

// The odd sizes. 132 is a whole number of quads and 136 of 16-byte vectors of any type, yet not of a
// thread block's columns, as 96 is.
inline Sizes all_sizes() {
  return {{0, 1, 2, 33}, {1, 3, 4, 31, 96, 129, 132, 136, 151}, {1, 10, 65, 130}};
}

// Takes one of `stride` cases, for backends that cannot afford all. A prime stride meets every value of
// every loop.
class Selection {
 public:
  explicit Selection(int stride) : stride_(stride) {}
  bool next() { return count_++ % stride_ == 0; }

 private:
  int stride_, count_ = 0;
};

struct EpilogueCase {
  int64_t samples, features, channels, shift;
  Activation activation;
  Noise noise;
  bool has_product, has_tangent, has_bias, in_place, transposed, mapped;
  bool has_result_tangent = true;

  int64_t pitch() const { return transposed ? 2 * samples + 1 : samples; }
};

template <class T>
struct EpilogueArrays {
  explicit EpilogueArrays(const EpilogueCase& c)
      : z(c.pitch() * c.features, 1, c.shift),
        tz(c.pitch() * c.features, 2, c.shift),
        bias(c.channels, 3, c.shift),
        y(c.samples * c.features, 4, c.shift),
        ty(c.samples * c.features, 5, c.shift),
        pre(c.samples * c.features, 6, c.shift),
        scale(c.channels, 7),
        slope(c.channels, 8),
        offset(c.channels, 9),
        zero(1, 10) {}

  EpilogueParams<T> params(const EpilogueCase& c) {
    const bool in_place_tangent = c.in_place && c.has_tangent;
    const bool has_pre = c.has_product && derivative_needs_pre_activation(c.activation);
    return {c.has_product ? z.data() : nullptr,
            c.has_tangent ? tz.data() : nullptr,
            c.has_bias ? bias.data() : nullptr,
            c.has_product ? (c.in_place ? z : y).data() : nullptr,
            !c.has_result_tangent ? nullptr : (in_place_tangent ? tz : ty).data(),
            has_pre ? pre.data() : nullptr,
            c.samples,
            c.features,
            c.channels,
            c.activation,
            {kState, 2, c.noise},
            c.transposed ? c.pitch() : 0,
            {c.mapped ? scale.data() : nullptr, c.mapped && c.has_tangent ? slope.data() : nullptr,
             c.mapped && c.has_tangent ? offset.data() : nullptr},
            {nullptr, zero.data()}};
  }

  Array<T> z, tz, bias, y, ty, pre;
  Array<float> scale, slope, offset;
  Array<T> zero;
};

template <class Backend, class T>
void test_epilogue_case(const EpilogueCase& c) {
  EpilogueArrays<T> actual(c), expected(c);
  Backend::template epilogue<T>(actual.params(c));
  epilogue<T>(expected.params(c));
  actual.z.check_close_to(expected.z, kTolerance<T>, "z or y");
  actual.tz.check_close_to(expected.tz, kTolerance<T>, "tz or ty");
  actual.y.check_close_to(expected.y, kTolerance<T>, "y");
  actual.ty.check_close_to(expected.ty, kTolerance<T>, "ty");
  actual.pre.check_close_to(expected.pre, kTolerance<T>, "pre");
  actual.zero.check_close_to(expected.zero, 0.0, "zero");
}

// As a linear block (a channel per feature) and as a convolution with the fewest channels that fit.
inline std::vector<int64_t> channel_counts(int64_t features) {
  for (int64_t c = 2; c < features; ++c) {
    if (features % c == 0) return {features, c};
  }
  return {features, 1};
}

template <class Backend, class T>
void test_epilogue(const Sizes& sizes, int stride) {
  Selection selection(stride);
  for (int64_t samples : sizes.samples)
    for (int64_t features : sizes.features)
      for (int64_t channels : channel_counts(features))
        for (int64_t shift : {0, 1})
          for (int f = 0; f < kActivationCount; ++f)
            for (Noise noise : {Noise::gaussian, Noise::rademacher, Noise::none})
              for (int flags = 0; flags < 32; ++flags) {
                if (!selection.next()) continue;
                test_epilogue_case<Backend, T>({samples, features, channels, shift,
                                                static_cast<Activation>(f), noise, (flags & 1) == 0,
                                                (flags & 2) == 0, (flags & 4) == 0, (flags & 8) != 0,
                                                false, (flags & 16) != 0});
              }
}

// Without ty, where it would be zero: a layer in evaluation.
template <class Backend, class T>
void test_epilogue_without_tangents(const Sizes& sizes) {
  for (int64_t features : sizes.features)
    for (int f = 0; f < kActivationCount; ++f)
      for (bool mapped : {false, true})
        test_epilogue_case<Backend, T>({sizes.samples.back(), features, features, 0,
                                        static_cast<Activation>(f), Noise::none, true, false, true,
                                        false, false, mapped, false});
}

// More samples than thread blocks have at once.
template <class Backend>
void test_epilogue_of_many_samples() {
  for (int64_t features : {5, 132})
    test_epilogue_case<Backend, float>({300, features, features, 0, Activation::relu, Noise::gaussian,
                                        true, true, true, false, false, true});
}

template <class Backend, class T>
void test_transposed_epilogue(const Sizes& sizes) {
  for (int64_t samples : sizes.samples)
    for (int64_t features : sizes.features)
      for (int f = 0; f < kActivationCount; ++f)
        for (int flags = 0; flags < 4; ++flags) {
          test_epilogue_case<Backend, T>({samples, features, features, 0, static_cast<Activation>(f),
                                          Noise::gaussian, true, (flags & 1) == 0, (flags & 2) == 0,
                                          false, true, false});
        }
}

struct FeedbackCase {
  int64_t samples, features, outputs, updates;
  Activation activation;
  Noise noise;  // none: s is an array
  Rule rule;
  bool has_saved_activation, transposed;
  bool in_place;  // delta, and s if an array, is the saved activation's memory
  bool has_bias = true;
  float overflow = 0;  // unless it is 0, one element each of factor and error
  bool tf32 = false;   // allowed; all that is multiplied is of so few bits that it makes no difference
};

template <class T>
struct FeedbackArrays {
  explicit FeedbackArrays(const FeedbackCase& c)
      : feedback(c.outputs * c.features, 1),
        exp_avg(c.outputs * c.features, 2),
        exp_avg_sq(c.outputs * c.features, 3),
        gradient(c.outputs * c.features, 4),
        error(c.samples * c.outputs, 5),
        factor(c.samples * c.outputs, 6),
        saved_activation(c.samples * c.features, 7),
        delta(c.samples * c.features, 8),
        source(c.samples * c.features, 9),
        bias_grad(c.features, 10),
        updates(c.updates) {
    for (int64_t i = 0; i < exp_avg_sq.size(); ++i) exp_avg_sq.data()[i] = 1.0f + exp_avg.data()[i] / 2;
    if (c.tf32) {
      for (Array<float>* array : {&feedback, &error, &factor}) array->round_to(256);
    }
    if (c.overflow != 0) {
      factor.data()[factor.size() - 1] = error.data()[error.size() / 2] = c.overflow;
    }
  }

  FeedbackParams<T> params(const FeedbackCase& c) {
    const bool adam = c.rule == Rule::adam, fixed = c.rule == Rule::fixed;
    return {feedback.data(),
            adam ? exp_avg.data() : nullptr,
            adam ? exp_avg_sq.data() : nullptr,
            c.rule == Rule::gradient ? gradient.data() : nullptr,
            adam ? &updates : nullptr,
            error.data(),
            fixed ? nullptr : factor.data(),
            fixed || c.noise != Noise::none ? nullptr : (c.in_place ? saved_activation : source).data(),
            c.has_saved_activation ? saved_activation.data() : nullptr,
            (c.in_place ? saved_activation : delta).data(),
            c.samples,
            c.features,
            c.outputs,
            c.activation,
            {kState, 2, c.noise},
            c.rule,
            0.3f,
            0.7f,
            0.9,
            0.999,
            0.03f,
            1e-8f,
            c.tf32,
            c.transposed,
            c.has_bias ? bias_grad.data() : nullptr};
  }

  Array<float> feedback, exp_avg, exp_avg_sq, gradient, error, factor;
  Array<T> saved_activation, delta, source;
  Array<float> bias_grad;
  int64_t updates;
};

// Blocks of one network, in one step, which a network has one counter of.
template <class Backend, class T>
void test_feedback_blocks(const std::vector<FeedbackCase>& blocks) {
  std::vector<FeedbackArrays<T>> all_actual, all_expected;
  std::vector<FeedbackParams<T>> params;
  for (const FeedbackCase& c : blocks) {
    all_actual.emplace_back(c);
    all_expected.emplace_back(c);
  }
  int64_t updates = blocks[0].updates;
  const bool counts = blocks[0].rule == Rule::adam;
  for (size_t i = 0; i < blocks.size(); ++i) {
    params.push_back(all_actual[i].params(blocks[i]));
    if (counts) params.back().updates = &updates;
  }
  Backend::template feedback_step<T>(params, counts ? &updates : nullptr);
  CHECK(updates == blocks[0].updates + (counts ? 1 : 0));
  for (size_t i = 0; i < blocks.size(); ++i) {
    FeedbackArrays<T>&actual = all_actual[i], &expected = all_expected[i];
    feedback_step<T>(expected.params(blocks[i]));
    actual.feedback.check_close_to(expected.feedback, kTolerance<float>, "B");
    actual.exp_avg.check_close_to(expected.exp_avg, kTolerance<float>, "exp_avg");
    actual.exp_avg_sq.check_close_to(expected.exp_avg_sq, kTolerance<float>, "exp_avg_sq");
    actual.gradient.check_close_to(expected.gradient, kTolerance<float>, "gradient");
    actual.delta.check_close_to(expected.delta, kTolerance<T>, "delta");
    actual.saved_activation.check_close_to(expected.saved_activation, kTolerance<T>,
                                           "saved_activation or delta");
    actual.bias_grad.check_close_to(expected.bias_grad, kSumTolerance<T> * std::sqrt(blocks[i].samples),
                                    "bias_grad");
  }
}

template <class Backend, class T>
void test_feedback(const Sizes& sizes, int stride) {
  Selection selection(stride);
  int activation = 0;
  for (int64_t samples : sizes.samples)
    for (int64_t features : sizes.features)
      for (int64_t outputs : sizes.outputs)
        for (Rule rule : {Rule::ema, Rule::adam, Rule::gradient, Rule::fixed})
          for (Noise noise : {Noise::gaussian, Noise::rademacher, Noise::none})
            for (int64_t updates : {0, 999})
              for (bool has_saved_activation : {true, false}) {
                if (!selection.next()) continue;
                const auto f = static_cast<Activation>(activation++ % kActivationCount);
                const bool in_place = has_saved_activation && activation % 2 == 0;
                test_feedback_blocks<Backend, T>(
                    {{samples, features, outputs, updates, f, noise, rule, has_saved_activation, false,
                      in_place, activation % 3 != 0}});
              }
}

template <class Backend, class T>
void test_transposed_feedback(const Sizes& sizes) {
  for (int64_t samples : sizes.samples)
    for (int64_t features : sizes.features)
      for (int f = 0; f < kActivationCount; ++f)
        for (Noise noise : {Noise::gaussian, Noise::none})
          test_feedback_blocks<Backend, T>({{samples, features, 10, 3, static_cast<Activation>(f),
                                             noise, Rule::adam, true, true, false}});
}

template <class Backend, class T>
void test_overflow(const Sizes& sizes) {
  for (int64_t outputs : sizes.outputs)
    for (Rule rule : {Rule::ema, Rule::adam, Rule::gradient})
      for (int64_t features : {sizes.features.back(), int64_t{64}})
        test_feedback_blocks<Backend, T>({{sizes.samples.back(), features, outputs, 3, Activation::relu,
                                           Noise::gaussian, rule, true, false, false, true, INFINITY}});
  // A gradient that is finite, and whose square is not.
  for (int64_t outputs : sizes.outputs)
    test_feedback_blocks<Backend, T>(
        {{sizes.samples.back(), 64, outputs, 3, Activation::relu, Noise::rademacher, Rule::adam, true,
          false, false, true, 1e25f}});
}

template <class Backend>
void test_feedback_in_tf32(const Sizes& sizes) {
  for (int64_t features : sizes.features)
    for (int64_t outputs : sizes.outputs)
      test_feedback_blocks<Backend, float>(
          {{sizes.samples.back(), features, outputs, 1, Activation::relu, Noise::rademacher,
            Rule::gradient, true, false, false, true, 0, true}});
}

// Sums of many samples and of many outputs, in which an accumulator that cuts off would drift.
template <class Backend>
void test_feedback_of_long_sums() {
  const auto test = [](int64_t samples, int64_t features, int64_t outputs, Rule rule) {
    test_feedback_blocks<Backend, float>({{samples, features, outputs, 1, Activation::identity,
                                           Noise::gaussian, rule, false, false, false}});
  };
  test(4000, 5, 40, Rule::gradient);
  test(17, 5, 4000, Rule::fixed);
  test(300, 96, 140, Rule::adam);
}

// More blocks than one launch of the CUDA kernel takes, some of them empty.
template <class Backend>
void test_feedback_of_many_blocks() {
  for (Rule rule : {Rule::ema, Rule::adam, Rule::gradient, Rule::fixed}) {
    std::vector<FeedbackCase> blocks;
    for (int64_t i = 0; i < 19; ++i) {
      const int64_t features = i % 5 == 2 ? 0 : 1 + 37 * i % 101;
      const auto f = static_cast<Activation>(i % kActivationCount);
      blocks.push_back({3, features, 7, 4, f, Noise::gaussian, rule, i % 3 != 0, false, i % 3 == 1});
    }
    test_feedback_blocks<Backend, float>(blocks);
  }
}

// Patches that fit, that do not, that are all of the image and that are a pixel.
inline std::vector<Patches> all_patches() {
  return {{2, 6, 4, 8}, {4, 7, 9, 3}, {3, 5, 1, 1}, {9, 9, 2, 5}, {1, 3, 3, 4}, {2, 33, 2, 36}};
}

// Noise that is given for patches, added by an epilogue.
template <class Backend, class T>
void test_epilogue_in_patches(const std::vector<Patches>& all) {
  for (const Patches& patches : all)
    for (int flags = 0; flags < 16; ++flags) {
      const EpilogueCase c{3,
                           image_features(patches),
                           patches.channels,
                           flags & 1,
                           Activation::gelu,
                           Noise::none,
                           (flags & 2) == 0,
                           (flags & 4) == 0,
                           true,
                           (flags & 8) != 0,
                           false,
                           (flags & 2) == 0 && (flags & 1) != 0};
      EpilogueArrays<T> actual(c), expected(c);
      Array<float> given(c.samples * patches.features(), 11);
      EpilogueParams<T> a = actual.params(c), e = expected.params(c);
      a.noise.given = e.noise.given = given.data();
      a.noise.patches = e.noise.patches = patches;
      Backend::template epilogue<T>(a);
      epilogue<T>(e);
      actual.ty.check_close_to(expected.ty, kTolerance<T>, "ty in patches");
      actual.tz.check_close_to(expected.tz, kTolerance<T>, "tz or ty in patches");
      actual.y.check_close_to(expected.y, kTolerance<T>, "y");
    }
}

template <class Backend, class T>
void test_spread(const std::vector<Patches>& all) {
  for (const Patches& patches : all)
    for (int f = 0; f < kActivationCount; ++f)
      for (int flags = 0; flags < 8; ++flags) {
        const int64_t samples = (flags & 4) ? 0 : 5, size = samples * image_features(patches);
        Array<float> projected(samples * patches.features(), 1);
        Array<T> saved(size, 2, flags & 1), saved2(size, 2, flags & 1), delta(size, 3, flags & 1),
            delta2(size, 3, flags & 1);
        const auto params = [&](Array<T>& saved_activation, Array<T>& result) {
          const bool in_place = (flags & 2) != 0;
          return SpreadParams<T>{projected.data(),
                                 f == 0 ? nullptr : saved_activation.data(),
                                 (in_place ? saved_activation : result).data(),
                                 samples,
                                 patches,
                                 static_cast<Activation>(f)};
        };
        Backend::template spread<T>(params(saved, delta));
        spread<T>(params(saved2, delta2));
        delta.check_close_to(delta2, kTolerance<T>, "delta");
        saved.check_close_to(saved2, kTolerance<T>, "delta in place");
      }
}

// G of each patch is the mean over its pixels.
template <class Backend>
void test_feedback_in_patches(const std::vector<Patches>& all) {
  for (const Patches& patches : all)
    for (const int64_t outputs : {3, 10})
      for (const Rule rule : {Rule::ema, Rule::adam, Rule::gradient}) {
        const FeedbackCase c{7,
                             patches.features(),
                             outputs,
                             2,
                             Activation::identity,
                             Noise::gaussian,
                             rule,
                             false,
                             false,
                             false};
        FeedbackArrays<float> actual(c), expected(c);
        FeedbackParams<float> a = actual.params(c), e = expected.params(c);
        a.patches = e.patches = patches;
        Backend::template feedback_step<float>({a}, rule == Rule::adam ? &actual.updates : nullptr);
        feedback_step<float>(e);
        actual.feedback.check_close_to(expected.feedback, 1e-5, "feedback in patches");
        actual.gradient.check_close_to(expected.gradient, 1e-5, "gradient in patches");
        actual.delta.check_close_to(expected.delta, 1e-4, "delta of patches");
      }
}

template <class Backend>
void test_kernels(const Sizes& sizes, const std::vector<Patches>& patches, int epilogue_stride,
                  int feedback_stride) {
  test_epilogue<Backend, float>(sizes, epilogue_stride);
  test_epilogue<Backend, bfloat16>(sizes, epilogue_stride);
  test_epilogue<Backend, float16>(sizes, epilogue_stride);
  test_feedback<Backend, float>(sizes, feedback_stride);
  test_feedback<Backend, bfloat16>(sizes, feedback_stride);
  test_feedback<Backend, float16>(sizes, feedback_stride);
  test_epilogue_without_tangents<Backend, float>(sizes);
  test_epilogue_of_many_samples<Backend>();
  test_overflow<Backend, float>(sizes);
  test_feedback_in_tf32<Backend>(sizes);
  test_epilogue_in_patches<Backend, float>(patches);
  test_epilogue_in_patches<Backend, bfloat16>(patches);
  test_spread<Backend, float>(patches);
  test_spread<Backend, float16>(patches);
  test_feedback_in_patches<Backend>(patches);
}

}  // namespace fdfa::test
