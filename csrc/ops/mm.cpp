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
  if (!at::hasMKL()) return std::nullopt;
  const auto op =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", /*overload_name=*/""});
  if (op) return op->typed<LinearSignature>();
#endif
  return std::nullopt;
}

// Below, oneDNN's call costs more than it saves: 11 us against 1 us.
constexpr int64_t kOneDnnMultiplications = int64_t{1} << 21;
// Below, turning the product over costs more than it gains.
constexpr int64_t kTransposedMultiplications = int64_t{1} << 18;
// Elements of the first factor.
constexpr int64_t kOneDnnRowsByRows = int64_t{1} << 19;

const std::optional<LinearHandle>& onednn_linear() {
  static const std::optional<LinearHandle> handle = find_onednn_linear();
  return handle;
}

bool is_dense(const Tensor& t) { return t.is_contiguous() || t.t().is_contiguous(); }

// Of operands large enough for oneDNN's call.
bool onednn_is_faster(const Tensor& a, const Tensor& b) {
#if defined(__x86_64__)
  // MKL, which at::mm takes, has its best kernels for Intel's processors alone. There oneDNN gains by
  // the products that it has an entry for, rows by rows, with a large matrix first: W xᵀ takes 0.64 of
  // the time of MKL's x Wᵀ for [64, 800] by [800, 800], and 0.87 for [512, 1000] by [1000, 1000].
  if (__builtin_cpu_is("intel")) {
    return a.is_contiguous() && b.t().is_contiguous() && a.numel() >= kOneDnnRowsByRows;
  }
  // On others MKL keeps to AVX2, where oneDNN gains by AVX-512 alone: held to AVX2 it takes 0.9 to 1.1
  // of MKL's time, and 1.1 to 1.5 for the gradient of a weight.
  if (!__builtin_cpu_supports("avx512f")) return false;
#endif
  return is_dense(a) && is_dense(b);
}

void* end(const Tensor& t) { return static_cast<char*>(t.data_ptr()) + t.nbytes(); }

Tensor memory_at(void* data, at::IntArrayRef sizes, const Tensor& owner) {
  return at::for_blob(data, sizes)
      .deleter([owner](void*) {})
      .options(owner.options())
      .target_device(owner.device())
      .make_tensor();
}

}  // namespace

bool mm_is_onednn(const Tensor& a, const Tensor& b) {
  return onednn_linear() && a.dim() == 2 && b.dim() == 2 && a.is_cpu() &&
         a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
         a.size(0) * a.size(1) * b.size(1) >= kOneDnnMultiplications && onednn_is_faster(a, b) &&
         at::globalContext().userEnabledMkldnn();
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

std::tuple<Tensor, Tensor> empty_pair(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const Tensor both = at::empty({2 * c10::multiply_integers(sizes)}, options);
  const Tensor first = memory_at(both.data_ptr(), sizes, both);
  return {first, memory_at(end(first), sizes, both)};
}

Tensor joined(const Tensor& first, const Tensor& second) {
  if (!first.is_contiguous() || !second.is_contiguous() || end(first) != second.data_ptr()) return {};
  return memory_at(first.data_ptr(), {2 * first.size(0), first.size(1)}, first);
}

bool transposed_product_pays(const Tensor& x, const Tensor& weight) {
  return x.is_cpu() && x.dim() == 2 && x.scalar_type() == at::kFloat && x.size(0) < 512 &&
         x.numel() * weight.size(0) >= kTransposedMultiplications &&
         at::globalContext().userEnabledMkldnn();  // else products are torch's own
}

std::tuple<Tensor, Tensor> transposed_products(const Tensor& x, const OptionalTensor& tangent,
                                               const Tensor& weight) {
  const Tensor both = tangent ? joined(x, *tangent) : Tensor();
  if (!both.defined()) {
    return {call_mm(weight, x.t()), tangent ? call_mm(weight, tangent->t()) : Tensor()};
  }
  const Tensor products = call_mm(weight, both.t());
  const int64_t samples = x.size(0);
  return {products.narrow(1, 0, samples), products.narrow(1, samples, samples)};
}

std::tuple<Tensor, Tensor> paired_products(const Tensor& x, const OptionalTensor& tangent,
                                           const Tensor& weight) {
  const int64_t rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  const Tensor primal = x.reshape({rows, weight.size(1)});
  const Tensor direction = tangent ? tangent->reshape(primal.sizes()) : Tensor();
  auto [product, follower] = empty_pair({rows, weight.size(0)}, x.options());
  if (const Tensor both = tangent ? joined(primal, direction) : Tensor(); both.defined()) {
    Tensor products = joined(product, follower);
    at::mm_out(products, both, weight.t());
  } else {
    at::mm_out(product, primal, weight.t());
    if (tangent) at::mm_out(follower, direction, weight.t());
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
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
  if (x.is_cuda() && pairs_pay(x.size(0), x.device())) {
    const auto [product, output_tangent] = paired_products(x, tangent, weight);
    return {bias ? at::add(product, *bias) : product, output_tangent};
  }
  if (x.dim() == 2 && transposed_product_pays(x, weight)) {
    const auto [z, tz] = transposed_products(x, tangent, weight);
    const auto rows = [](const Tensor& z) { return z.t().clone(at::MemoryFormat::Contiguous); };
    Tensor y = rows(z);
    if (bias) y.add_(*bias);
    return {y, rows(tz)};
  }
  return {plain_linear(x, weight, bias), call_mm(*tangent, weight.t())};
}

}  // namespace fdfa
