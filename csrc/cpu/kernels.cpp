#include "cpu/kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "common/batch_norm.h"
#include "cpu/kernel_table.h"

namespace fdfa::cpu {
namespace {

struct Isa {
  const char* name;
  const IsaKernels* kernels;
  bool supported;
};

// Best first.
const Isa* all_isas(int64_t& count) {
  static const Isa isas[] = {
#if defined(__x86_64__)
      {"avx512", &avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx2", &avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
      {"baseline", &baseline::kernels, true},
  };
  count = sizeof isas / sizeof isas[0];
  return isas;
}

// At most the one that torch's variable allows its own kernels.
const Isa* best_isa() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = variable == nullptr ? "" : variable;
  bool is_allowed = most != "avx2" && most != "default";
  int64_t count;
  const Isa* isa = all_isas(count);
  const Isa* last = isa + count - 1;
  for (; isa < last; ++isa) {
    is_allowed = is_allowed || most == isa->name;
    if (is_allowed && isa->supported) break;
  }
  return isa;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{best_isa()};
  return isa;
}

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// f(channel, its sums over all parts)
template <class Params, class F>
void for_each_channel(const Params& p, const F& f) {
  for (int64_t c = 0; c < p.channels; ++c) {
    double total[4] = {};
    for (int64_t i = 0; p.sums != nullptr && i < 4 * p.parts; ++i) {
      total[i % 4] += p.sums[i * p.channels + c];
    }
    f(c, total);
  }
}

// By whoever has the first unit.
template <class T>
void write_zeros(T* const (&zeros)[2], int64_t begin, int64_t end) {
  if (begin > 0 || end == 0) return;
  for (T* zero : zeros) {
    if (zero != nullptr) *zero = T{};
  }
}

const KernelTable<float>& table(float) { return current().load()->kernels->f32; }
const KernelTable<bfloat16>& table(bfloat16) { return current().load()->kernels->bf16; }
const KernelTable<float16>& table(float16) { return current().load()->kernels->f16; }

}  // namespace

const char* isa() { return current().load()->name; }

bool select_isa(const char* name) {
  int64_t count;
  const Isa* isas = all_isas(count);
  for (int64_t i = 0; i < count; ++i) {
    if (std::strcmp(isas[i].name, name) == 0 && isas[i].supported) {
      current().store(&isas[i]);
      return true;
    }
  }
  return false;
}

template <class T>
int64_t epilogue_units(const EpilogueParams<T>& p) {
  return p.transposed_pitch ? parts(p.samples, kTransposedSamples) * parts(p.features, kTransposedRun)
                            : p.samples * parts(p.features, kEpilogueRun);
}

template <class T>
void epilogue(const EpilogueParams<T>& p, int64_t begin, int64_t end) {
  write_zeros(p.zeros, begin, end);
  table(T{}).epilogue(p, begin, end);
}

template <class T>
int64_t feedback_units(const FeedbackParams<T>& p) {
  return parts(p.features, kTileColumns);
}

template <class T>
void feedback_step(const FeedbackParams<T>& p, int64_t begin, int64_t end) {
  table(T{}).feedback_step(p, begin, end);
}

template <class T>
int64_t spread_units(const SpreadParams<T>& p) {
  return p.samples * p.patches.rows();
}

template <class T>
void spread(const SpreadParams<T>& p, int64_t begin, int64_t end) {
  table(T{}).spread(p, begin, end);
}

int64_t max_pool_units(const MaxPoolParams& p) { return p.shape.samples * p.shape.out_height; }
void max_pool(const MaxPoolParams& p, int64_t begin, int64_t end) {
  write_zeros(p.zeros, begin, end);
  current().load()->kernels->max_pool(p, begin, end);
}

int64_t max_pool_backward_units(const MaxPoolBackwardParams& p) { return p.shape.samples; }
void max_pool_backward(const MaxPoolBackwardParams& p, int64_t begin, int64_t end) {
  current().load()->kernels->max_pool_backward(p, begin, end);
}

int64_t pooled_epilogue_units(const PooledEpilogueParams& p) { return p.epilogue.samples; }
void pooled_epilogue(const PooledEpilogueParams& p, int64_t begin, int64_t end) {
  write_zeros(p.epilogue.zeros, begin, end);
  current().load()->kernels->pooled_epilogue(p, begin, end);
}

int64_t moment_part_rows(int64_t channels) { return std::max<int64_t>(64, 16384 / channels); }
int64_t moment_units(const MomentParams& p) { return parts(p.rows, moment_part_rows(p.channels)); }
void moments(const MomentParams& p, int64_t begin, int64_t end) {
  current().load()->kernels->moments(p, begin, end);
}

void norm(const NormForwardParams& p) {
  for_each_channel(p, [&](int64_t c, const double (&total)[4]) { normalize_channel(p, c, total); });
}
void norm_backward(const NormBackwardParams& p) {
  for_each_channel(
      p, [&](int64_t c, const double (&total)[4]) { normalize_channel_backward(p, c, total); });
}

int64_t combine_units(const CombineParams& p) { return parts(p.rows * p.channels, kEpilogueRun); }
void combine(const CombineParams& p, int64_t begin, int64_t end) {
  current().load()->kernels->combine(p, begin, end);
}

#define FDFA_INSTANTIATE(T)                                                   \
  template int64_t epilogue_units<T>(const EpilogueParams<T>&);               \
  template void epilogue<T>(const EpilogueParams<T>&, int64_t, int64_t);      \
  template int64_t feedback_units<T>(const FeedbackParams<T>&);               \
  template void feedback_step<T>(const FeedbackParams<T>&, int64_t, int64_t); \
  template int64_t spread_units<T>(const SpreadParams<T>&);                   \
  template void spread<T>(const SpreadParams<T>&, int64_t, int64_t);
FDFA_INSTANTIATE(float)
FDFA_INSTANTIATE(bfloat16)
FDFA_INSTANTIATE(float16)
#undef FDFA_INSTANTIATE

}  // namespace fdfa::cpu
