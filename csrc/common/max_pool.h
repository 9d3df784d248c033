#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/params.h"

namespace fdfa {

// The part of a window that lies within its image.
struct PoolWindow {
  int32_t first;        // its first pixel: where channel 0 lies in the image
  int32_t first_place;  // and its place in the whole window, row by row
  int32_t rows, columns, row_stride, column_stride, row_places;
};

FDFA_HD PoolWindow pool_window(const PoolShape& p, int32_t row, int32_t column) {
  const int32_t top = row * p.stride[0] - p.padding[0], left = column * p.stride[1] - p.padding[1];
  const int32_t first_row = top > 0 ? top : 0, first_column = left > 0 ? left : 0;
  const int32_t bottom = top + p.kernel[0], right = left + p.kernel[1];
  return {(first_row * p.width + first_column) * p.channels,
          (first_row - top) * p.kernel[1] + (first_column - left),
          (bottom < p.height ? bottom : p.height) - first_row,
          (right < p.width ? right : p.width) - first_column,
          p.width * p.channels,
          p.channels,
          p.kernel[1]};
}

// y: the greatest x of a window, ty: the tx beside it, and the winner, as a whole number. The first of
// equals wins; a NaN is taken, and stays. For kCount neighbouring V, each of one channel or several,
// which load(pointer, values) takes. Without kTangent tx is not read and ty not set.
template <bool kTangent, class Load, class V, int kCount>
FDFA_HD void pool(const PoolWindow& window, Load load, const float* x, const float* tx, V (&y)[kCount],
                  V (&ty)[kCount], V (&winner)[kCount]) {
  load(x, y);
  if constexpr (kTangent) load(tx, ty);
  V first = {};
  first += static_cast<float>(window.first_place);
  for (int i = 0; i < kCount; ++i) winner[i] = first;
  for (int32_t row = 0; row < window.rows; ++row) {
    V place = first;
    first += static_cast<float>(window.row_places);
    for (int32_t column = 0; column < window.columns; ++column) {
      const int32_t at = row * window.row_stride + column * window.column_stride;
      V candidate[kCount], tangent[kCount];
      load(x + at, candidate);
      if constexpr (kTangent) load(tx + at, tangent);
      for (int i = 0; i < kCount; ++i) {
        const auto stays = (candidate[i] <= y[i]) | (y[i] != y[i]);
        y[i] = stays ? y[i] : candidate[i];
        if constexpr (kTangent) ty[i] = stays ? ty[i] : tangent[i];
        winner[i] = stays ? winner[i] : place;
      }
      place += 1.0f;
    }
  }
}

}  // namespace fdfa
