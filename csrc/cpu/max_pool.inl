// Max-pooling, alone and behind an epilogue: MaxPoolParams, PooledEpilogueParams.

namespace fdfa::cpu::FDFA_ISA {
namespace {

// V: a vector, or one float.
template <class V>
constexpr int32_t kLanesOf = sizeof(V) / sizeof(float);

template <class V>
struct LoadVector {
  FDFA_HD void operator()(const float* p, V (&v)[1]) const { std::memcpy(v, p, sizeof v); }
};

// f(a V) of the widest that the channels fill. 15 channels in lanes of 8 take a tenth of one by one.
template <class F>
void with_channel_vector(int32_t channels, const F& f) {
  if (channels >= kLanes) {
    f(Vector{});
  } else if (channels >= kLanes / 2) {
    f(HalfVector{});
  } else {
    f(float{});
  }
}

// An image, and what one row of its windows makes; tx with ty, and winners, may be null. Winners are
// whole numbers in floats here: GCC puts their way from and to bytes into vectors in long loops alone.
struct PoolRow {
  const float *x, *tx;
  float *y, *ty, *winners;
};

template <class V, bool kTangent, bool kWinners>
void pool_row_channels(const PoolShape& s, int32_t row, const PoolRow& r) {
  for (int32_t column = 0; column < s.out_width; ++column) {
    const PoolWindow window = pool_window(s, row, column);
    for (int32_t next = 0; next < s.channels; next += kLanesOf<V>) {
      // At the end once more over some channels rather than one by one; they come out the same.
      const int32_t c = std::min(next, s.channels - kLanesOf<V>);
      const int32_t from = window.first + c, to = column * s.channels + c;
      V greatest[1], tangent[1], winner[1];
      pool<kTangent>(window, LoadVector<V>{}, r.x + from, at_or_null(r.tx, from), greatest, tangent,
                     winner);
      std::memcpy(r.y + to, greatest, sizeof greatest);
      if constexpr (kTangent) std::memcpy(r.ty + to, tangent, sizeof tangent);
      if constexpr (kWinners) std::memcpy(r.winners + to, winner, sizeof winner);
    }
  }
}

void pool_row(const PoolShape& s, int32_t row, const PoolRow& r) {
  with_channel_vector(s.channels, [&](auto v) {
    using V = decltype(v);
    if (r.winners == nullptr) {
      r.tx ? pool_row_channels<V, true, false>(s, row, r)
           : pool_row_channels<V, false, false>(s, row, r);
    } else {
      r.tx ? pool_row_channels<V, true, true>(s, row, r) : pool_row_channels<V, false, true>(s, row, r);
    }
  });
}

// By way of int32_t, which has a vector instruction.
void store_bytes(int64_t count, const float* values, uint8_t* bytes) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(values[i]));
}

// Adds u to rows of ty, zero where there is no tx, while they are in the cache.
template <Noise kNoise>
class PoolNoise {
 public:
  explicit PoolNoise(const MaxPoolParams& p)
      : p_(p),
        row_size_(int64_t{p.shape.out_width} * p.shape.channels),
        keys_(p.noise),
        noise_(kNoise == Noise::none ? 0 : kQuad - 1 + row_size_ + kQuad * kQuadGroup),
        given_(p.noise.patches) {}

  void operator()(int64_t sample, int32_t row) {
    const int64_t first = row * row_size_;
    const float* u;
    if constexpr (kNoise == Noise::none) {
      u = given_(p_.noise.given + sample * p_.noise.patches.features(), row);
    } else {
      const int64_t skipped = first % kQuad, quads = (skipped + row_size_ + kQuad - 1) / kQuad;
      const NoiseStream stream = noise_stream(p_.noise.state, p_.noise.block, sample);
      fill_noise<kNoise>(keys_, stream, first / kQuad, quads, noise_.data());
      u = noise_.data() + skipped;
    }
    float* ty = p_.ty + sample * p_.shape.out_image() + first;
    for (int64_t i = 0; i < row_size_; ++i) ty[i] = (p_.tx ? ty[i] : 0.0f) + u[i];
  }

