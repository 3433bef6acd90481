// The per-parameter rules: one small MLP moves every parameter. Part of window.inc.h.
//
// The reference is lopt/per_parameter.py and lopt/features.py. The normalisers are folded into the first layer; what
// of it depends on the row or the column only is computed once for each of them.

struct Network {  // one tensor's MLP, as the reference has it
  const float *w0, *b0, *w1, *b1, *w2, *b2;
  float step;  // factor of direction exp(0.001 magnitude)
};

constexpr int kUnits = 8;  // hidden units that are in registers at once

// Rows of w0: of the columns whose values differ from element to element, in this order; then of the first "row".
struct Layout {
  int columns[18], row;
};
constexpr Layout kLayout28 = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 25, 26, 27, -1, -1}, 13};
constexpr Layout kLayout30 = {{0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 27, 28, 29, 1, 14}, 15};

template <bool kClip, bool kFactored>
constexpr int num_columns() { return (kClip ? 18 : 16) + (kFactored ? 0 : 6); }

// The folded network of one tensor; units are padded to a multiple of kUnits or to 4, with zeros.
struct Folded {
  int64_t units;
  float *first;  // (columns, units)
  float *outer, *inner;  // (6, units) each: three accumulators, their three inverse roots
  float *b0, *w1, *b1, *w2, *b2;  // w1 (units, units), w2 (2, units)
  float *outer_part, *inner_part;  // (units, rows), (units, ld): the first layer's part of what is constant along rows
};

template <bool kClip, bool kFactored>
static void fold(const Rule& rule, const Network& net, const Tensor& t, const Sums& s, Folded& out) {
  const int64_t H = rule.hidden, U = out.units;
  const float n = static_cast<float>(t.rows * t.cols);
  const Layout& layout = kClip ? kLayout30 : kLayout28;
  const float eps = static_cast<float>(rule.normalizer_eps);
  const auto scale_of = [&](float sum, float count) { return rsqrt1(sum / count + eps); };
  const float scales[18] = {
      scale_of(s.g, n), scale_of(s.p, n), scale_of(s.m[0], n), scale_of(s.m[1], n), scale_of(s.m[2], n),
      scale_of(s.v, n), scale_of(s.m_rsqrt[0], n), scale_of(s.m_rsqrt[1], n), scale_of(s.m_rsqrt[2], n),
      scale_of(s.rsqrt, n), scale_of(s.factored_g[0], n), scale_of(s.factored_g[1], n), scale_of(s.factored_g[2], n),
      scale_of(s.factored_m[0], n), scale_of(s.factored_m[1], n), scale_of(s.factored_m[2], n),
      scale_of(s.clipped, n), scale_of(s.g_rsqrt, n)};
  constexpr int kOwn = kClip ? 18 : 16;
  // Celo2's network has no rows for what stands behind the 15th column of a vector
  const int rows_of_w0 = !kFactored && rule.kind == kCelo2 ? 15 : 30;
  for (int c = 0; c < kOwn; ++c)
    for (int64_t h = 0; h < H; ++h)
      out.first[c * U + h] = layout.columns[c] < rows_of_w0 ? net.w0[layout.columns[c] * H + h] * scales[c] : 0.0f;
  for (int k = 0; k < 6; ++k) {  // w0 has rows row (3), col (3), row_rsqrt (3), col_rsqrt (3)
    const float* row = net.w0 + (layout.row + k % 3 + k / 3 * 6) * H;
    const float* col = row + 3 * H;
    const float outer = kFactored ? scale_of(k < 3 ? s.outer[k] : s.outer_rsqrt[k - 3], t.rows) : 0.0f;
    const float inner = scale_of(k < 3 ? s.inner[k] : s.inner_rsqrt[k - 3], t.cols);
    for (int64_t h = 0; h < H; ++h) {
      if (kFactored) {
        out.outer[k * U + h] = (t.row_is_outer ? row : col)[h] * outer;
        out.inner[k * U + h] = (t.row_is_outer ? col : row)[h] * inner;
      } else {
        out.first[(kOwn + k) * U + h] = rows_of_w0 < 30 ? 0.0f : (row[h] + col[h]) * inner;
      }
    }
  }
  for (int64_t h = 0; h < H; ++h) {
    out.b0[h] = net.b0[h], out.b1[h] = net.b1[h];
    for (int64_t k = 0; k < H; ++k) out.w1[h * U + k] = net.w1[h * H + k];
    for (int o = 0; o < 2; ++o) out.w2[o * U + h] = net.w2[h * rule.outputs + o];
  }
  for (int o = 0; o < 2; ++o) out.b2[o] = net.b2[o];
}

