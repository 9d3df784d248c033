#include <cstdint>
#include <limits>

#include "common/divisor.h"
#include "common/max_pool.h"
#include "common/noise.h"
#include "cuda/kernels.h"

// Max-pooling of images, with their tangent, their winners and the noise of a block's end where these
// are wanted, in one pass; and its backward. Memory bound. For pooled images of [N, OH, OW, C] the
// forward reads of x and tx what the windows cover, 4 bytes an element each, and writes 4 bytes of y, 4
// of ty and 1 of winners for each pooled element. The backward reads delta and winners, 5 bytes for
// each pooled element, and writes 4 for each element of dx; windows that overlap read from the cache
// again.
//
// Features are the elements of an image, counted (h, w, c). Neighbouring threads take neighbouring
// ones, so that a warp reads and writes whole lines. Offsets of samples take 64 bits, what lies within
// an image 32 (see PoolShape), with precomputed divisions.

namespace fdfa::cuda {
namespace {

constexpr int kQuad = 4;      // features of a Philox block, and floats of a 16-byte access
constexpr int kThreads = 64;  // small, since a small image has few quads

// One element, or an aligned quad by one access.
struct Load {
  FDFA_HD void operator()(const float* p, float (&v)[1]) const { v[0] = *p; }
  FDFA_HD void operator()(const uint8_t* p, uint8_t (&v)[1]) const { v[0] = *p; }
  FDFA_HD void operator()(const float* p, float (&v)[kQuad]) const {
    const float4 quad = *reinterpret_cast<const float4*>(p);
    v[0] = quad.x, v[1] = quad.y, v[2] = quad.z, v[3] = quad.w;
  }
  FDFA_HD void operator()(const uint8_t* p, uint8_t (&v)[kQuad]) const {
    const uchar4 quad = *reinterpret_cast<const uchar4*>(p);
    v[0] = quad.x, v[1] = quad.y, v[2] = quad.z, v[3] = quad.w;
  }
};

__device__ void store(float* p, const float (&v)[1]) { *p = v[0]; }
__device__ void store(float* p, const float (&v)[kQuad]) {
  *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
}

__device__ void store_bytes(uint8_t* p, const float (&v)[1]) { *p = static_cast<uint8_t>(v[0]); }
__device__ void store_bytes(uint8_t* p, const float (&v)[kQuad]) {
  const auto byte = [&](int i) { return static_cast<unsigned char>(v[i]); };
  *reinterpret_cast<uchar4*>(p) = uchar4{byte(0), byte(1), byte(2), byte(3)};
}

// Cuts each image into parts of `size` features, one for each thread block.
class Parts {
 public:
  Parts(int64_t features, int32_t size)
      : size_(size), count_(static_cast<int32_t>((features + size - 1) / size)), per_image_(count_) {}
  int64_t blocks(int64_t samples) const { return samples * count_; }
  // The thread block's sample, and the first feature of its part.
  __device__ void locate(int64_t& sample, int64_t& first) const {
    const auto block = static_cast<int32_t>(blockIdx.x);
    const int32_t image = block / per_image_;
    sample = image;
    first = int64_t{block - image * count_} * size_;
  }

 private:
  int32_t size_, count_;
  Divisor per_image_;
};

// Where a feature lies in its image.
struct Position {
  int32_t row, column, channel;
};

class Layout {
 public:
  Layout(int32_t width, int32_t channels)
      : width_(width), channels_(channels), per_width_(width), per_channels_(channels) {}
  __device__ Position operator()(int32_t feature) const {
    const int32_t pixel = feature / per_channels_, row = pixel / per_width_;
    return {row, pixel - row * width_, feature - pixel * channels_};
  }

 private:
  int32_t width_, channels_;
  Divisor per_width_, per_channels_;
};

// kCount neighbouring features of one pixel of y, with their u. Winners are always found: a select
// each is reckoned to hide behind the loads.
template <Noise kNoise, int kCount>
__device__ void pool_features(const MaxPoolParams& p, const Layout& pooled, int64_t sample,
                              int32_t feature, const float (&u)[kCount]) {
  const Position at = pooled(feature);
  const PoolWindow window = pool_window(p.shape, at.row, at.column);
  const int64_t from = sample * p.shape.image() + window.first + at.channel;
  const int64_t to = sample * p.shape.out_image() + feature;
  float y[kCount], ty[kCount] = {}, winner[kCount];
  if (p.tx == nullptr) {
    pool<false>(window, Load{}, p.x + from, nullptr, y, ty, winner);
  } else {
    pool<true>(window, Load{}, p.x + from, p.tx + from, y, ty, winner);
  }
  if constexpr (kNoise != Noise::none) {
    for (int i = 0; i < kCount; ++i) ty[i] += u[i];
  } else if (p.noise.given != nullptr) {
    const float* given = p.noise.given + sample * p.noise.patches.features();
    for (int i = 0; i < kCount; ++i) ty[i] += given[p.noise.patches.feature_of(feature + i)];
  }
  store(p.y + to, y);
  if (p.ty != nullptr) store(p.ty + to, ty);
  if (p.winners != nullptr) store_bytes(p.winners + to, winner);
}

// u of a quad of features.
template <Noise kNoise>
__device__ void make_noise(const NoiseParams& p, int64_t sample, int64_t quad, float (&u)[kQuad]) {
  if constexpr (kNoise != Noise::none) {
    noise4<kNoise>(noise_stream(p.state, p.block, sample), static_cast<uint32_t>(quad), u[0], u[1],
                   u[2], u[3]);
  }
}

// One thread for a quad of features. Channels are whole quads, which lie at multiples of their size.
template <Noise kNoise>
__global__ void __launch_bounds__(kThreads)
    max_pool_quads_kernel(MaxPoolParams p, Layout pooled, Parts parts) {
  write_zeros(p.zeros);
  int64_t sample, first;
  parts.locate(sample, first);
  const int64_t feature = first + kQuad * threadIdx.x;
  if (feature >= p.shape.out_image()) return;
  float u[kQuad];
  make_noise<kNoise>(p.noise, sample, feature / kQuad, u);
  pool_features<kNoise>(p, pooled, sample, static_cast<int32_t>(feature), u);
}

// Any number of channels, so that a quad may lie in several pixels. A thread makes the noise of a quad,
// and pools one feature in kThreads, since neighbouring threads must read and write neighbouring
// elements.
template <Noise kNoise>
__global__ void __launch_bounds__(kThreads)
    max_pool_kernel(MaxPoolParams p, Layout pooled, Parts parts) {
  __shared__ float noise[kThreads][kQuad];
  write_zeros(p.zeros);
  int64_t sample, first;
  parts.locate(sample, first);
  const int thread = static_cast<int>(threadIdx.x);
  make_noise<kNoise>(p.noise, sample, first / kQuad + thread, noise[thread]);
  if constexpr (kNoise != Noise::none) __syncthreads();
  for (int i = thread; i < kQuad * kThreads && first + i < p.shape.out_image(); i += kThreads) {
    const float u[1] = {kNoise == Noise::none ? 0.0f : noise[i / kQuad][i % kQuad]};
    pool_features<kNoise>(p, pooled, sample, static_cast<int32_t>(first + i), u);
  }
}

// The windows along one side that hold a pixel: [first, end), possibly none.
struct WindowRange {
  int32_t first, end;
};

__device__ WindowRange windows_holding(int32_t padded_pixel, int32_t kernel, const Divisor& stride,
                                       int32_t windows) {
  const int32_t first = padded_pixel < kernel ? 0 : (padded_pixel - kernel) / stride + 1;
  const int32_t end = padded_pixel / stride + 1;
  return {first, end < windows ? end : windows};
}

// One thread for kCount neighbouring features of dx, of one pixel. It looks at each window that holds
// them, so that nothing is added by two threads and sums have one order.
template <int kCount>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(MaxPoolBackwardParams p, Layout layout, Parts parts, Divisor row_stride,
                             Divisor column_stride) {
  const PoolShape& s = p.shape;
  int64_t sample, first;
  parts.locate(sample, first);
  const int64_t feature = first + kCount * threadIdx.x;
  if (feature >= s.image()) return;
  const Position at = layout(static_cast<int32_t>(feature));
  const int32_t padded_row = at.row + s.padding[0], padded_column = at.column + s.padding[1];
  const WindowRange rows = windows_holding(padded_row, s.kernel[0], row_stride, s.out_height);
  const WindowRange columns = windows_holding(padded_column, s.kernel[1], column_stride, s.out_width);
  const int64_t pooled = sample * s.out_image() + at.channel;
  float sum[kCount] = {};
  for (int32_t i = rows.first; i < rows.end; ++i) {
    for (int32_t j = columns.first; j < columns.end; ++j) {
      const int32_t row = padded_row - i * s.stride[0], column = padded_column - j * s.stride[1];
      const int64_t from = pooled + (i * s.out_width + j) * s.channels;
      uint8_t winner[kCount];
      float delta[kCount];
      Load{}(p.winners + from, winner);
      Load{}(p.delta + from, delta);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (winner[k] == row * s.kernel[1] + column) sum[k] += delta[k];
      }
    }
  }
  store(p.dx + sample * s.image() + feature, sum);
}

// A null pointer counts as aligned: it is never followed.
template <class... T>
bool all_quads_aligned(const PoolShape& s, const T*... pointers) {
  return s.channels % kQuad == 0 &&
         ((reinterpret_cast<uintptr_t>(pointers) % (kQuad * sizeof(T)) == 0) && ...);
}

// kernel(params, arguments...) on all parts of all images.
template <class Params, class... Arguments>
cudaError_t launch_parts(void (*kernel)(Params, Layout, Parts, Arguments...), const Params& params,
                         const Layout& layout, const Parts& parts, cudaStream_t stream,
                         Arguments... arguments) {
  const int64_t blocks = parts.blocks(params.shape.samples);
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, params, layout,
                parts, arguments...);
}

}  // namespace

cudaError_t launch_max_pool(const MaxPoolParams& params, cudaStream_t stream) {
  const PoolShape& s = params.shape;
  if (s.channels == 0) return cudaSuccess;
  const bool quads = all_quads_aligned(s, params.x, params.tx, params.y, params.ty, params.winners);
  return with_noise(params.noise.kind, [&](auto noise) {
    constexpr Noise kNoise = decltype(noise)::value;
    return launch_parts(quads ? max_pool_quads_kernel<kNoise> : max_pool_kernel<kNoise>, params,
                        Layout(s.out_width, s.channels), Parts(s.out_image(), kQuad * kThreads),
                        stream);
  });
}

cudaError_t launch_max_pool_backward(const MaxPoolBackwardParams& params, cudaStream_t stream) {
  const PoolShape& s = params.shape;
  if (s.channels == 0) return cudaSuccess;
  const bool quads = all_quads_aligned(s, params.winners, params.delta, params.dx);
  return launch_parts(quads ? max_pool_backward_kernel<kQuad> : max_pool_backward_kernel<1>, params,
                      Layout(s.width, s.channels), Parts(s.image(), (quads ? kQuad : 1) * kThreads),
                      stream, Divisor(s.stride[0]), Divisor(s.stride[1]));
}

}  // namespace fdfa::cuda
