// Max-pooling, alone and behind an epilogue: MaxPoolParams, PooledEpilogueParams.

namespace fdfa::cpu::FDFA_ISA {
namespace {

template <class V>
struct LoadVector {
  FDFA_HD V operator()(const float* p) const {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
};

// Of all channels, at least as many as V has lanes.
template <class V>
void pool_window_channels(const PoolWindow& window, int64_t channels, const float* x, const float* tx,
                          float* y, float* ty) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t next = 0; next < channels; next += lanes) {
    // At the end once more over some channels rather than one by one; they come out the same.
    const int64_t c = std::min(next, channels - lanes);
    V greatest, tangent;
    if (tx == nullptr) {
      pool(window, LoadVector<V>{}, x + c, greatest);
    } else {
      pool(window, LoadVector<V>{}, x + c, tx + c, greatest, tangent);
      std::memcpy(ty + c, &tangent, sizeof tangent);
    }
    std::memcpy(y + c, &greatest, sizeof greatest);
  }
}

// One row of an image's windows; y and ty are those of the row. tx and ty may be null.
void pool_row(const PoolShape& s, int64_t row, const float* x, const float* tx, float* y, float* ty) {
  for (int64_t column = 0; column < s.out_width; ++column) {
    const PoolWindow window = pool_window(s, row, column);
    const float *from = x + window.first, *from_tangent = at_or_null(tx, window.first);
    float *to = y + column * s.channels, *to_tangent = at_or_null(ty, column * s.channels);
    if (s.channels >= kLanes) {
      pool_window_channels<Vector>(window, s.channels, from, from_tangent, to, to_tangent);
    } else if (s.channels >= kLanes / 2) {  // 15 channels in lanes of 8 take a tenth of one by one
      pool_window_channels<HalfVector>(window, s.channels, from, from_tangent, to, to_tangent);
    } else if (tx == nullptr) {
      for (int64_t c = 0; c < s.channels; ++c) pool(window, LoadFloat{}, from + c, to[c]);
    } else {
      for (int64_t c = 0; c < s.channels; ++c) {
        pool(window, LoadFloat{}, from + c, from_tangent + c, to[c], to_tangent[c]);
      }
    }
  }
}

// A unit is one row of windows.
void max_pool(const MaxPoolParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / s.out_height * s.height * s.width * s.channels;
    const int64_t to = unit * s.out_width * s.channels;
    pool_row(s, unit % s.out_height, p.x + image, at_or_null(p.tx, image), p.y + to,
             at_or_null(p.ty, to));
  }
}

// A unit is a sample, whose activations and tangents are still in the cache when they are pooled.
void pooled_epilogue(const PooledEpilogueParams& p, int64_t begin, int64_t end) {
  const EpilogueParams<float>& e = p.epilogue;
  const PoolShape& s = p.shape;
  const bool pools_tangent = p.pooled_tangent != nullptr;
  // Without, each run writes over that of the one before.
  std::vector<float> tangent(pools_tangent ? e.features : kEpilogueRun);
  with_epilogue_runs(e, kEpilogueRun, [&](auto& runs) {
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t first = 0; first < e.features; first += kEpilogueRun) {
        const int64_t at = sample * e.features + first;
        runs(sample, first, std::min(kEpilogueRun, e.features - first), e.z + at, at_or_null(e.tz, at),
             e.y + at, tangent.data() + (pools_tangent ? first : 0), at_or_null(e.pre, at));
      }
      for (int64_t row = 0; row < s.out_height; ++row) {
        const int64_t to = (sample * s.out_height + row) * s.out_width * s.channels;
        pool_row(s, row, e.y + sample * e.features, pools_tangent ? tangent.data() : nullptr,
                 p.pooled + to, at_or_null(p.pooled_tangent, to));
      }
    }
  });
}

template <class V>
V lane_numbers() {
  V numbers;
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) numbers[i] = static_cast<float>(i);
  return numbers;
}

// As pool_window_channels; what it adds in the channels that it meets once more is zero.
template <class V>
void pool_window_backward(const PoolWindow& window, int64_t channels, const float* x,
                          const float* delta, float* dx) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  for (int64_t next = 0; next < channels; next += lanes) {
    const int64_t c = std::min(next, channels - lanes);
    const V winner = pool_winner(window, LoadVector<V>{}, x + c, V{});
    V own;
    std::memcpy(&own, delta + c, sizeof own);
    own = lane_numbers<V>() < static_cast<float>(next - c) ? V{} : own;
    V place = {};
    for (int64_t row = 0; row < window.rows; ++row) {
      for (int64_t column = 0; column < window.columns; ++column) {
        float* to = dx + c + row * window.row_stride + column * window.column_stride;
        V sum;
        std::memcpy(&sum, to, sizeof sum);
        sum += place == winner ? own : V{};
        std::memcpy(to, &sum, sizeof sum);
        place += 1.0f;
      }
    }
  }
}

// A unit is a sample, since windows of different rows may share elements.
void max_pool_backward(const MaxPoolBackwardParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  const int64_t image = s.height * s.width * s.channels;
  std::fill(p.dx + begin * image, p.dx + end * image, 0.0f);
  for (int64_t unit = begin * s.out_height; unit < end * s.out_height; ++unit) {
    for (int64_t column = 0; column < s.out_width; ++column) {
      const PoolWindow window = pool_window(s, unit, column);
      const float *x = p.x + window.first,
                  *delta = p.delta + (unit * s.out_width + column) * s.channels;
      float* dx = p.dx + window.first;
      if (s.channels >= kLanes) {
        pool_window_backward<Vector>(window, s.channels, x, delta, dx);
      } else if (s.channels >= kLanes / 2) {
        pool_window_backward<HalfVector>(window, s.channels, x, delta, dx);
      } else {
        for (int64_t c = 0; c < s.channels; ++c) {
          const auto winner = static_cast<int64_t>(pool_winner(window, LoadFloat{}, x + c, 0.0f));
          const int64_t row = winner / window.columns, column_of = winner % window.columns;
          dx[c + row * window.row_stride + column_of * window.column_stride] += delta[c];
        }
      }
    }
  }
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA
