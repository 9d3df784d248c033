#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/noise.h"
#include "cuda/kernels.h"

// The pass after a block's matrix product: y = f(z + bias), ty = f'(z + bias) * tz + u. Memory bound:
// reads z and tz and writes y and ty once, 4 * samples * features elements.

namespace fdfa::cuda {
namespace {

// A thread block covers 32 quads of features in 8 samples, so that a warp touches 128 neighbouring
// features of one sample.
constexpr int kQuadsPerBlock = 32;
constexpr int kSamplesPerBlock = 8;
constexpr int64_t kMaxGridY = 65535;

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T values[4];
};

// What a thread of the kernel sees of a matrix [samples, features].
struct QuadView {
  int64_t offset;  // of the quad's first element
  int count;       // its features: 4, or fewer at the end of a row
  bool aligned;    // one vector access for all four
};

template <class T>
__device__ void load_quad(const T* matrix, QuadView view, float (&values)[4]) {
  if (view.aligned) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(matrix + view.offset);
    for (int i = 0; i < 4; ++i) values[i] = to_float(quad.values[i]);
  } else {
    for (int i = 0; i < 4; ++i) values[i] = i < view.count ? to_float(matrix[view.offset + i]) : 0.0f;
  }
}

// By one instruction, where the compiler would store a Quad<T> element by element.
template <class T>
__device__ void store_whole_quad(T* to, const float (&values)[4]) {
#if defined(FDFA_EMULATE_CUDA)
  Quad<T> quad;
  for (int i = 0; i < 4; ++i) quad.values[i] = from_float<T>(values[i]);
  *reinterpret_cast<Quad<T>*>(to) = quad;
#else
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(values[0]),
                 "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
  } else {
    const auto word = [&](int i) {
      return from_float<T>(values[i]).bits | uint32_t{from_float<T>(values[i + 1]).bits} << 16;
    };
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word(0)), "r"(word(2))
                 : "memory");
  }
#endif
}

template <class T>
__device__ void store_quad(T* matrix, QuadView view, const float (&values)[4]) {
  if (view.aligned) {
    store_whole_quad(matrix + view.offset, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < view.count) matrix[view.offset + i] = from_float<T>(values[i]);
    }
  }
}

// Every loop over a quad has four constant steps: with any other index its arrays would lie in memory
// rather than in registers.
//
// One thread per quad, the four features of a sample that share one Philox block. Inputs and outputs
// may be the same memory, so a thread loads all of its elements before it stores any. `aligned`: every
// quad of every matrix is whole and lies at a multiple of its size.
template <class T, Activation kActivation, Noise kNoise>
__global__ void __launch_bounds__(kQuadsPerBlock* kSamplesPerBlock)
    epilogue_kernel(EpilogueParams<T> p, bool aligned) {
  constexpr bool kSlopeFromPre = derivative_needs_pre_activation(kActivation);
  if (blockIdx.x + blockIdx.y + threadIdx.x + threadIdx.y == 0) {
    for (T* zero : p.zeros) {
      if (zero != nullptr) *zero = T{};
    }
  }
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kQuadsPerBlock + threadIdx.x;
  const int64_t feature = 4 * quad;
  if (feature >= p.features) return;
  const int count = static_cast<int>(p.features - feature < 4 ? p.features - feature : 4);

  float bias[4] = {}, scale[4] = {1, 1, 1, 1}, slope[4] = {}, offset[4] = {};
  int64_t channel = feature % p.channels;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) continue;
    if (p.bias != nullptr) bias[i] = to_float(p.bias[channel]);
    if (p.map.scale != nullptr) scale[i] = p.map.scale[channel];
    if (p.map.slope != nullptr) {
      slope[i] = p.map.slope[channel];
      offset[i] = p.map.offset[channel];
    }
    if (++channel == p.channels) channel = 0;
  }

  const int64_t stride = static_cast<int64_t>(gridDim.y) * kSamplesPerBlock;
  int64_t sample = static_cast<int64_t>(blockIdx.y) * kSamplesPerBlock + threadIdx.y;
  for (; sample < p.samples; sample += stride) {
    const QuadView view{sample * p.features + feature, count, aligned};
    float z[4], tangent[4] = {}, u[4];
    if (p.tz != nullptr) load_quad(p.tz, view, tangent);
    if (p.z != nullptr) {
      load_quad(p.z, view, z);
      float y[4];
      for (int i = 0; i < 4; ++i) {
        tangent[i] = scale[i] * tangent[i] + (slope[i] * z[i] + offset[i]);
        z[i] = scale[i] * z[i] + bias[i];
        y[i] = to_float(from_float<T>(activate<kActivation>(z[i])));  // as stored, and read by f' later
        tangent[i] *= derivative<kActivation>(kSlopeFromPre ? z[i] : y[i]);
      }
      store_quad(p.y, view, y);
      if (p.pre != nullptr) store_quad(p.pre, view, z);
    }
    noise4<kNoise>(noise_stream(p.noise.state, p.noise.block, sample), static_cast<uint32_t>(quad),
                   u[0], u[1], u[2], u[3]);
    for (int i = 0; i < 4; ++i) tangent[i] += u[i];
    if (p.ty != nullptr) store_quad(p.ty, view, tangent);
  }
}

// A null pointer counts as aligned: it is never followed.
template <class T>
bool all_quads_aligned(const EpilogueParams<T>& p) {
  const auto aligned = [](const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Quad<T>) == 0;
  };
  return p.features % 4 == 0 && aligned(p.z) && aligned(p.tz) && aligned(p.y) && aligned(p.ty) &&
         aligned(p.pre);
}

}  // namespace

template <class T>
cudaError_t launch_epilogue(const EpilogueParams<T>& params, cudaStream_t stream) {
  if (params.transposed) return cudaErrorInvalidValue;
  if (params.samples == 0 || params.features == 0) return cudaSuccess;
  const int64_t columns = (params.features + 4 * kQuadsPerBlock - 1) / (4 * kQuadsPerBlock);
  const int64_t rows = (params.samples + kSamplesPerBlock - 1) / kSamplesPerBlock;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(std::min(rows, kMaxGridY)));
  const dim3 block(kQuadsPerBlock, kSamplesPerBlock);
  const bool aligned = all_quads_aligned(params);
  return with_activation(params.activation, [&](auto activation) {
    return with_noise(params.noise.kind, [&](auto noise) {
      return launch(epilogue_kernel<T, decltype(activation)::value, decltype(noise)::value>, grid,
                    block, stream, params, aligned);
    });
  });
}

template cudaError_t launch_epilogue(const EpilogueParams<float>&, cudaStream_t);
template cudaError_t launch_epilogue(const EpilogueParams<bfloat16>&, cudaStream_t);
template cudaError_t launch_epilogue(const EpilogueParams<float16>&, cudaStream_t);

}  // namespace fdfa::cuda
