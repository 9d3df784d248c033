// What patches have in common, given to their pixels.

namespace fdfa::cpu::FDFA_ISA {
namespace {

// One row of pixels at a time, each row of patches spread once for all its rows of pixels.
class PatchRows {
 public:
  explicit PatchRows(const Patches& p) : p_(p), row_(p.size > 0 ? int64_t{p.width} * p.channels : 0) {}

  // [width, channels] of pixels in that row, from an image's [rows, columns, channels].
  const float* operator()(const float* values, int64_t pixel_row) {
    const int64_t channels = p_.channels, row = pixel_row / p_.size;
    const float* from = values + row * p_.columns() * channels;
    if (from == spread_) return row_.data();
    spread_ = from;
    float* to = row_.data();
    for (int32_t first = 0; first < p_.width; first += p_.size, from += channels) {
      const int32_t end = std::min(p_.width, first + p_.size);
      for (int32_t column = first; column < end; ++column, to += channels) {
        for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
      }
    }
    return row_.data();
  }

 private:
  const Patches p_;
  std::vector<float> row_;
  const float* spread_ = nullptr;
};

// A unit is a row of patches.
template <class T>
void spread(const SpreadParams<T>& p, int64_t begin, int64_t end) {
  const Patches& patches = p.patches;
  const int32_t rows = patches.rows();
  const int64_t row_size = int64_t{patches.width} * patches.channels;
  PatchRows spread_row(patches);
  with_activation(p.saved_activation ? p.activation : Activation::identity, [&](auto activation) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / rows;
      const auto row = static_cast<int32_t>(unit % rows);
      const int32_t last = std::min(patches.height, (row + 1) * patches.size);
      for (int32_t h = row * patches.size; h < last; ++h) {
        const float* projected = spread_row(p.projected + sample * patches.features(), h);
        const int64_t at = (sample * patches.height + h) * row_size;
        T* delta = p.delta + at;
        if constexpr (activation() == Activation::identity) {
          for (int64_t i = 0; i < row_size; ++i) delta[i] = from_float<T>(projected[i]);
        } else {
          const T* saved_activation = p.saved_activation + at;
#pragma GCC ivdep  // delta may be in its memory
          for (int64_t i = 0; i < row_size; ++i) {
            delta[i] =
                from_float<T>(projected[i] * derivative<activation()>(to_float(saved_activation[i])));
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA
