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
  static void feedback_step(const std::vector<FeedbackParams<T>>& blocks) {
    const auto count = static_cast<int64_t>(blocks.size());
    CHECK(cuda::launch_feedback_step(blocks.data(), count, nullptr) == cudaSuccess);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "small") == 0) {
    test::test_kernels<EmulatedCuda>({{33}, {33}, {65}}, 307, 11);
  } else {
    test::test_kernels<EmulatedCuda>(test::all_sizes(), 307, 97);
  }
  return test::failures();
}
