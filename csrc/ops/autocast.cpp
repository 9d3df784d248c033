#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/ops.h"

// Under torch.autocast the matrix products run in its lower precision, as those of torch.nn do. The
// feedback needs no rule: it takes activations of any type and keeps B in float32.

namespace fdfa {
namespace {

template <c10::DispatchKey kKey, c10::DeviceType kDevice>
struct Autocast {
  static Tensor cast(const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), t, kDevice);
  }
  static OptionalTensor cast(const OptionalTensor& t) {
    return t ? OptionalTensor(cast(*t)) : std::nullopt;
  }

  static Dual linear(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                     const OptionalTensor& bias, const Tensor& noise_state, int64_t block,
                     c10::string_view activation, c10::string_view noise) {
    static const auto op = find<decltype(fdfa::linear)>("fdfa::linear");
    const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
    return op.call(cast(x), cast(tangent), cast(weight), cast(bias), noise_state, block, activation,
                   noise);
  }

  static Convolved conv2d(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                          const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation, int64_t groups, const Tensor& noise_state,
                          int64_t block, c10::string_view activation, c10::string_view noise,
                          at::OptionalIntArrayRef pool, int64_t patch) {
    static const auto op = find<decltype(fdfa::conv2d)>("fdfa::conv2d");
    const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
    return op.call(cast(x), cast(tangent), cast(weight), cast(bias), stride, padding, dilation, groups,
                   noise_state, block, activation, noise, pool, patch);
  }
};

template <c10::DispatchKey kKey, c10::DeviceType kDevice>
void implement(torch::Library& m) {
  m.impl("linear", Autocast<kKey, kDevice>::linear);
  m.impl("conv2d", Autocast<kKey, kDevice>::conv2d);
}

}  // namespace
}  // namespace fdfa

TORCH_LIBRARY_IMPL(fdfa, AutocastCPU, m) {
  fdfa::implement<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>(m);
}

TORCH_LIBRARY_IMPL(fdfa, AutocastCUDA, m) {
  fdfa::implement<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>(m);
}
