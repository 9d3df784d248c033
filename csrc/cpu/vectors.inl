// Vectors of the instruction set, and what several kernels share.

namespace fdfa::cpu::FDFA_ISA {
namespace {

constexpr int64_t kLanes = FDFA_VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(FDFA_VECTOR_BYTES)));
typedef float HalfVector __attribute__((vector_size(FDFA_VECTOR_BYTES / 2)));

inline __attribute__((always_inline)) Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

template <class T>
T* at_or_null(T* matrix, int64_t offset) {
  return matrix ? matrix + offset : nullptr;
}

// The values of each channel repeated, so that a run may start at any channel: entry i belongs to
// channel i % channels. Zero where there is no source.
template <class T>
std::vector<float> repeated(const T* source, int64_t channels, int64_t run) {
  std::vector<float> values(channels + run, 0.0f);
  if (source == nullptr) return values;
  for (int64_t i = 0; i < channels; ++i) values[i] = to_float(source[i]);
  for (size_t i = channels; i < values.size(); ++i) values[i] = values[i - channels];
  return values;
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA
