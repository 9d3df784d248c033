// The sums of a batch normalisation and its map: MomentParams, CombineParams.

namespace fdfa::cpu::FDFA_ISA {
namespace {

// The rows of several parts. Sums are kept for a period of whole rows, so that the loop over it is long
// enough for vectors whatever the number of channels.
void moments(const MomentParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kPeriod = 256;
  const int64_t c = p.channels, period_rows = (kPeriod + c - 1) / c, period = period_rows * c;
  const int64_t part_rows = moment_part_rows(c);
  const auto pivots = repeated(p.pivot, c, period);
  std::vector<float> storage(4 * period);
  float *d_sum = storage.data(), *d_square = d_sum + period, *t_sum = d_square + period,
        *product = t_sum + period;
  const float* pivot = pivots.data();
  for (int64_t part = begin; part < end; ++part) {
    std::fill(storage.begin(), storage.end(), 0.0f);
    const int64_t last = std::min((part + 1) * part_rows, p.rows);
    for (int64_t row = part * part_rows; row < last; row += period_rows) {
      const int64_t count = std::min(period_rows, last - row) * c;
      const float* x = p.x + row * c;
      if (p.t == nullptr) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) {
          const float d = x[i] - pivot[i];
          d_sum[i] += d;
          d_square[i] += d * d;
        }
        continue;
      }
      const float* t = p.t + row * c;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const float d = x[i] - pivot[i];
        d_sum[i] += d;
        d_square[i] += d * d;
        t_sum[i] += t[i];
        product[i] += d * t[i];
      }
    }
    double* sums = p.sums + part * 4 * c;
    std::fill(sums, sums + 4 * c, 0.0);
    for (int64_t kind = 0; kind < 4; ++kind) {
      for (int64_t i = 0; i < period; ++i) sums[kind * c + i % c] += storage[kind * period + i];
    }
  }
}

void combine(const CombineParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  const auto scale = repeated(p.map.scale, p.channels, kEpilogueRun);
  const auto slope = repeated(p.map.slope, p.channels, kEpilogueRun);
  const auto offset = repeated(p.map.offset, p.channels, kEpilogueRun);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kEpilogueRun, c = first % p.channels;
    const int64_t count = std::min(kEpilogueRun, p.rows * p.channels - first);
    const float *x = p.x + first, *t = p.t + first;
    const float *a = scale.data() + c, *b = slope.data() + c, *d = offset.data() + c;
    float* out = p.out + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] * t[i] + (b[i] * x[i] + d[i]);
  }
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA
