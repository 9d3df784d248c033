#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

// The end of a block, BatchNorm and activation, as one dual pass: the sums that its statistics need are
// one pass over x and its tangent, and the rest is the epilogue of the linear blocks. torch's kernels
// take six passes for the same, and in channels_last some of them slow ones.

namespace fdfa {
namespace {

void check_input(const char* op, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, "fdfa::", op, ": x must be float32; got ",
              x.scalar_type());
  TORCH_CHECK(x.dim() < 2 || x.size(1) > 0, "fdfa::", op, ": x must have channels; got ", x.sizes());
  TORCH_CHECK((x.dim() == 2 && x.is_contiguous()) ||
                  (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)),
              "fdfa::", op, ": x must be [N, C], or [N, C, H, W] in channels_last; got ", x.sizes(),
              " with strides ", x.strides());
}

void check_channels(const char* op, const char* argument, const OptionalTensor& t, const Tensor& x) {
  if (!t) return;
  check_like(op, argument, *t, "x", x);
  check_shape(op, argument, *t, {x.size(1)});
  TORCH_CHECK(t->is_contiguous(), "fdfa::", op, ": ", argument, " must be contiguous");
}

const float* read(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

float* pointer_or_null(const OptionalTensor& t) { return t ? t->data_ptr<float>() : nullptr; }

// The sums over rows of x and t, which may be null: [parts, 4, channels]. The pivot is x's first row,
// as good as any.
Tensor moments(const Tensor& x, const float* t) {
  MomentParams p{};
  p.x = p.pivot = x.const_data_ptr<float>();
  p.t = t;
  p.channels = x.size(1);
  p.rows = x.numel() / p.channels;
  p.parts = moment_parts(p, x.device());
  Tensor sums = at::empty({p.parts, 4, p.channels}, x.options().dtype(at::kDouble));
  p.sums = sums.data_ptr<double>();
  launch(p, x.device());
  return sums;
}

struct Arguments {
  const char* op;
  const Tensor& x;
  const OptionalTensor &tangent, &weight, &bias, &running_mean, &running_var, &num_batches_tracked;
  bool training;
  double momentum, eps;
  const Tensor& noise_state;
  int64_t block;
  c10::string_view activation, noise;
  int64_t patch;
};

void check_arguments(const Arguments& a) {
  const Tensor& x = a.x;
  check_input(a.op, x);
  TORCH_CHECK(!a.training || x.numel() > x.size(1), "fdfa::", a.op,
              ": x must hold more than one value a channel to train; got ", x.sizes());
  TORCH_CHECK(a.running_mean.has_value() == a.running_var.has_value() && (a.training || a.running_mean),
              "fdfa::", a.op,
              ": running_mean and running_var go together, and are needed unless training");
  if (a.tangent) {
    check_like(a.op, "tangent", *a.tangent, "x", x);
    check_shape(a.op, "tangent", *a.tangent, x.sizes());
  }
  check_channels(a.op, "weight", a.weight, x);
  check_channels(a.op, "bias", a.bias, x);
  check_channels(a.op, "running_mean", a.running_mean, x);
  check_channels(a.op, "running_var", a.running_var, x);
  if (a.num_batches_tracked) {
    const Tensor& t = *a.num_batches_tracked;
    TORCH_CHECK(t.scalar_type() == at::kLong && t.numel() == 1 && t.device() == x.device(),
                "fdfa::", a.op, ": num_batches_tracked must be one int64 on ", x.device(), "; got ",
                t.scalar_type(), " ", t.sizes(), " on ", t.device());
  }
  check_counter(a.op, "noise_state", a.noise_state, 3, x);
  check_patch(a.op, x.sizes(), a.patch);
}

// All but the last pass over the images, and what that takes; ty is left to the caller.
struct Prepared {
  Tensor mean, inverse_std, y, pre;
  EpilogueParams<float> epilogue;
  Tensor kept[3];  // memory that the epilogue reads
};

Prepared prepare(const Arguments& a) {
  const Tensor& x = a.x;
  const Activation f = parse_activation(a.op, a.activation);
  const Noise kind = parse_noise(a.op, a.noise, /*may_be_none=*/true);
  const int64_t channels = x.size(1);
  const Tensor tx = a.tangent ? a.tangent->contiguous(x.suggest_memory_format()) : Tensor();
  const Tensor mean = at::empty({channels}, x.options()), inverse_std = at::empty_like(mean);
  const Tensor maps = at::empty({4, channels}, x.options());
  Tensor sums;
  NormForwardParams n{};
  if (a.training) {
    sums = moments(x, a.tangent ? tx.const_data_ptr<float>() : nullptr);
    n.sums = sums.const_data_ptr<double>();
    n.parts = sums.size(0);
  }
  n.pivot = x.const_data_ptr<float>();
  n.rows = x.numel() / channels;
  n.channels = channels;
  n.weight = read(a.weight);
  n.bias = read(a.bias);
  n.running_mean = pointer_or_null(a.running_mean);
  n.running_var = pointer_or_null(a.running_var);
  n.momentum = a.momentum;
  n.eps = a.eps;
  n.mean = mean.data_ptr<float>();
  n.inverse_std = inverse_std.data_ptr<float>();
  n.map = {maps.data_ptr<float>(), channels};
  n.batches = a.num_batches_tracked ? a.num_batches_tracked->data_ptr<int64_t>() : nullptr;
  launch(n, x.device());

  const bool keep_pre = derivative_needs_pre_activation(f);
  const Tensor y = at::empty_like(x);
  const Tensor pre = keep_pre ? at::empty_like(x) : empty_placeholder(x);
  EpilogueParams<float> p{};
  p.z = x.data_ptr<float>();
  p.tz = a.tangent ? tx.data_ptr<float>() : nullptr;
  p.bias = n.map.bias();
  p.y = y.data_ptr<float>();
  (keep_pre ? p.pre : p.zeros[0]) = pre.data_ptr<float>();
  p.samples = x.size(0);
  p.features = x.size(0) == 0 ? 0 : x.numel() / x.size(0);
  p.channels = channels;
  p.activation = f;
  const BlockNoise u = block_noise(a.op, x.sizes(), a.noise_state, a.block, kind, a.patch);
  p.noise = u.params;
  p.map = n.map.channel_map();
  return {mean, inverse_std, y, pre, p, {maps, tx, u.given}};
}

}  // namespace

