#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_make_dual.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <utility>

#include "ops/output_layer.h"

namespace fdfa {

// Dual tensors of torch's forward mode. torch._make_dual and torch._unpack_dual make views that
// autograd can follow, which costs a small step a tenth of its time. A tensor without a graph needs
// none: here it gets an alias with the same version counter, which takes a fifth of the time.

// torch has no other level.
inline constexpr uint64_t kLevel = 0;

inline bool has_tangent(const at::Tensor& x) { return x._fw_grad(kLevel).defined(); }

// Whether it is no wrapper of torch.func and no subclass with a dispatch of its own.
inline bool is_plain(const at::Tensor& x) {
  static constexpr c10::DispatchKeySet others{
      c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize};
  return !x.key_set().has_any(others);
}
inline bool needs_no_view(const at::Tensor& x) { return !x.requires_grad() && is_plain(x); }

inline at::Tensor share(const at::Tensor& x) {
  const auto* impl = x.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), true));
}

// Its primal, with the same place in the graph. A view would have x for its base, and keep the tangent
// alive as long as autograd keeps the primal.
inline at::Tensor primal_of(const at::Tensor& x) {
  if (!is_plain(x) || (x.requires_grad() && x.is_leaf())) return x._fw_primal(kLevel);
  const at::Tensor primal = share(x);
  if (x.requires_grad()) {
    using namespace torch::autograd::impl;
    set_gradient_edge(primal, gradient_edge(x));
  }
  return primal;
}

// Primal and tangent, if it has one.
inline std::pair<at::Tensor, std::optional<at::Tensor>> unpack_dual(const at::Tensor& x) {
  const at::Tensor& tangent = x._fw_grad(kLevel);
  if (!tangent.defined()) return {x, std::nullopt};
  return {primal_of(x), tangent};
}

inline at::Tensor make_dual(const at::Tensor& primal, const at::Tensor& tangent) {
  if (!needs_no_view(primal) || has_tangent(primal)) {
    const at::AutoGradMode keeps_graph(true);  // where it is off, the view would have none
    return at::_make_dual(primal, tangent, kLevel);
  }
  const at::Tensor dual = share(primal);
  dual._set_fw_grad(tangent, kLevel, /*is_inplace_op=*/false);
  return dual;
}

// The same of a primal that nobody else has: it becomes the dual tensor. A view, as _make_dual returns
// one for a primal with a graph, costs copies where it is changed in place.
inline at::Tensor make_dual_of_fresh(const at::Tensor& primal, const at::Tensor& tangent) {
  if (!is_plain(primal) || primal.is_leaf() || primal.is_view() || has_tangent(primal))
    return make_dual(primal, tangent);
  primal._set_fw_grad(tangent, kLevel, /*is_inplace_op=*/false);
  return primal;
}

// The result of a linear output layer as a dual tensor without a graph, and the layer's input; nothing
// for one that has to be left to autograd, since its input depends on parameters or autocast stands
// between. Without tangents both are plain tensors.
inline std::optional<std::pair<at::Tensor, at::Tensor>> dual_output_layer(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    bool has_tangents) {
  const bool is_simple = input.dim() == 2 && !input.requires_grad() && weight.requires_grad() &&
                         weight.is_leaf() && (!bias || (bias->is_leaf() && bias->dim() == 1)) &&
                         has_tangent(input) == has_tangents && !has_tangent(weight) &&
                         !(bias && has_tangent(*bias)) &&
                         !at::autocast::is_autocast_enabled(input.device().type());
  if (!is_simple) return std::nullopt;
  const auto [x, tangent] = unpack_dual(input);
  const auto [y, ty] = output_layer(x, tangent, weight, bias);
  return std::pair{ty ? make_dual(y, *ty) : y, x};
}

}  // namespace fdfa
