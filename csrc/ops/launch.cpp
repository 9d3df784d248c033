#include "ops/launch.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/kernels.h"

namespace fdfa {
namespace {

// Perturbations that are worth a thread: a second one costs as much as 4000 of them.
constexpr int64_t kNoiseElements = 8192;
// Units that are.
constexpr int64_t kMaxPoolGrain = 16;
constexpr int64_t kMaxPoolBackwardGrain = 1;
constexpr int64_t kMomentGrain = 1;
constexpr int64_t kCombineGrain = 16;
constexpr int64_t kSpreadGrain = 16;

int64_t noise_grain(int64_t units, int64_t elements) {
  return std::max<int64_t>(1, kNoiseElements * units / std::max<int64_t>(1, elements));
}

// The CUDA kernel for `params`, or else `cpu`.
template <class Params, class Cpu>
void on_device(const Params& params, const at::Device& device, const Cpu& cpu) {
#if defined(FDFA_WITH_CUDA)
  if (device.is_cuda()) return launch_cuda(params, device);
#endif
  (void)params;
  (void)device;
  cpu();
}

template <class T>
void feedback_step_cpu(const std::vector<FeedbackParams<T>>& blocks) {
  int64_t units = 0, elements = 0;
  for (const auto& block : blocks) {
    units += cpu::feedback_units(block);
    elements += block.samples * block.features;
  }
  at::parallel_for(0, units, noise_grain(units, elements), [&](int64_t begin, int64_t end) {
    for (const auto& block : blocks) {
      const int64_t own = cpu::feedback_units(block);
      const int64_t first = std::clamp<int64_t>(begin, 0, own), last = std::clamp<int64_t>(end, 0, own);
      if (first < last) cpu::feedback_step(block, first, last);
      begin -= own;
      end -= own;
    }
  });
}

}  // namespace

template <class T>
void launch(const EpilogueParams<T>& params, const at::Device& device) {
  on_device(params, device, [&] {
    const int64_t units = cpu::epilogue_units(params);
    at::parallel_for(0, units, noise_grain(units, params.samples * params.features),
                     [&](int64_t begin, int64_t end) { cpu::epilogue(params, begin, end); });
  });
}

template <class T>
void launch(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter, float* output_bias_grad,
            const at::Device& device) {
#if defined(FDFA_WITH_CUDA)
  if (device.is_cuda()) return launch_cuda(blocks, counter, output_bias_grad, device);
#endif
  (void)device;
  (void)output_bias_grad;
  feedback_step_cpu(blocks);
  if (counter != nullptr) ++*counter;
}

template <class T>
void launch(const SpreadParams<T>& params, const at::Device& device) {
  on_device(params, device, [&] {
    at::parallel_for(0, cpu::spread_units(params), kSpreadGrain,
                     [&](int64_t begin, int64_t end) { cpu::spread(params, begin, end); });
  });
}

void launch(const NextNoiseParams& params, const at::Device& device) {
  on_device(params, device, [&] {
    std::copy_n(params.state, 3, params.snapshot);
    ++params.state[1];
  });
}

void launch(const MaxPoolParams& params, const at::Device& device) {
  on_device(params, device, [&] {
    at::parallel_for(0, cpu::max_pool_units(params), kMaxPoolGrain,
                     [&](int64_t begin, int64_t end) { cpu::max_pool(params, begin, end); });
  });
}

void launch(const MaxPoolBackwardParams& params, const at::Device& device) {
  on_device(params, device, [&] {
    at::parallel_for(0, cpu::max_pool_backward_units(params), kMaxPoolBackwardGrain,
                     [&](int64_t begin, int64_t end) { cpu::max_pool_backward(params, begin, end); });
  });
}

void launch(const PooledEpilogueParams& params, const at::Device& device) {
  on_device(params, device, [&] {
    const int64_t units = cpu::pooled_epilogue_units(params);
    at::parallel_for(0, units, noise_grain(units, units * params.epilogue.features),
                     [&](int64_t begin, int64_t end) { cpu::pooled_epilogue(params, begin, end); });
  });
}

int64_t moment_parts(const MomentParams& params, const at::Device& device) {
#if defined(FDFA_WITH_CUDA)
  if (device.is_cuda()) return moment_parts_cuda(params, device);
#endif
  (void)device;
  return cpu::moment_units(params);
}

void launch(const MomentParams& params, const at::Device& device) {
  on_device(params, device, [&] {
    at::parallel_for(0, cpu::moment_units(params), kMomentGrain,
                     [&](int64_t begin, int64_t end) { cpu::moments(params, begin, end); });
  });
}

void launch(const NormForwardParams& params, const at::Device& device) {
  on_device(params, device, [&] { cpu::norm(params); });
}

void launch(const NormBackwardParams& params, const at::Device& device) {
  on_device(params, device, [&] { cpu::norm_backward(params); });
}

void launch(const CombineParams& params, const at::Device& device) {
  on_device(params, device, [&] {
    at::parallel_for(0, cpu::combine_units(params), kCombineGrain,
                     [&](int64_t begin, int64_t end) { cpu::combine(params, begin, end); });
  });
}

template void launch<float>(const EpilogueParams<float>&, const at::Device&);
template void launch<bfloat16>(const EpilogueParams<bfloat16>&, const at::Device&);
template void launch<float16>(const EpilogueParams<float16>&, const at::Device&);
template void launch<float>(const SpreadParams<float>&, const at::Device&);
template void launch<bfloat16>(const SpreadParams<bfloat16>&, const at::Device&);
template void launch<float16>(const SpreadParams<float16>&, const at::Device&);
template void launch<float>(const std::vector<FeedbackParams<float>>&, int64_t*, float*,
                            const at::Device&);
template void launch<bfloat16>(const std::vector<FeedbackParams<bfloat16>>&, int64_t*, float*,
                               const at::Device&);
template void launch<float16>(const std::vector<FeedbackParams<float16>>&, int64_t*, float*,
                              const at::Device&);

}  // namespace fdfa
