#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#include "ops/launch.h"

namespace fdfa {

template <class T>
void launch_cuda(const EpilogueParams<T>& params, const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::launch_epilogue(params, c10::cuda::getCurrentCUDAStream()));
}

template <class T>
void launch_cuda(const std::vector<FeedbackParams<T>>& blocks, const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  const auto count = static_cast<int64_t>(blocks.size());
  C10_CUDA_CHECK(cuda::launch_feedback_step(blocks.data(), count, c10::cuda::getCurrentCUDAStream()));
}

void launch_cuda(const MaxPoolParams& params, const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::launch_max_pool(params, c10::cuda::getCurrentCUDAStream()));
}

void launch_cuda(const MaxPoolBackwardParams& params, const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(cuda::launch_max_pool_backward(params, c10::cuda::getCurrentCUDAStream()));
}

template void launch_cuda<float>(const EpilogueParams<float>&, const at::Device&);
template void launch_cuda<bfloat16>(const EpilogueParams<bfloat16>&, const at::Device&);
template void launch_cuda<float16>(const EpilogueParams<float16>&, const at::Device&);
template void launch_cuda<float>(const std::vector<FeedbackParams<float>>&, const at::Device&);
template void launch_cuda<bfloat16>(const std::vector<FeedbackParams<bfloat16>>&, const at::Device&);
template void launch_cuda<float16>(const std::vector<FeedbackParams<float16>>&, const at::Device&);

}  // namespace fdfa