Normalized batch_norm(const Tensor& x, const OptionalTensor& tangent, const OptionalTensor& ty,
                      const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, bool training, double momentum,
                      double eps, const Tensor& noise_state, int64_t block, c10::string_view activation,
                      c10::string_view noise, at::OptionalIntArrayRef pool, int64_t patch) {
  const Arguments a{"batch_norm", x,
                    tangent,      weight,
                    bias,         running_mean,
                    running_var,  num_batches_tracked,
                    training,     momentum,
                    eps,          noise_state,
                    block,        activation,
                    noise,        patch};
  check_arguments(a);
  if (pool) {
    TORCH_CHECK(!ty, "fdfa::batch_norm: ty must be none where a pool follows, which has the tangent");
    const PoolShape shape = check_pool(a.op, x, *pool);
    const Prepared p = prepare(a);
    const auto [pooled, pooled_tangent] = run_pooled(p.epilogue, x, shape, /*donated=*/{});
    return {p.y, p.pre, p.mean, p.inverse_std, pooled, pooled_tangent};
  }
  if (ty) {
    check_like(a.op, "ty", *ty, "x", x);
    check_shape(a.op, "ty", *ty, x.sizes());
    TORCH_CHECK(ty->is_contiguous(x.suggest_memory_format()),
                "fdfa::batch_norm: ty must have the memory order of x; got strides ", ty->strides());
  } else {
    TORCH_CHECK(!tangent && parse_noise(a.op, noise, /*may_be_none=*/true) == Noise::none,
                "fdfa::batch_norm: ty must be given where there is a tangent or noise");
  }
  Prepared p = prepare(a);
  p.epilogue.ty = ty ? ty->data_ptr<float>() : nullptr;
  launch(p.epilogue, x.device());
  const auto nothing = [&] { return at::empty({0}, x.options()); };
  return {p.y, p.pre, p.mean, p.inverse_std, nothing(), nothing()};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& delta, const Tensor& x,
                                                       const OptionalTensor& weight, const Tensor& mean,
                                                       const Tensor& inverse_std, bool training) {
  const char* op = "batch_norm_backward";
  check_input(op, x);
  check_like(op, "delta", delta, "x", x);
  check_shape(op, "delta", delta, x.sizes());
  check_channels(op, "weight", weight, x);
  check_channels(op, "mean", mean, x);
  check_channels(op, "inverse_std", inverse_std, x);
  const Tensor t = delta.contiguous(x.suggest_memory_format());
  const int64_t channels = x.size(1), rows = x.numel() / channels;

  const Tensor dx = at::empty_like(x), dweight = at::empty_like(mean), dbias = at::empty_like(mean);
  if (rows == 0) {  // nothing to take moments of
    dweight.zero_();
    dbias.zero_();
    return {dx, dweight, dbias};
  }
  const Tensor sums = moments(x, t.const_data_ptr<float>()),
               maps = at::empty({4, channels}, x.options());
  NormBackwardParams n{};
  n.sums = sums.const_data_ptr<double>();
  n.pivot = x.const_data_ptr<float>();
  n.parts = sums.size(0);
  n.rows = rows;
  n.channels = channels;
  n.weight = read(weight);
  n.mean = mean.const_data_ptr<float>();
  n.inverse_std = inverse_std.const_data_ptr<float>();
  n.training = training;
  n.weight_grad = dweight.data_ptr<float>();
  n.bias_grad = dbias.data_ptr<float>();
  n.map = {maps.data_ptr<float>(), channels};
  launch(n, x.device());

  CombineParams p;
  p.x = x.const_data_ptr<float>();
  p.t = t.const_data_ptr<float>();
  p.out = dx.data_ptr<float>();
  p.map = n.map.channel_map();
  p.rows = rows;
  p.channels = channels;
  launch(p, x.device());
  return {dx, dweight, dbias};
}

}  // namespace fdfa