// out (units, ld) = bias + the first layer's part of three accumulators (n) and their inverse roots.
static void axis_part(float* const* accumulators, const float* w, const float* bias, int64_t units, int64_t n,
                      float* out) {
  const int64_t ld = padded(n);
  for (int64_t j = 0; j < ld; j += kLanes) {
    Vec x[6];
    for (int k = 0; k < kDecays; ++k) {
      x[k] = load(accumulators[k] + j);
      x[k + 3] = rsqrt(x[k] + 1e-8f);
    }
    for (int64_t h = 0; h < units; ++h) {
      Vec y = bias ? splat(bias[h]) : Vec{};
      for (int k = 0; k < 6; ++k) y += x[k] * w[k * units + h];
      store(out + h * ld + j, y);
    }
  }
}

// Gives take(c, column) the columns of kWidth vectors of elements, in the order of Layout, and those of a vector behind.
template <int kWidth, bool kClip, bool kFactored, class Take>
PACELINE_INLINE static inline void columns(const Rule& rule, const Tensor& t, const Factors& f, int64_t i, int64_t j,
                                           Take take) {
  const int64_t at = i * t.ld + j;
  const float rsqrt_eps = static_cast<float>(rule.rsqrt_eps);
  Vec g[kWidth], r[kWidth], x[kWidth];
  const auto give = [&](int c, auto value) PACELINE_INLINE {
#pragma GCC unroll 2
    for (int q = 0; q < kWidth; ++q) x[q] = value(q);
    take(c, x);
  };
#pragma GCC unroll 2
  for (int q = 0; q < kWidth; ++q) {
    g[q] = load(t.g + at + q * kLanes);
    r[q] = rsqrt(load(t.v + at + q * kLanes) + rsqrt_eps);
  }
  take(0, g);
  give(1, [&](int q) PACELINE_INLINE { return load(t.p + at + q * kLanes); });
  give(5, [&](int q) PACELINE_INLINE { return load(t.v + at + q * kLanes); });
  if (kClip) give(16, [&](int q) PACELINE_INLINE { return vmin(vmax(g[q], splat(-0.1f)), splat(0.1f)); });
#pragma GCC unroll 3
  for (int k = 0; k < kDecays; ++k) {
    Vec m[kWidth], factor[kWidth], other[kWidth];
#pragma GCC unroll 2
    for (int q = 0; q < kWidth; ++q) {
      m[q] = load(t.m[k] + at + q * kLanes);
      if (kFactored) {
        factor[q] = other[q] = load(f.inner[k] + j + q * kLanes) * f.outer[k][i];
      } else {
        const Vec diag = load(t.inner[k] + j + q * kLanes);
        factor[q] = safe_rsqrt(diag + 1e-9f), other[q] = rsqrt(diag + static_cast<float>(rule.diag_eps));
      }
    }
    take(2 + k, m);
    give(10 + k, [&](int q) PACELINE_INLINE { return g[q] * factor[q]; });
    give(13 + k, [&](int q) PACELINE_INLINE { return m[q] * other[q]; });
    give(6 + k, [&](int q) PACELINE_INLINE { return m[q] * r[q]; });
    if (!kFactored) {
      constexpr int kOwn = kClip ? 18 : 16;
      give(kOwn + k, [&](int q) PACELINE_INLINE { return load(t.inner[k] + j + q * kLanes); });
      give(kOwn + 3 + k, [&](int q) PACELINE_INLINE { return rsqrt(load(t.inner[k] + j + q * kLanes) + 1e-8f); });
    }
  }
  take(9, r);
  if (kClip) give(17, [&](int q) PACELINE_INLINE { return g[q] * r[q]; });
}

// What the network's outputs do: move the parameters, or, of Celo2, stay in the place of the gradient.
PACELINE_INLINE static inline void move(const Rule& rule, const Tensor& t, const Factors& f, int64_t i, int64_t j,
                                        Vec direction, Vec magnitude, float step) {
  const int64_t at = i * t.ld + j;
  if (rule.kind == kCelo2) return store(t.g + at, direction);
  const Vec moved = load(t.p + at) - direction * vexp(magnitude * 0.001f) * step;
  store(t.p + at, masked(moved, f.mask + j));
}

// Up to 8 units: the columns are used as they come, all units at once.
template <int kHidden, int kWidth, bool kClip, bool kFactored>
PACELINE_INLINE static inline void apply_block(const Rule& rule, Tensor& t, const Factors& f, const Folded& net,
                                               int64_t i, int64_t j, int64_t outer_ld, float step) {
  asm volatile("" : : "r"(net.first) : "memory");  // weights are broadcast from memory as they are used, not kept
  Vec h1[kHidden][kWidth], y[kHidden][kWidth], out[2][kWidth];
#pragma GCC unroll 8
  for (int h = 0; h < kHidden; ++h)
    for (int q = 0; q < kWidth; ++q)
      h1[h][q] = kFactored ? load(net.inner_part + h * t.ld + j + q * kLanes) + net.outer_part[h * outer_ld + i]
                           : splat(net.b0[h]);
  columns<kWidth, kClip, kFactored>(rule, t, f, i, j, [&](int c, const Vec* x) PACELINE_INLINE {
#pragma GCC unroll 8
    for (int h = 0; h < kHidden; ++h)
#pragma GCC unroll 2
      for (int q = 0; q < kWidth; ++q) h1[h][q] += x[q] * net.first[c * kHidden + h];
    asm volatile("" : : : "memory");
  });
#pragma GCC unroll 8
  for (int h = 0; h < kHidden; ++h)
    for (int q = 0; q < kWidth; ++q) h1[h][q] = relu(h1[h][q]), y[h][q] = splat(net.b1[h]);
#pragma GCC unroll 8
  for (int k = 0; k < kHidden; ++k) {
#pragma GCC unroll 8
    for (int h = 0; h < kHidden; ++h)
      for (int q = 0; q < kWidth; ++q) y[h][q] += h1[k][q] * net.w1[k * kHidden + h];
    asm volatile("" : : : "memory");
  }
  for (int o = 0; o < 2; ++o)
    for (int q = 0; q < kWidth; ++q) out[o][q] = splat(net.b2[o]);
#pragma GCC unroll 8
  for (int h = 0; h < kHidden; ++h)
    for (int q = 0; q < kWidth; ++q) {
      const Vec hidden = relu(y[h][q]);
      for (int o = 0; o < 2; ++o) out[o][q] += hidden * net.w2[o * kHidden + h];
    }
  for (int q = 0; q < kWidth; ++q) move(rule, t, f, i, j + q * kLanes, out[0][q], out[1][q], step);
}

// More units: the columns of two vectors are kept, and kUnits units computed from all of them at a time.
template <int kWidth, bool kClip, bool kFactored>
static void apply_wide_block(const Rule& rule, Tensor& t, const Factors& f, const Folded& net, int64_t i, int64_t j,
                             int64_t outer_ld, float step, float* hidden) {
  constexpr int kColumns = num_columns<kClip, kFactored>();
  const int64_t U = net.units;
  Vec x[kColumns][kWidth], out[2][kWidth];
  columns<kWidth, kClip, kFactored>(rule, t, f, i, j, [&](int c, const Vec* y) PACELINE_INLINE {
    for (int q = 0; q < kWidth; ++q) x[c][q] = y[q];
  });
  for (int64_t u = 0; u < U; u += kUnits) {
    Vec acc[kUnits][kWidth];
    for (int h = 0; h < kUnits; ++h)
      for (int q = 0; q < kWidth; ++q)
        acc[h][q] = kFactored ? load(net.inner_part + (u + h) * t.ld + j + q * kLanes) + net.outer_part[(u + h) * outer_ld + i]
                              : splat(net.b0[u + h]);
    for (int c = 0; c < kColumns; ++c)
      for (int h = 0; h < kUnits; ++h)
        for (int q = 0; q < kWidth; ++q) acc[h][q] += x[c][q] * net.first[c * U + u + h];
    for (int h = 0; h < kUnits; ++h)
      for (int q = 0; q < kWidth; ++q) store(hidden + ((u + h) * kWidth + q) * kLanes, relu(acc[h][q]));
  }
  for (int o = 0; o < 2; ++o)
    for (int q = 0; q < kWidth; ++q) out[o][q] = splat(net.b2[o]);
  for (int64_t u = 0; u < U; u += kUnits) {
    Vec acc[kUnits][kWidth];
    for (int h = 0; h < kUnits; ++h)
      for (int q = 0; q < kWidth; ++q) acc[h][q] = splat(net.b1[u + h]);
    for (int64_t k = 0; k < U; ++k) {
      Vec y[kWidth];
      for (int q = 0; q < kWidth; ++q) y[q] = load(hidden + (k * kWidth + q) * kLanes);
      for (int h = 0; h < kUnits; ++h)
        for (int q = 0; q < kWidth; ++q) acc[h][q] += y[q] * net.w1[k * U + u + h];
    }
    for (int h = 0; h < kUnits; ++h)
      for (int q = 0; q < kWidth; ++q) {
        const Vec y = relu(acc[h][q]);
        for (int o = 0; o < 2; ++o) out[o][q] += y * net.w2[o * U + u + h];
      }
  }
  for (int q = 0; q < kWidth; ++q) move(rule, t, f, i, j + q * kLanes, out[0][q], out[1][q], step);
}

// All elements of a tensor, kWide vectors at a time where a row has them; kHidden is 0 for more than 8 units.
template <int kHidden, int kWide, bool kClip, bool kFactored>
static void apply(const Rule& rule, Tensor& t, const Factors& f, const Folded& net, float step, float* hidden) {
  const int64_t outer_ld = padded(t.rows);
  for (int64_t i = 0; i < t.rows; ++i) {
    int64_t j = 0;
    for (; j + kWide * kLanes <= t.ld; j += kWide * kLanes)
      if constexpr (kHidden > 0) apply_block<kHidden, kWide, kClip, kFactored>(rule, t, f, net, i, j, outer_ld, step);
      else apply_wide_block<kWide, kClip, kFactored>(rule, t, f, net, i, j, outer_ld, step, hidden);
    for (; j < t.ld; j += kLanes)
      if constexpr (kHidden > 0) apply_block<kHidden, 1, kClip, kFactored>(rule, t, f, net, i, j, outer_ld, step);
      else apply_wide_block<1, kClip, kFactored>(rule, t, f, net, i, j, outer_ld, step, hidden);
  }
}

template <bool kClip, bool kFactored>
static void update_tensor(const Rule& rule, const Decay& d, const Network& net, Tensor& t, float tau, Factors& f,
                          Folded& folded, float* hidden) {
  Sums sums{};
  set_mask(t, f.mask);
  prepare_gradient(t, tau, d.max_gradient, f);
  accumulate<kClip, kFactored>(rule, d, t, f, sums);
  fold<kClip, kFactored>(rule, net, t, sums, folded);
  if (kFactored) {
    axis_part(t.outer, folded.outer, folded.b0, folded.units, t.rows, folded.outer_part);
    axis_part(t.inner, folded.inner, nullptr, folded.units, t.cols, folded.inner_part);
  }
  float step = net.step;
  if (rule.parameter_scaled) step *= std::sqrt(sums.p / (t.rows * t.cols) + 1e-9f);
  if (folded.units == 4) apply<4, 2, kClip, kFactored>(rule, t, f, folded, step, hidden);
  else if (folded.units == 8) apply<8, 1, kClip, kFactored>(rule, t, f, folded, step, hidden);
  else apply<0, 2, kClip, kFactored>(rule, t, f, folded, step, hidden);
}
