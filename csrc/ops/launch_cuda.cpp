#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#include "ops/launch.h"

namespace fdfa {

namespace {

// kernel(arguments..., stream) on the device's current stream.
template <class Launch>
void on_stream(const at::Device& device, const Launch& kernel) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(kernel(c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

template <class T>
void launch_cuda(const EpilogueParams<T>& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_epilogue(params, stream); });
}

template <class T>
void launch_cuda(const std::vector<FeedbackParams<T>>& blocks, int64_t* counter,
                 float* output_bias_grad, const at::Device& device) {
  const auto count = static_cast<int64_t>(blocks.size());
  on_stream(device, [&](cudaStream_t stream) {
    return cuda::launch_feedback_step(blocks.data(), count, counter, output_bias_grad, stream);
  });
}

template <class T>
void launch_cuda(const SpreadParams<T>& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_spread(params, stream); });
}

void launch_cuda(const NextNoiseParams& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_next_noise(params, stream); });
}

int64_t moment_parts_cuda(const MomentParams& params, const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  return cuda::moment_parts(params.rows, params.channels);
}

void launch_cuda(const MaxPoolParams& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_max_pool(params, stream); });
}

void launch_cuda(const MaxPoolBackwardParams& params, const at::Device& device) {
  on_stream(device,
            [&](cudaStream_t stream) { return cuda::launch_max_pool_backward(params, stream); });
}

void launch_cuda(const PooledEpilogueParams& params, const at::Device& device) {
  const EpilogueParams<float>& e = params.epilogue;
  launch_cuda(e, device);
  launch_cuda(MaxPoolParams{e.y, e.ty, params.pooled, params.pooled_tangent, /*winners=*/nullptr,
                            params.shape, kNoNoise},
              device);
}

void launch_cuda(const MomentParams& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_moments(params, stream); });
}

void launch_cuda(const NormForwardParams& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_norm(params, stream); });
}

void launch_cuda(const NormBackwardParams& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_norm_backward(params, stream); });
}

void launch_cuda(const CombineParams& params, const at::Device& device) {
  on_stream(device, [&](cudaStream_t stream) { return cuda::launch_combine(params, stream); });
}

template void launch_cuda<float>(const EpilogueParams<float>&, const at::Device&);
template void launch_cuda<bfloat16>(const EpilogueParams<bfloat16>&, const at::Device&);
template void launch_cuda<float16>(const EpilogueParams<float16>&, const at::Device&);
template void launch_cuda<float>(const std::vector<FeedbackParams<float>>&, int64_t*, float*,
                                 const at::Device&);
template void launch_cuda<bfloat16>(const std::vector<FeedbackParams<bfloat16>>&, int64_t*, float*,
                                    const at::Device&);
template void launch_cuda<float16>(const std::vector<FeedbackParams<float16>>&, int64_t*, float*,
                                   const at::Device&);
template void launch_cuda<float>(const SpreadParams<float>&, const at::Device&);
template void launch_cuda<bfloat16>(const SpreadParams<bfloat16>&, const at::Device&);
template void launch_cuda<float16>(const SpreadParams<float16>&, const at::Device&);

}  // namespace fdfa
