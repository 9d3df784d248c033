#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/params.h"

namespace fdfa {

// The part of a window that lies within the image, in floats of x.
struct PoolWindow {
  int64_t first;  // channel 0 of its first pixel
  int64_t rows, columns, row_stride, column_stride;
};

// unit: a row of windows, sample * out_height + its row.
FDFA_HD PoolWindow pool_window(const PoolShape& p, int64_t unit, int64_t column) {
  const int64_t sample = unit / p.out_height, top = unit % p.out_height * p.stride[0] - p.padding[0];
  const int64_t left = column * p.stride[1] - p.padding[1];
  const int64_t first_row = top > 0 ? top : 0, first_column = left > 0 ? left : 0;
  const int64_t bottom = top + p.kernel[0], right = left + p.kernel[1];
  return {((sample * p.height + first_row) * p.width + first_column) * p.channels,
          (bottom < p.height ? bottom : p.height) - first_row,
          (right < p.width ? right : p.width) - first_column, p.width * p.channels, p.channels};
}

// The windows along one side that hold a pixel: [first, end), possibly none.
struct WindowRange {
  int64_t first, end;
};

FDFA_HD WindowRange windows_holding(int64_t pixel, int64_t kernel, int64_t stride, int64_t padding,
                                    int64_t windows) {
  const int64_t padded = pixel + padding;
  const int64_t first = padded < kernel ? 0 : (padded - kernel) / stride + 1;
  const int64_t end = padded / stride + 1;
  return {first, end < windows ? end : windows};
}

struct LoadFloat {
  FDFA_HD float operator()(const float* p) const { return *p; }
};

// y: the greatest x of a window, ty: the tx beside it, for the one channel or the several that
// `load` takes at once. The first of equals wins; a NaN is taken, and stays.
template <class Load, class V>
FDFA_HD void pool(const PoolWindow& window, Load load, const float* x, const float* tx, V& y, V& ty) {
  y = load(x);
  ty = load(tx);
  for (int64_t row = 0; row < window.rows; ++row) {
    for (int64_t column = 0; column < window.columns; ++column) {
      const int64_t at = row * window.row_stride + column * window.column_stride;
      const V candidate = load(x + at), tangent = load(tx + at);
      const auto stays = (candidate <= y) | (y != y);
      y = stays ? y : candidate;
      ty = stays ? ty : tangent;
    }
  }
}

// The same without a tangent.
template <class Load, class V>
FDFA_HD void pool(const PoolWindow& window, Load load, const float* x, V& y) {
  y = load(x);
  for (int64_t row = 0; row < window.rows; ++row) {
    for (int64_t column = 0; column < window.columns; ++column) {
      const V candidate = load(x + row * window.row_stride + column * window.column_stride);
      y = (candidate <= y) | (y != y) ? y : candidate;
    }
  }
}

// The winner's place in a window, counted row by row, for one channel or several: a whole number.
template <class Load, class V>
FDFA_HD V pool_winner(const PoolWindow& window, Load load, const float* x, V first) {
  V greatest = load(x), winner = first, place = first;
  for (int64_t row = 0; row < window.rows; ++row) {
    for (int64_t column = 0; column < window.columns; ++column) {
      const V candidate = load(x + row * window.row_stride + column * window.column_stride);
      const auto stays = (candidate <= greatest) | (greatest != greatest);
      greatest = stays ? greatest : candidate;
      winner = stays ? winner : place;
      place += 1.0f;
    }
  }
  return winner;
}

}  // namespace fdfa
