#pragma once

#include "common/params.h"
#include "cuda/launch.h"

// The CUDA kernels' host side. Parameters are read when the launch is issued and pointers are to
// device memory; the work is queued on `stream` and the launch error, if any, is returned. T is float,
// bfloat16 or float16.

namespace fdfa::cuda {

template <class T>
cudaError_t launch_epilogue(const EpilogueParams<T>& params, cudaStream_t stream);

// Blocks of one network: they have samples, outputs, rule and kind of noise in common. counter: null,
// or the blocks' `updates`, which this launch counts up after all of them have read it.
// output_bias_grad: null, or [outputs], which becomes the error summed over the samples. Both want a
// block that has samples and features.
template <class T>
cudaError_t launch_feedback_step(const FeedbackParams<T>* blocks, int64_t count, int64_t* counter,
                                 float* output_bias_grad, cudaStream_t stream);

template <class T>
cudaError_t launch_spread(const SpreadParams<T>& params, cudaStream_t stream);

cudaError_t launch_next_noise(const NextNoiseParams& params, cudaStream_t stream);
// Adds one.
cudaError_t launch_count(int64_t* counter, cudaStream_t stream);

// The number of parts in which launch_moments sums on the current device.
int64_t moment_parts(int64_t rows, int64_t channels);
cudaError_t launch_moments(const MomentParams& params, cudaStream_t stream);
cudaError_t launch_norm(const NormForwardParams& params, cudaStream_t stream);
cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream);
cudaError_t launch_combine(const CombineParams& params, cudaStream_t stream);

cudaError_t launch_max_pool(const MaxPoolParams& params, cudaStream_t stream);
cudaError_t launch_max_pool_backward(const MaxPoolBackwardParams& params, cudaStream_t stream);

}  // namespace fdfa::cuda