 private:
  static constexpr int64_t kQuad = 4;  // features of a Philox block, which may begin in the row before
  const MaxPoolParams& p_;
  const int64_t row_size_;
  const RoundKeys keys_;
  std::vector<float> noise_;
  PatchRows given_;
};

// A unit is one row of windows.
void max_pool(const MaxPoolParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  const int64_t row_size = int64_t{s.out_width} * s.channels;
  std::vector<float> winners(p.winners ? row_size : 0);
  with_noise(p.noise.kind, [&](auto kind) {
    PoolNoise<kind()> add_noise(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / s.out_height, from = sample * s.image(), to = unit * row_size;
      const auto row = static_cast<int32_t>(unit % s.out_height);
      pool_row(s, row,
               {p.x + from, at_or_null(p.tx, from), p.y + to, at_or_null(p.ty, to),
                p.winners ? winners.data() : nullptr});
      if (p.winners) store_bytes(row_size, winners.data(), p.winners + to);
      if (!p.noise.is_none()) add_noise(sample, row);
    }
  });
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
      for (int32_t row = 0; row < s.out_height; ++row) {
        const int64_t to = (sample * s.out_height + row) * s.out_width * s.channels;
        pool_row(s, row,
                 {e.y + sample * e.features, pools_tangent ? tangent.data() : nullptr, p.pooled + to,
                  at_or_null(p.pooled_tangent, to), nullptr});
      }
    }
  });
}

template <class V>
V lane_numbers() {
  float numbers[kLanesOf<V>];
  for (int32_t i = 0; i < kLanesOf<V>; ++i) numbers[i] = static_cast<float>(i);
  V v;
  std::memcpy(&v, numbers, sizeof v);
  return v;
}

// The pointers are those of the image, and of the row of windows.
template <class V>
void pool_row_backward(const PoolShape& s, int32_t row, const float* winners, const float* delta,
                       float* dx) {
  for (int32_t column = 0; column < s.out_width; ++column) {
    const PoolWindow window = pool_window(s, row, column);
    for (int32_t next = 0; next < s.channels; next += kLanesOf<V>) {
      // As pool_row_channels; what it adds in the channels that it meets once more is zero.
      const int32_t c = std::min(next, s.channels - kLanesOf<V>), at = column * s.channels + c;
      V winner, own;
      std::memcpy(&winner, winners + at, sizeof winner);
      std::memcpy(&own, delta + at, sizeof own);
      own = lane_numbers<V>() < static_cast<float>(next - c) ? V{} : own;
      for (int32_t i = 0; i < window.rows; ++i) {
        V place = {};
        place += static_cast<float>(window.first_place + i * window.row_places);
        float* to = dx + window.first + c + i * window.row_stride;
        for (int32_t j = 0; j < window.columns; ++j, to += window.column_stride) {
          V sum;
          std::memcpy(&sum, to, sizeof sum);
          sum += place == winner ? own : V{};
          std::memcpy(to, &sum, sizeof sum);
          place += 1.0f;
        }
      }
    }
  }
}

// A unit is a sample, since windows of different rows may share elements.
void max_pool_backward(const MaxPoolBackwardParams& p, int64_t begin, int64_t end) {
  const PoolShape& s = p.shape;
  const int64_t row_size = int64_t{s.out_width} * s.channels;
  std::vector<float> winners(row_size);
  std::fill(p.dx + begin * s.image(), p.dx + end * s.image(), 0.0f);
  with_channel_vector(s.channels, [&](auto v) {
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int32_t row = 0; row < s.out_height; ++row) {
        const int64_t from = (sample * s.out_height + row) * row_size;
        for (int64_t i = 0; i < row_size; ++i) winners[i] = static_cast<float>(p.winners[from + i]);
        pool_row_backward<decltype(v)>(s, row, winners.data(), p.delta + from,
                                       p.dx + sample * s.image());
      }
    }
  });
}

}  // namespace
}  // namespace fdfa::cpu::FDFA_ISA
