#include <ATen/ops/as_strided.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/convolution.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace fdfa {
namespace {

int64_t features_of(const Tensor& t) { return t.size(0) == 0 ? 0 : t.numel() / t.size(0); }

// The library's products z = W x and tz = W tangent, which is undefined where there is no tangent.
// Dense in feature order, or transposed, [features, N].
struct Products {
  Tensor z, tz;
  bool transposed = false;
  Tensor ty = {};  // memory for it where tz is undefined; may itself be undefined
};

// The pass after them.
struct Finish {
  OptionalTensor bias;  // contiguous
  int64_t channels;
  const Tensor& noise_state;
  int64_t block;
  Activation activation;
  Noise noise;
  const char* op;
  int64_t patch = 1;

  bool keeps_pre() const { return derivative_needs_pre_activation(activation); }
};

BlockNoise make_noise(const Finish& finish, const Tensor& y) {
  return block_noise(finish.op, y.sizes(), finish.noise_state, finish.block, finish.noise,
                     finish.patch);
}

// ty is left to the caller.
template <class T>
EpilogueParams<T> epilogue_params(const Finish& finish, const Products& products, const Tensor& y,
                                  const Tensor& pre, const NoiseParams& noise) {
  EpilogueParams<T> p{};
  p.z = pointer<T>(products.z);
  p.tz = products.tz.defined() ? pointer<T>(products.tz) : nullptr;
  p.y = pointer<T>(y);
  p.bias = finish.bias ? pointer<T>(*finish.bias) : nullptr;
  (finish.keeps_pre() ? p.pre : p.zeros[0]) = pointer<T>(pre);
  p.samples = y.size(0);
  p.features = features_of(y);
  p.channels = finish.channels;
  p.activation = finish.activation;
  p.noise = noise;
  p.transposed_pitch = products.transposed ? products.z.stride(0) : 0;
  return p;
}

Tensor empty_pre(const Finish& finish, const Tensor& y) {
  return finish.keeps_pre() ? at::empty_like(y) : empty_placeholder(y);
}

// y and ty overwrite the products, unless these are transposed.
Dual run(const Finish& finish, const Products& products) {
  auto [z, tz, transposed, donated] = products;
  const bool zero = !tz.defined() && finish.noise == Noise::none;
  Tensor y = z;
  if (transposed) {
    const int64_t sizes[] = {z.size(1), z.size(0)};
    if (!zero && pairs_pay(z.size(1), z.device())) {
      std::tie(y, donated) = empty_pair(sizes, z.options());
    } else {
      y = at::empty(sizes, z.options());
    }
  }
  const BlockNoise noise = make_noise(finish, y);
  const Tensor ty = zero                          ? empty_placeholder(y)
                    : tz.defined() && !transposed ? tz
                    : donated.defined()           ? donated
                                                  : at::empty_like(y);
  const Tensor pre = empty_pre(finish, y);
  with_storage(y.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    EpilogueParams<T> p = epilogue_params<T>(finish, products, y, pre, noise.params);
    (zero ? p.zeros[1] : p.ty) = pointer<T>(ty);
    launch(p, y.device());
  });
  return {y, ty, pre};
}

void check_operands(const char* op, const Tensor& x, const OptionalTensor& tangent,
                    const Tensor& weight, const OptionalTensor& bias, const Tensor& noise_state) {
  check_floating(op, "x", x);
  check_like(op, "weight", weight, "x", x);
  if (tangent) {
    check_like(op, "tangent", *tangent, "x", x);
    check_shape(op, "tangent", *tangent, x.sizes());
  }
  if (bias) {
    check_like(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {weight.size(0)});
  }
  check_counter(op, "noise_state", noise_state, 3, x);
}

Finish check_finish(const char* op, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& noise_state, int64_t block, c10::string_view activation,
                    c10::string_view noise, int64_t patch = 1) {
  return {bias ? OptionalTensor(bias->contiguous()) : std::nullopt,
          weight.size(0),
          noise_state,
          block,
          parse_activation(op, activation),
          parse_noise(op, noise, /*may_be_none=*/true),
          op,
          patch};
}

