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

// a0 b0 a1 b1 ... of the first halves of a and b, and of the second ones.
inline __attribute__((always_inline)) void interleave(Vector a, Vector b, Vector& low, Vector& high) {
#if FDFA_VECTOR_BYTES == 64
  const __m512i firsts = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i eights = _mm512_set1_epi32(8);
  low = (Vector)_mm512_permutex2var_ps((__m512)a, firsts, (__m512)b);
  high = (Vector)_mm512_permutex2var_ps((__m512)a, firsts + eights, (__m512)b);
#elif FDFA_VECTOR_BYTES == 32
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  const __m256 odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Vector)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (Vector)_mm256_permute2f128_ps(even, odd, 0x31);
#else
  for (int64_t i = 0; i < kLanes / 2; ++i) {
    low[2 * i] = a[i];
    low[2 * i + 1] = b[i];
    high[2 * i] = a[kLanes / 2 + i];
    high[2 * i + 1] = b[kLanes / 2 + i];
  }
#endif
}

// A square of kLanes rows, by interleaving rows that lie half the square apart, log2(kLanes) times.
inline __attribute__((always_inline)) void transpose_square(const float* in, int64_t in_pitch,
                                                            float* out, int64_t out_pitch) {
  Vector rows[kLanes], next[kLanes] = {};
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) rows[i] = load(in + i * in_pitch);
#pragma GCC unroll 4
  for (int64_t bit = 1; bit < kLanes; bit *= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) store(out + i * out_pitch, rows[i]);
}

// out[j, i] ← in[i, j]; the pitch of a matrix is the distance of its rows.
template <class T>
void transpose(const T* in, int64_t in_pitch, int64_t rows, int64_t columns, T* out,
               int64_t out_pitch) {
  int64_t square_rows = 0, square_columns = 0;
  if constexpr (std::is_same_v<T, float>) {
    square_rows = rows / kLanes * kLanes;
    square_columns = columns / kLanes * kLanes;
    for (int64_t i = 0; i < square_rows; i += kLanes) {
      for (int64_t j = 0; j < square_columns; j += kLanes) {
        transpose_square(in + i * in_pitch + j, in_pitch, out + j * out_pitch + i, out_pitch);
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < square_columns ? square_rows : 0; i < rows; ++i) {
      out[j * out_pitch + i] = in[i * in_pitch + j];
    }
  }
}

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
