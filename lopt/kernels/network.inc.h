// The MLP of every parameter, and the step it makes. Part of rules.inc.h.

// The network with the normalisers folded into its first layer, padded to kHidden units.
template <int kHidden, int kColumns>
struct alignas(64) Folded {
  float full[kColumns][kHidden], row[6][kHidden], col[6][kHidden];  // row: of outer and its rsqrt, col: of inner
  float b0[kHidden], w1[kHidden][kHidden], b1[kHidden], w2[kHidden][2], b2[2];
};

template <int kHidden, bool kClip, bool kFactored>
static void fold(const Rule& rule, const Slot& s, Folded<kHidden, num_columns<kClip, kFactored>()>& net) {
  std::memset(&net, 0, sizeof net);
  const int H = rule.hidden;
  const double counts[3] = {1 / s.sums[kCount], kFactored ? 1 / s.sums[kOuterCount] : 0,
                            kFactored ? 1 / s.sums[kInnerCount] : 0};
  auto scale = [&](int sum, Sum counted) {
    return rsqrt1(static_cast<float>(s.sums[sum] * counts[counted - kCount]) + kNormalizerEps);
  };
  constexpr int full = kClip ? kFull : kBase;
  for (int f = 0; f < full; ++f) {
    const int row = kClip ? kFullColumns[f].row30 : kFullColumns[f].row28;
    const float by = scale(kFullColumns[f].sum, kCount);
    for (int h = 0; h < H; ++h) net.full[f][h] = s.w0[row * H + h] * by;
  }
  const int first = kClip ? kRow30 : kRow28;
  for (int k = 0; k < 6; ++k) {  // three decays, raw and then rsqrt: w0 has rows row, col, row_rsqrt, col_rsqrt
    const float* row = s.w0 + (first + k % 3 + k / 3 * 6) * H;
    const float* col = row + 3 * H;
    if (kFactored) {
      const float* outer = s.row_is_outer ? row : col;
      const float* inner = s.row_is_outer ? col : row;
      const float of_outer = scale(kOuter + k, kOuterCount), of_inner = scale(kInner + k, kInnerCount);
      for (int h = 0; h < H; ++h) {
        net.row[k][h] = outer[h] * of_outer;
        net.col[k][h] = inner[h] * of_inner;
      }
    } else {
      const float by = scale(kInner + k, kCount);
      for (int h = 0; h < H; ++h) net.full[full + k][h] = (row[h] + col[h]) * by;
    }
  }
  for (int h = 0; h < H; ++h) {
    net.b0[h] = s.b0[h];
    net.b1[h] = s.b1[h];
    for (int k = 0; k < H; ++k) net.w1[h][k] = s.w1[h * H + k];
    for (int o = 0; o < 2; ++o) net.w2[h][o] = s.w2[h * rule.outputs + o];
  }
  net.b2[0] = s.b2[0];
  net.b2[1] = s.b2[1];
}

// direction and magnitude from the first layer's units, kWidth vectors of elements at a time.
template <int kHidden, int kWidth, class Net>
PACELINE_INLINE static inline void upper_layers(const Net& net, const Vec (*h1)[kWidth], Vec (*out)[kWidth]) {
  constexpr int kTile = kHidden < kUnroll ? kHidden : kUnroll;
  for (int o = 0; o < 2; ++o)
    for (int q = 0; q < kWidth; ++q) out[o][q] = splat(net.b2[o]);
  for (int t = 0; t < kHidden; t += kTile) {
    Vec acc[kTile][kWidth];
    for (int h = 0; h < kTile; ++h)
      for (int q = 0; q < kWidth; ++q) acc[h][q] = splat(net.b1[t + h]);
    for (int k = 0; k < kHidden; ++k)
      for (int h = 0; h < kTile; ++h)
        for (int q = 0; q < kWidth; ++q) acc[h][q] += h1[k][q] * net.w1[k][t + h];
    for (int h = 0; h < kTile; ++h)
      for (int q = 0; q < kWidth; ++q) {
        const Vec y = relu(acc[h][q]);
        out[0][q] += y * net.w2[t + h][0];
        out[1][q] += y * net.w2[t + h][1];
      }
  }
}

// The first layer where its columns had to be kept: kTile hidden units over all columns at a time, from begin(h, half).
template <int kHidden, int kColumns, class Net, class Begin>
PACELINE_INLINE static inline void first_layer(const Net& net, const Vec (*x)[2], Begin begin, Vec (*h1)[2]) {
  constexpr int kTile = kUnroll;
  for (int t = 0; t < kHidden; t += kTile) {
    Vec acc[kTile][2];
    for (int h = 0; h < kTile; ++h)
      for (int q = 0; q < 2; ++q) acc[h][q] = begin(t + h, q);
    for (int f = 0; f < kColumns; ++f)
      for (int h = 0; h < kTile; ++h)
        for (int q = 0; q < 2; ++q) acc[h][q] += x[f][q] * net.full[f][t + h];
    for (int h = 0; h < kTile; ++h)
      for (int q = 0; q < 2; ++q) h1[t + h][q] = relu(acc[h][q]);
  }
}

// The first layer's part of `size` accumulators, (3, size) with `stride` between: of the values and of their rsqrt.
// Writes (kHidden, size), whole vectors.
template <int kHidden>
static inline void first_layer_part(const float* values, int64_t stride, int64_t size, const float (*w)[kHidden],
                                    float* out, int64_t out_stride) {
  for (int64_t q = 0; q < size; q += kLanes) {
    Vec x[6];
    for (int k = 0; k < kDecays; ++k) {
      x[k] = load_first(values + k * stride + q, size - q);
      x[k + 3] = rsqrt(x[k] + 1e-8f);
    }
    for (int h = 0; h < kHidden; ++h) {
      Vec sum = {};
      for (int k = 0; k < 6; ++k) sum += x[k] * w[k][h];
      store(out + h * out_stride + q, sum);
    }
  }
}

// The same of both arrays for every element of joined runs, (kHidden, elements) with joined_stride() between.
template <int kHidden, class Net>
static Table joined_first_layer(const Net& net, const Slot& s, const Place& at) {
  constexpr int64_t kPadded = kShort + kLanes;
  alignas(64) float outer[kHidden * kRows], inner[kHidden * kPadded];
  first_layer_part<kHidden>(s.outer_out + at.a * s.i + at.first, outer_size(s), at.last - at.first, net.row, outer,
                            kRows);
  first_layer_part<kHidden>(s.inner_out + at.a * s.j, inner_size(s), s.j, net.col, inner, kPadded);
  const int64_t stride = joined_stride(s, at);
  Table out(new float[kHidden * stride]);
  for (int h = 0; h < kHidden; ++h)
    join(s, at, outer + h * kRows, inner + h * kPadded, out.get() + h * stride, [](Vec x, Vec y) { return x + y; });
  return out;
}

template <int kHidden, bool kClip, bool kFactored>
static void item_apply(const Rule& rule, const Slot& s, const Place& at) {
  constexpr int kColumns = num_columns<kClip, kFactored>();
  Folded<kHidden, kColumns> net;  // not thread-local: finding that again would cost a call per block
  const std::vector<int32_t> index = outer_index(s, at);
  Table per_place;
  std::vector<float> per_element, part;
  fold<kHidden, kClip, kFactored>(rule, s, net);
  const Decay d = decays_of(rule, s);
  const int64_t n = s.a * s.i * run_length(s), ou = outer_size(s), in = inner_size(s), bc = s.b * s.c;
  const bool wide = kFactored && bc > 1;
  float per_run[kHidden];
  std::memcpy(per_run, net.b0, sizeof per_run);
  const bool is_joined = kFactored && joined(s);
  const int64_t place_stride = is_joined ? joined_stride(s, at) : kBlock;
  if (is_joined) {
    per_place = joined_first_layer<kHidden>(net, s, at);
  } else if (kFactored) {
    per_place.reset(new float[num_blocks(at) * kHidden * kBlock]);
    for (int64_t e = at.begin; e < at.end; e += kBlock)
      first_layer_part<kHidden>(s.inner_out + at.a * run_length(s) + e, in, std::min<int64_t>(kBlock, at.end - e),
                                net.col, per_place.get() + (e - at.begin) * kHidden, kBlock);
    if (wide) per_element.assign(num_blocks(at) * kHidden * kBlock, 0.0f);
  }
  float step = s.step;
  if (rule.parameter_scaled) step *= std::sqrt(static_cast<float>(s.sums[kP] / s.sums[kCount]) + 1e-9f);
  int64_t current = -1;
  for_each_block<kFactored>(s, at, index, [&](int64_t b, const float* const* x, const Factors& factors,
                                              int64_t position, int64_t width, int64_t run) {
    if (kFactored && run != current) {
      current = run;
      const float* values = s.outer_out + (at.a * s.i + run) * bc;
      if (wide) {
        const int64_t stride = bc + kLanes;
        part.resize(stride * kHidden);
        first_layer_part<kHidden>(values, ou, bc, net.row, part.data(), stride);
        spread(index, kHidden, part.data(), stride, per_element.data());
      } else {
        float one[kHidden * kLanes];
        first_layer_part<kHidden>(values, ou, 1, net.row, one, kLanes);
        for (int h = 0; h < kHidden; ++h) per_run[h] = one[h * kLanes] + net.b0[h];
      }
    }
    float* to[kInputs] = {s.p_out, nullptr, s.m_out, s.m_out + n, s.m_out + 2 * n, s.v_out,
                          s.inner_out, s.inner_out + n, s.inner_out + 2 * n};
    alignas(64) float cut[kInputs][kBlock];
    for (int k = 0; k < kInputs; ++k) to[k] = width == kBlock ? to[k] + position : cut[k];
    const float* place = kFactored ? per_place.get() + b * kBlock * (is_joined ? 1 : kHidden) : nullptr;
    const float* element = wide ? per_element.data() + b * kHidden * kBlock : nullptr;
    const auto begin = [&](int h, int half) PACELINE_INLINE {
      Vec y = splat(per_run[h]);
      if (kFactored) y += load(place + h * place_stride + half * kLanes);
      if (wide) y += load(element + h * kBlock + half * kLanes);
      return y;
    };
    const auto keep = [&](int half, const Vec* m, Vec v, const Vec* diag) PACELINE_INLINE {
      const int o = half * kLanes;
      for (int k = 0; k < kDecays; ++k) store(to[2 + k] + o, m[k]);
      store(to[5] + o, v);
      if (!kFactored)
        for (int k = 0; k < kDecays; ++k) store(to[6 + k] + o, diag[k]);
    };
    const auto move = [&](int half, Vec p, Vec direction, Vec magnitude) PACELINE_INLINE {
      const Vec change = direction * vexp(magnitude * 0.001f) * step;
      store(to[0] + half * kLanes, p - s.lr * (change + s.weight_decay * p));
    };
    if constexpr (kHidden <= 8) {
      for (int half = 0; half < 2 && half * kLanes < width; ++half) {
        // weights stay in memory, broadcast as they are used: whole vectors of each would be spilled and loaded
        asm volatile("" : : "r"(&net) : "memory");
        const Vec p = load(x[0] + half * kLanes);
        Vec m[3], v, diag[3], h1[kHidden][1], out[2][1];
        for (int h = 0; h < kHidden; ++h) h1[h][0] = begin(h, half);
        columns<kClip, kFactored>(rule, d, x, factors, half, m, v, diag, [&](int f, Vec y) PACELINE_INLINE {
#pragma GCC unroll 8
          for (int h = 0; h < kHidden; ++h) h1[h][0] += y * net.full[f][h];
        });
        keep(half, m, v, diag);
        for (int h = 0; h < kHidden; ++h) h1[h][0] = relu(h1[h][0]);
        upper_layers<kHidden, 1>(net, h1, out);
        move(half, p, out[0][0], out[1][0]);
      }
    } else {
      Vec column[kColumns][2], h1[kHidden][2], out[2][2], p[2];
      for (int half = 0; half < 2; ++half) {
        Vec m[3], v, diag[3];
        p[half] = load(x[0] + half * kLanes);
        columns<kClip, kFactored>(rule, d, x, factors, half, m, v, diag,
                                  [&](int f, Vec y) PACELINE_INLINE { column[f][half] = y; });
        keep(half, m, v, diag);
      }
      first_layer<kHidden, kColumns>(net, column, begin, h1);
      upper_layers<kHidden, 2>(net, h1, out);
      for (int half = 0; half < 2; ++half) move(half, p[half], out[0][half], out[1][half]);
    }
    if (width == kBlock) return;
    float* const from[kInputs] = {s.p_out, nullptr, s.m_out, s.m_out + n, s.m_out + 2 * n, s.v_out,
                                  s.inner_out, s.inner_out + n, s.inner_out + 2 * n};
    for (int k = 0; k < (kFactored ? 6 : 9); ++k)
      if (from[k]) std::memcpy(from[k] + position, cut[k], sizeof(float) * width);
  });
}

template <int kHidden>
static void item_apply(const Rule& rule, const Slot& s, const Place& at) {
  if (rule.clipped_columns) s.factored ? item_apply<kHidden, true, true>(rule, s, at)
                                       : item_apply<kHidden, true, false>(rule, s, at);
  else s.factored ? item_apply<kHidden, false, true>(rule, s, at) : item_apply<kHidden, false, false>(rule, s, at);
}

static void apply(const Rule& rule, Slot* slots, int64_t count, int32_t threads) {
  const std::vector<Place> all = places(slots, count);
  for_each(all.size(), threads, [&](int64_t k) {
    const Slot& s = slots[all[k].slot];
    if (rule.hidden <= 4) item_apply<4>(rule, s, all[k]);
    else if (rule.hidden <= 8) item_apply<8>(rule, s, all[k]);
    else item_apply<32>(rule, s, all[k]);
  });
}