// The operands of a convolution and what it does with them; images are taken and made in channels_last.
struct Convolution {
  const char* op;
  const Tensor& x;
  const OptionalTensor& tangent;
  const Tensor& weight;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// Dense in channels_last. With one channel or one pixel the strides of row-major order describe the
// same memory, and `contiguous` keeps them; cuDNN then computes in row-major order, and its result
// would be copied.
Tensor channels_last(const Tensor& t) {
  const Tensor dense = t.contiguous(at::MemoryFormat::ChannelsLast);
  return dense.is_cpu() ? dense
                        : dense.as_strided(t.sizes(), c10::get_channels_last_strides_2d(t.sizes()));
}

Products convolve(const Convolution& c) {
  constexpr auto kOrder = at::MemoryFormat::ChannelsLast;
  const Tensor weight_dense = channels_last(c.weight);
  const auto product = [&](const Tensor& input) {
    const auto [pixels, stride] = read_pixels(input, c.weight, c.stride, c.padding);
    return at::convolution(channels_last(pixels), weight_dense, {}, stride, c.padding, c.dilation,
                           /*transposed=*/false, /*output_padding=*/{0, 0}, c.groups)
        .contiguous(kOrder);
  };
  return {product(c.x), c.tangent ? product(*c.tangent) : Tensor()};
}

void check_images(const Convolution& c, const OptionalTensor& bias, const Tensor& noise_state) {
  TORCH_CHECK(c.x.dim() == 4, "fdfa::", c.op, ": x must be [N, C, H, W]; got ", c.x.sizes());
  TORCH_CHECK(c.weight.dim() == 4, "fdfa::", c.op,
              ": weight must be [out_channels, in_channels / groups, kh, kw]; got ", c.weight.sizes());
  TORCH_CHECK(c.stride.size() == 2 && c.padding.size() == 2 && c.dilation.size() == 2, "fdfa::", c.op,
              ": stride, padding and dilation must be two numbers each; got stride ", c.stride,
              ", padding ", c.padding, ", dilation ", c.dilation);
  check_operands(c.op, c.x, c.tangent, c.weight, bias, noise_state);
}

}  // namespace

Patches check_patch(const char* op, at::IntArrayRef sizes, int64_t patch) {
  TORCH_CHECK_VALUE(patch >= 1, "fdfa::", op, ": patch must be 1 or more; got ", patch);
  if (patch == 1 || sizes.size() != 4) return {};
  constexpr int64_t kMost = int64_t{1} << 30;  // int32_t counts, with room for a patch more
  const int64_t channels = sizes[1], height = sizes[2], width = sizes[3];
  TORCH_CHECK(channels * height * width < kMost, "fdfa::", op,
              ": an image in patches must have less than 2^30 elements; got ", sizes);
  const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
  return {small(std::clamp<int64_t>(patch, 1, std::max<int64_t>({1, height, width}))), small(height),
          small(width), small(channels)};
}

BlockNoise block_noise(const char* op, at::IntArrayRef sizes, const Tensor& noise_state, int64_t block,
                       Noise kind, int64_t patch) {
  NoiseParams noise{noise_state.const_data_ptr<int64_t>(), block, kind};
  noise.patches = check_patch(op, sizes, patch);
  if (kind == Noise::none || noise.patches.size == 0) return {noise, {}};
  const int64_t features = noise.patches.features();
  Tensor given = at::empty({sizes[0], features}, noise_state.options().dtype(at::kFloat));
  EpilogueParams<float> p{};
  p.ty = pointer<float>(given);
  p.samples = sizes[0];
  p.features = p.channels = features;
  p.noise = NoiseParams{noise.state, block, kind};
  launch(p, noise_state.device());
  noise.kind = Noise::none;
  noise.given = p.ty;
  return {noise, given};
}

Tensor empty_placeholder(const Tensor& y) {
  const std::vector<int64_t> strides(y.dim(), 0);
  return at::empty_strided(y.sizes(), strides, y.options());
}

Tensor next_noise(Tensor state) {
  check_counter("next_noise", "state", state, 3, state);
  Tensor snapshot = at::empty_like(state);
  launch(NextNoiseParams{state.data_ptr<int64_t>(), snapshot.data_ptr<int64_t>()}, state.device());
  return snapshot;
}

