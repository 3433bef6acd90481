// The accumulators of one tensor, and the sums of squares that its columns are normalised with. Part of window.inc.h.
//
// The reference is lopt/accumulators.py and lopt/features.py. A sum of squares is taken of what it factors into: that
// of g f_k, with f_k = outer_k inner_k, as outer_k^2 times the row's sum of g^2 inner_k^2.

struct Decay {  // 1 - decay, and the bound on gradients
  float m[kDecays], v, f[kDecays], max_gradient;
};

struct Sums {  // of squares; inner is the full second moment's where nothing is factored
  float g, clipped, p, m[kDecays], v, m_rsqrt[kDecays], rsqrt, factored_g[kDecays], g_rsqrt, factored_m[kDecays];
  float outer[kDecays], outer_rsqrt[kDecays], inner[kDecays], inner_rsqrt[kDecays];
};

// What a thread keeps of the tensor at hand between the passes; each array is as long as the largest tensor's.
struct Factors {
  float *outer[kDecays], *inner[kDecays];  // Adafactor's preconditioner is outer[k][row] inner[k][col]
  float *outer_square[kDecays], *inner_square[kDecays];
  float *outer_sum, *inner_sum;  // of g^2
  int32_t* mask;  // all ones where a column is no padding
};

static inline Vec masked(Vec x, const int32_t* mask) {
  Int m;
  std::memcpy(&m, mask, sizeof m);
  return only(x, m);
}

static void set_mask(const Tensor& t, int32_t* mask) {
  for (int64_t j = 0; j < t.ld; ++j) mask[j] = j < t.cols ? -1 : 0;
}

// Gradients times tau, clipped; returns nothing else than the sums of g^2 over rows and columns of a matrix.
static void prepare_gradient(Tensor& t, float tau, float top, Factors& f) {
  const Vec low = splat(-top), high = splat(top);
  for (int64_t j = 0; j < t.ld; j += kLanes) store(f.inner_sum + j, Vec{});
  for (int64_t i = 0; i < t.rows; ++i) {
    float* g = t.g + i * t.ld;
    Vec row{};
    for (int64_t j = 0; j < t.ld; j += kLanes) {
      const Vec x = masked(vmin(vmax(load(g + j) * tau, low), high), f.mask + j);
      store(g + j, x);
      row += x * x;
      store(f.inner_sum + j, load(f.inner_sum + j) + x * x);
    }
    if (t.factored) f.outer_sum[i] = add_lanes(row);
  }
}

// One of the two factored accumulators, and its sums of squares. `extent` numbers were summed up in each of `sums`.
static void update_axis(float* accumulator, const float* sums, int64_t count, int64_t extent, float decay, bool is_row,
                        float* factor, float* square, float& sum, float& rsqrt_sum) {
  Vec mean{}, squares{}, inverses{};
  const float scale = 1.0f / extent;
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec x = lerp(load(accumulator + k), load(sums + k) * scale + 1e-30f, decay);
    store(accumulator + k, x);
    const Int mask = first_lanes(count - k);
    const Vec counted = only(x, mask);
    mean += counted;
    squares += counted * counted;
    inverses += only(1.0f / (x + 1e-8f), mask);
  }
  sum = add_lanes(squares), rsqrt_sum = add_lanes(inverses);
  const float row_mean = is_row ? add_lanes(mean) / count + 1e-9f : 1.0f;
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec y = safe_rsqrt(is_row ? load(accumulator + k) / row_mean : load(accumulator + k));
    store(factor + k, y);
    store(square + k, y * y);
  }
}

// All accumulators after this step's gradient, which `prepare_gradient` has been through.
template <bool kClip, bool kFactored>
static void accumulate(const Rule& rule, const Decay& d, Tensor& t, Factors& f, Sums& sums) {
  if (kFactored)
    for (int k = 0; k < kDecays; ++k) {
      const bool outer = t.row_is_outer;
      update_axis(t.outer[k], f.outer_sum, t.rows, t.cols, d.f[k], outer, f.outer[k], f.outer_square[k], sums.outer[k],
                  sums.outer_rsqrt[k]);
      update_axis(t.inner[k], f.inner_sum, t.cols, t.rows, d.f[k], !outer, f.inner[k], f.inner_square[k],
                  sums.inner[k], sums.inner_rsqrt[k]);
    }
  Vec sg{}, sclip{}, sp{}, sm[kDecays]{}, sv{}, smr[kDecays]{}, sr{}, sfg[kDecays]{}, sgr{}, sfm[kDecays]{};
  Vec si[kDecays]{}, sir[kDecays]{};
  const float diag_eps = static_cast<float>(rule.diag_eps), rsqrt_eps = static_cast<float>(rule.rsqrt_eps);
  for (int64_t i = 0; i < t.rows; ++i) {
    Vec row_g[kDecays]{}, row_m[kDecays]{};
    const int64_t row = i * t.ld;
    for (int64_t j = 0; j < t.ld; j += kLanes) {
      const int64_t at = row + j;
      const Vec g = load(t.g + at), p = load(t.p + at), square = g * g;
      const Vec v = lerp(load(t.v + at), square, d.v);
      store(t.v + at, v);
      const Vec inverse = 1.0f / (v + rsqrt_eps);
      sg += square, sp += p * p, sv += v * v, sr += masked(inverse, f.mask + j);
      if (kClip) {
        const Vec c = vmin(vmax(g, splat(-0.1f)), splat(0.1f));
        sclip += c * c, sgr += square * inverse;
      }
#pragma GCC unroll 3
      for (int k = 0; k < kDecays; ++k) {
        const Vec m = lerp(load(t.m[k] + at), g, d.m[k]), m2 = m * m;
        store(t.m[k] + at, m);
        sm[k] += m2, smr[k] += m2 * inverse;
        if (kFactored) {
          const Vec inner = load(f.inner_square[k] + j);
          row_g[k] += square * inner, row_m[k] += m2 * inner;
        } else {
          const Vec x = lerp(load(t.inner[k] + j), square + 1e-30f, d.f[k]);
          store(t.inner[k] + j, x);
          si[k] += masked(x * x, f.mask + j), sir[k] += masked(1.0f / (x + 1e-8f), f.mask + j);
          const Vec y = safe_rsqrt(x + 1e-9f) * g, z = rsqrt(x + diag_eps) * m;
          sfg[k] += y * y, sfm[k] += masked(z * z, f.mask + j);
        }
      }
    }
    if (kFactored)
      for (int k = 0; k < kDecays; ++k) sfg[k] += row_g[k] * f.outer_square[k][i], sfm[k] += row_m[k] * f.outer_square[k][i];
  }
  sums.g = add_lanes(sg), sums.clipped = add_lanes(sclip), sums.p = add_lanes(sp), sums.v = add_lanes(sv);
  sums.rsqrt = add_lanes(sr), sums.g_rsqrt = add_lanes(sgr);
  for (int k = 0; k < kDecays; ++k) {
    sums.m[k] = add_lanes(sm[k]), sums.m_rsqrt[k] = add_lanes(smr[k]);
    sums.factored_g[k] = add_lanes(sfg[k]), sums.factored_m[k] = add_lanes(sfm[k]);
    if (!kFactored) sums.inner[k] = add_lanes(si[k]), sums.inner_rsqrt[k] = add_lanes(sir[k]);
  }
}
