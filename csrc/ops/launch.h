#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/dtype.h"
#include "common/params.h"

// From an operator to its kernel: the CPU's thread pool, or the current CUDA stream of the device.

namespace fdfa {

template <class T>
void launch(const EpilogueParams<T>& params, const at::Device& device);
// All blocks at once: nothing orders them. counter: null, or their `updates`, which counts this step.
// output_bias_grad: null, or for CUDA alone [outputs], which becomes the error summed over the samples.
template <class T>
void launch(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter, float* output_bias_grad,
            const at::Device& device);
template <class T>
void launch(const SpreadParams<T>& params, const at::Device& device);
void launch(const NextNoiseParams& params, const at::Device& device);
void launch(const MaxPoolParams& params, const at::Device& device);
void launch(const MaxPoolBackwardParams& params, const at::Device& device);
void launch(const PooledEpilogueParams& params, const at::Device& device);

// The number of parts in which the moments of so many rows and channels are summed.
int64_t moment_parts(const MomentParams& params, const at::Device& device);
void launch(const MomentParams& params, const at::Device& device);
void launch(const NormForwardParams& params, const at::Device& device);
void launch(const NormBackwardParams& params, const at::Device& device);
void launch(const CombineParams& params, const at::Device& device);

#if defined(FDFA_WITH_CUDA)
template <class T>
void launch_cuda(const EpilogueParams<T>& params, const at::Device& device);
template <class T>
void launch_cuda(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter,
                 float* output_bias_grad, const at::Device& device);
template <class T>
void launch_cuda(const SpreadParams<T>& params, const at::Device& device);
void launch_cuda(const NextNoiseParams& params, const at::Device& device);
int64_t moment_parts_cuda(const MomentParams& params, const at::Device& device);
void launch_cuda(const MaxPoolParams& params, const at::Device& device);
void launch_cuda(const MaxPoolBackwardParams& params, const at::Device& device);
void launch_cuda(const PooledEpilogueParams& params, const at::Device& device);
void launch_cuda(const MomentParams& params, const at::Device& device);
void launch_cuda(const NormForwardParams& params, const at::Device& device);
void launch_cuda(const NormBackwardParams& params, const at::Device& device);
void launch_cuda(const CombineParams& params, const at::Device& device);
#endif

// The kernels' storage type for a tensor's dtype, given to f as a value of it.
template <class F>
void with_storage(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kBFloat16:
      return f(bfloat16{});
    case at::kHalf:
      return f(float16{});
    default:
      return f(float{});
  }
}

template <class T>
T* pointer(const at::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace fdfa
