#include <cstring>
#include <vector>

#include "cuda/kernels.h"
#include "tests/kernel_cases.h"

// The CUDA kernels in emulation, against the reference that the CPU kernels are held to. The argument
// "small" takes few cases, of two tiles or steps in each direction, for the run under a thread
// sanitizer.

namespace {

using namespace fdfa;

struct EmulatedCuda {
  template <class T>
  static void epilogue(const EpilogueParams<T>& p) {
    CHECK(cuda::launch_epilogue(p, nullptr) == cudaSuccess);
  }

  template <class T>
  static void spread(const SpreadParams<T>& p) {
    CHECK(cuda::launch_spread(p, nullptr) == cudaSuccess);
  }

  template <class T>
  static void feedback_step(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter) {
    const auto count = static_cast<int64_t>(blocks.size());
    CHECK(cuda::launch_feedback_step(blocks.data(), count, counter, nullptr, nullptr) == cudaSuccess);
  }
};

void test_next_noise() {
  int64_t state[4] = {-7, 41, 3, 99}, snapshot[4] = {0, 0, 0, 98};
  CHECK(cuda::launch_next_noise({state, snapshot}, nullptr) == cudaSuccess);
  const int64_t before[] = {-7, 41, 3, 98}, after[] = {-7, 42, 3, 99};
  for (int i = 0; i < 4; ++i) CHECK(snapshot[i] == before[i] && state[i] == after[i]);
}

// By a thread block of its own, beside few blocks and more than one launch takes.
void test_output_bias_grad(const std::vector<int64_t>& all_outputs) {
  for (const int64_t count : {1, 19}) {
    for (const int64_t outputs : all_outputs) {
      constexpr int64_t kSamples = 37, kFeatures = 5;
      std::vector<float> feedback(outputs * kFeatures, 1.0f), delta(kSamples * kFeatures);
      std::vector<float> error(kSamples * outputs), sums(outputs + 1, -1.0f);
      for (size_t i = 0; i < error.size(); ++i) error[i] = static_cast<float>(i * i % 23) - 9.0f;
      FeedbackParams<float> p{};
      p.feedback = feedback.data();
      p.error = error.data();
      p.delta = delta.data();
      p.samples = kSamples;
      p.features = kFeatures;
      p.outputs = outputs;
      p.noise = kNoNoise;
      p.rule = Rule::fixed;
      const std::vector<FeedbackParams<float>> blocks(count, p);
      CHECK(cuda::launch_feedback_step(blocks.data(), count, nullptr, sums.data(), nullptr) ==
            cudaSuccess);
      for (int64_t k = 0; k < outputs; ++k) {
        float expected = 0.0f;  // of whole numbers, so that no order of them rounds
        for (int64_t n = 0; n < kSamples; ++n) expected += error[n * outputs + k];
        CHECK(sums[k] == expected);
      }
      CHECK(sums[outputs] == -1.0f);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  test_next_noise();
  if (argc > 1 && std::strcmp(argv[1], "small") == 0) {
    test_output_bias_grad({33});
    test::test_kernels<EmulatedCuda>({{33}, {33, 64}, {65}}, {{2, 3, 5, 4}}, 613, 97);
  } else {
    test_output_bias_grad({1, 33, 70});
    test::test_kernels<EmulatedCuda>(test::all_sizes(), test::all_patches(), 307, 97);
    test::test_feedback_of_long_sums<EmulatedCuda>();
    test::test_feedback_of_many_blocks<EmulatedCuda>();
  }
  return test::failures();
}
