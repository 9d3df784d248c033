#include "cpu/kernels.h"
#include "tests/kernel_cases.h"

// The CPU kernels with every instruction set of this CPU, against the reference.

namespace {

using namespace fdfa;

// Units in two parts, as two threads would take them.
struct Cpu {
  template <class T>
  static void epilogue(const EpilogueParams<T>& p) {
    const int64_t units = cpu::epilogue_units(p);
    cpu::epilogue(p, 0, units / 2);
    cpu::epilogue(p, units / 2, units);
  }

  template <class T>
  static void spread(const SpreadParams<T>& p) {
    const int64_t units = cpu::spread_units(p);
    cpu::spread(p, 0, units / 2);
    cpu::spread(p, units / 2, units);
  }

  template <class T>
  static void feedback_step(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter) {
    for (const auto& p : blocks) {
      const int64_t units = cpu::feedback_units(p);
      cpu::feedback_step(p, 0, units / 2);
      cpu::feedback_step(p, units / 2, units);
    }
    if (counter) ++*counter;  // which is its caller's business
  }
};

}  // namespace

int main() {
  CHECK(!cpu::select_isa("unknown"));
  CHECK(cpu::select_isa("baseline"));
  test::Sizes sizes = test::all_sizes();
  sizes.features.push_back(1100);  // more than one run of the epilogue
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!cpu::select_isa(isa)) {
      std::printf("%s: not on this CPU\n", isa);
      continue;
    }
    test::test_kernels<Cpu>(sizes, test::all_patches(), 23, 13);
    test::test_feedback_of_long_sums<Cpu>();
    test::test_feedback_of_many_blocks<Cpu>();
    test::test_transposed_epilogue<Cpu, float>(sizes);
    test::test_transposed_epilogue<Cpu, bfloat16>(sizes);
    test::test_transposed_feedback<Cpu, float>(sizes);
    test::test_transposed_feedback<Cpu, bfloat16>(sizes);
    std::printf("%s: done\n", cpu::isa());
  }
  return test::failures();
}