Dual linear(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
            const OptionalTensor& bias, const Tensor& noise_state, int64_t block,
            c10::string_view activation, c10::string_view noise) {
  const char* op = "linear";
  TORCH_CHECK(weight.dim() == 2, "fdfa::linear: weight must be [out_features, in_features]; got ",
              weight.sizes());
  TORCH_CHECK(x.dim() >= 2 && x.size(-1) == weight.size(1), "fdfa::linear: x must be [N, *, ",
              weight.size(1), "]; got ", x.sizes());
  check_operands(op, x, tangent, weight, bias, noise_state);
  const Finish finish = check_finish(op, weight, bias, noise_state, block, activation, noise);

  const int64_t out_features = weight.size(0);
  if (transposed_product_pays(x, weight)) {
    const auto [z, tz] = transposed_products(x, tangent, weight);
    return run(finish, {z, tz, /*transposed=*/true});
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  const int64_t rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
  const bool has_tangent = tangent || finish.noise != Noise::none;
  if (x.is_cuda() && has_tangent && pairs_pay(rows, x.device())) {
    const auto [z, tz] = paired_products(x, tangent, weight);
    return run(finish, {z, tangent ? tz : Tensor(), /*transposed=*/false, tz});
  }
  const auto product = [&](const Tensor& input) {
    return mm(input.reshape({rows, weight.size(1)}), weight.t()).view(sizes);
  };
  return run(finish, {product(x), tangent ? product(*tangent) : Tensor()});
}

std::tuple<Tensor, Tensor> dual_activation(const Tensor& x, const Tensor& tangent,
                                           c10::string_view name) {
  const char* op = "dual_activation";
  const Activation activation = parse_activation(op, name);
  check_floating(op, "x", x);
  check_like(op, "tangent", tangent, "x", x);
  check_shape(op, "tangent", tangent, x.sizes());
  // In the order that torch's activations return, which any will do for.
  Tensor y = at::empty_like(x), ty = at::empty_like(x);
  const auto in_order = [&](const Tensor& t) {
    return t.strides() == y.strides() ? t : at::empty_like(y).copy_(t);
  };
  const Tensor z = in_order(x), tz = in_order(tangent);
  if (x.numel() == 0) return {y, ty};
  with_storage(x.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    EpilogueParams<T> p{};
    p.z = pointer<T>(z);
    p.tz = pointer<T>(tz);
    p.y = pointer<T>(y);
    p.ty = pointer<T>(ty);
    // As the device spreads them over its threads.
    p.features = x.is_cpu() || x.dim() == 0 ? x.numel() : x.size(-1);
    p.samples = x.numel() / p.features;
    p.channels = 1;
    p.activation = activation;
    p.noise.kind = Noise::none;
    launch(p, x.device());
  });
  return {y, ty};
}

Convolved conv2d(const Tensor& x, const OptionalTensor& tangent, const Tensor& weight,
                 const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                 at::IntArrayRef dilation, int64_t groups, const Tensor& noise_state, int64_t block,
                 c10::string_view activation, c10::string_view noise, at::OptionalIntArrayRef pool,
                 int64_t patch) {
  const Convolution c{"conv2d", x, tangent, weight, stride, padding, dilation, groups};
  check_images(c, bias, noise_state);
  const Finish finish = check_finish(c.op, weight, bias, noise_state, block, activation, noise, patch);
  const Products products = convolve(c);
  const Tensor& z = products.z;
  if (!pool) return std::tuple_cat(run(finish, products), std::tuple{at::empty({0}, z.options())});
  const PoolShape shape = check_pool(c.op, z, *pool);
  const Tensor pre = empty_pre(finish, z);
  const BlockNoise u = make_noise(finish, z);
  const auto [pooled, pooled_tangent] =
      run_pooled(epilogue_params<float>(finish, products, z, pre, u.params), z, shape,
                 /*donated=*/products.tz);
  return {z, pooled_tangent, pre, pooled};
}

Tensor perturb(const Tensor& y, const OptionalTensor& tangent, const Tensor& noise_state, int64_t block,
               c10::string_view noise, int64_t patch) {
  const char* op = "perturb";
  TORCH_CHECK(y.dim() >= 2, "fdfa::perturb: y must be [N, *features]; got ", y.sizes());
  check_floating(op, "y", y);
  if (tangent) {
    check_like(op, "tangent", *tangent, "y", y);
    check_shape(op, "tangent", *tangent, y.sizes());
  }
  check_counter(op, "noise_state", noise_state, 3, y);
  const Noise kind = parse_noise(op, noise);

  const auto order = y.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor tz = tangent ? tangent->contiguous(order) : Tensor();
  Tensor ty = at::empty(y.sizes(), y.options(), order);
  const BlockNoise u = block_noise(op, y.sizes(), noise_state, block, kind, patch);
  with_storage(y.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    EpilogueParams<T> p{};
    p.tz = tangent ? pointer<T>(tz) : nullptr;
    p.ty = pointer<T>(ty);
    p.samples = y.size(0);
    p.features = p.channels = features_of(y);
    p.noise = u.params;
    launch(p, y.device());
  });
  return ty;
}

}  // namespace fdfa
