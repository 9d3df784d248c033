#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <optional>

#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/output_layer.h"

namespace fdfa {
namespace {

// torch's operator x Wᵀ on oneDNN, or nothing where it is missing or of no use.
using LinearSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
                               c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
using LinearHandle = c10::TypedOperatorHandle<LinearSignature>;

std::optional<LinearHandle> find_onednn_linear() {
#if defined(__x86_64__)
  // at::mm is MKL's, which has its best kernels for Intel's processors alone.
  if (!at::hasMKL() || __builtin_cpu_is("intel")) return std::nullopt;
  const auto op =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", /*overload_name=*/""});
  if (op) return op->typed<LinearSignature>();
#endif
  return std::nullopt;
}

// Below, oneDNN's call costs more than it saves: 11 us against 1 us.
constexpr int64_t kOneDnnMultiplications = int64_t{1} << 21;

bool is_dense(const Tensor& t) { return t.is_contiguous() || t.t().is_contiguous(); }

const std::optional<LinearHandle>& onednn_linear() {
  static const std::optional<LinearHandle> handle = find_onednn_linear();
  return handle;
}

}  // namespace

bool mm_is_onednn(const Tensor& a, const Tensor& b) {
  return onednn_linear() && a.is_cpu() && a.scalar_type() == at::kFloat &&
         b.scalar_type() == at::kFloat && a.size(0) * a.size(1) * b.size(1) >= kOneDnnMultiplications &&
         is_dense(a) && is_dense(b) && at::globalContext().userEnabledMkldnn();
}

Tensor mm(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "fdfa::mm: b must be [k, n] for a of [m, k]; got ", b.sizes(), " for ", a.sizes());
  check_like("mm", "b", b, "a", a);
  if (!mm_is_onednn(a, b)) return at::mm(a, b);
  const at::AutoDispatchBelowAutograd guard;
  const c10::List<std::optional<at::Scalar>> no_scalars;
  return onednn_linear()->call(a, b.t(), std::nullopt, "none", no_scalars, std::nullopt);
}

std::tuple<Tensor, Tensor> paired_products(const Tensor& x, const OptionalTensor& tangent,
                                           const Tensor& weight) {
  const int64_t in_features = weight.size(1), out_features = weight.size(0);
  const int64_t rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  const auto memory_at = [](void* data, at::IntArrayRef sizes, const Tensor& owner) {
    return at::for_blob(data, sizes)
        .deleter([owner](void*) {})
        .options(owner.options())
        .target_device(owner.device())
        .make_tensor();
  };
  const auto end = [](const Tensor& t) { return static_cast<char*>(t.data_ptr()) + t.nbytes(); };

  Tensor both = at::empty({2 * rows, out_features}, x.options());
  Tensor product = memory_at(both.data_ptr(), {rows, out_features}, both);
  Tensor follower = memory_at(end(product), {rows, out_features}, both);
  const Tensor primal = x.reshape({rows, in_features});
  const Tensor direction = tangent ? tangent->reshape({rows, in_features}) : Tensor();
  if (tangent && primal.is_contiguous() && direction.is_contiguous() &&
      end(primal) == direction.data_ptr()) {
    at::mm_out(both, memory_at(primal.data_ptr(), {2 * rows, in_features}, primal), weight.t());
  } else {
    at::mm_out(product, primal, weight.t());
    if (tangent) at::mm_out(follower, direction, weight.t());
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  return {product.view(sizes), follower.view(sizes)};
}

Tensor call_mm(const Tensor& a, const Tensor& b) {
  static const auto op = find<decltype(fdfa::mm)>("fdfa::mm");
  return op.call(a, b);
}

Tensor plain_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (!mm_is_onednn(x, weight.t())) return at::linear(x, weight, bias);
  Tensor y = call_mm(x, weight.t());
  if (bias) y.add_(*bias);
  return y;
}

std::tuple<Tensor, OptionalTensor> output_layer(const Tensor& x, const OptionalTensor& tangent,
                                                const Tensor& weight, const OptionalTensor& bias) {
  if (!tangent) return {plain_linear(x, weight, bias), std::nullopt};
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (!x.is_cuda() || x.size(0) > kMostPairedRows) {
    return {plain_linear(x, weight, bias), call_mm(*tangent, weight.t())};
  }
  const auto [product, output_tangent] = paired_products(x, tangent, weight);
  return {bias ? at::add(product, *bias) : product, output_tangent};
}

}  // namespace fdfa
