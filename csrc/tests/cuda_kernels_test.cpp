#include <cstring>

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
  static void feedback_step(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter) {
    const auto count = static_cast<int64_t>(blocks.size());
    CHECK(cuda::launch_feedback_step(blocks.data(), count, counter, nullptr) == cudaSuccess);
  }
};

void test_next_noise() {
  int64_t state[4] = {-7, 41, 3, 99}, snapshot[4] = {0, 0, 0, 98};
  CHECK(cuda::launch_next_noise({state, snapshot}, nullptr) == cudaSuccess);
  const int64_t before[] = {-7, 41, 3, 98}, after[] = {-7, 42, 3, 99};
  for (int i = 0; i < 4; ++i) CHECK(snapshot[i] == before[i] && state[i] == after[i]);
}

}  // namespace

int main(int argc, char** argv) {
  test_next_noise();
  if (argc > 1 && std::strcmp(argv[1], "small") == 0) {
    test::test_kernels<EmulatedCuda>({{33}, {33, 64}, {65}}, 307, 47);
  } else {
    test::test_kernels<EmulatedCuda>(test::all_sizes(), 307, 97);
    test::test_feedback_of_long_sums<EmulatedCuda>();
    test::test_feedback_of_many_blocks<EmulatedCuda>();
  }
  return test::failures();
}
