// The update rule's kernels, written once in vectors of kLanes floats and compiled per instruction set.
//
// Included by rules_portable.cpp, rules_avx2.cpp and rules_avx512.cpp inside their namespace, after kLanes and Vec are
// set. The reference is lopt/per_parameter.py; formulas are explained there and in accumulators.py and features.py.
//
// Work is cut into items: up to kRows runs of one slot, kSegment elements each. What depends on the run only (outer) or
// on the place in the run only (inner) is multiplied with the first layer once per item, not once per element.

#define PACELINE_INLINE __attribute__((always_inline))

constexpr int kBlock = 2 * kLanes;      // elements per inner loop: two vectors share every broadcast weight
constexpr int64_t kSegment = 1024;      // elements of a run per item; hidden x kSegment floats stay in the L2 cache
constexpr int64_t kRows = 64;           // runs per item
constexpr int64_t kGroup = 1 << 19;     // elements of a group of slots: 12 MB, to stay in the last cache
constexpr float kNormalizerEps = 1e-5f;

static inline float rsqrt1(float x) { return 1.0f / std::sqrt(x); }
static inline float safe_rsqrt1(float x) { return rsqrt1(x < 1e-9f ? 1e-9f : x); }
static inline float lerp1(float old, float now, float w) { return old + w * (now - old); }

static inline Vec splat(float x) { return Vec{} + x; }
static inline Vec load(const float* x) { Vec r; std::memcpy(&r, x, sizeof r); return r; }
static inline void store(float* x, Vec v) { std::memcpy(x, &v, sizeof v); }
static inline Vec vmax(Vec a, Vec b) { return a < b ? b : a; }   // keeps a NaN in a
static inline Vec vmin(Vec a, Vec b) { return a > b ? b : a; }
static inline Vec relu(Vec x) { return x < 0.0f ? Vec{} : x; }
static inline Vec rsqrt(Vec x) { return 1.0f / vsqrt(x); }
static inline Vec safe_rsqrt(Vec x) { return rsqrt(vmax(x, splat(1e-9f))); }
static inline Vec lerp(Vec old, Vec now, float w) { return old + w * (now - old); }
static inline float total(Vec v) {
  float s = 0;
  for (int l = 0; l < kLanes; ++l) s += v[l];
  return s;
}

// e^x to about one unit in the last place; infinite and zero where it over- and underflows.
static inline Vec vexp(Vec x) {
  const Vec clamped = vmin(vmax(x, splat(-87.0f)), splat(88.5f));
  const Int n = __builtin_convertvector(clamped * 1.44269504f + (clamped < 0.0f ? splat(-0.5f) : splat(0.5f)), Int);
  const Vec k = __builtin_convertvector(n, Vec);
  const Vec r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Int bits = (n + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  y = y * scale;
  y = x > 88.5f ? splat(INFINITY) : y;
  y = x < -87.0f ? Vec{} : y;
  return x != x ? x : y;
}

// ---- the columns ----------------------------------------------------------------------------------------------------

// Where a column's sum of squares is kept in Slot::sums; three in a row for every decay.
enum Sum { kG, kClipped, kP, kM, kV = 6, kMRsqrt, kRsqrt = 10, kFactoredG, kGRsqrt = 14, kFactoredM,
           kOuter = 18, kOuterRsqrt = 21, kInner = 24, kInnerRsqrt = 27, kCount = 30, kOuterCount, kInnerCount };

// One column of the first layer: its sum, and its row of w0 with 28 columns and with 30 (-1: it has none).
struct Column { int sum, row28, row30; };
constexpr int kBase = 16, kFull = 18;
constexpr Column kFullColumns[kFull] = {
    {kG, 0, 0}, {kP, 1, 2}, {kM, 2, 3}, {kM + 1, 3, 4}, {kM + 2, 4, 5}, {kV, 5, 6},
    {kMRsqrt, 6, 7}, {kMRsqrt + 1, 7, 8}, {kMRsqrt + 2, 8, 9}, {kRsqrt, 9, 10},
    {kFactoredG, 10, 11}, {kFactoredG + 1, 11, 12}, {kFactoredG + 2, 12, 13},
    {kFactoredM, 25, 27}, {kFactoredM + 1, 26, 28}, {kFactoredM + 2, 27, 29},
    {kClipped, -1, 1}, {kGRsqrt, -1, 14}};
constexpr int kRow28 = 13, kRow30 = 15;  // first of the rows "row", then "col", "row_rsqrt", "col_rsqrt", 3 each

struct Place {  // one item
  int64_t slot, a, first, last, begin, end;  // runs first..last of slice a, elements begin..end of each
};

template <bool kClip, bool kFactored>
constexpr int num_columns() { return (kClip ? kFull : kBase) + (kFactored ? 0 : 6); }

struct Decay { float m[3], v, f[3]; };  // 1 - decay
static inline float unit(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
static Decay decays_of(const Slot& s) {
  Decay d;
  for (int k = 0; k < kDecays; ++k) {
    d.m[k] = 1.0f - s.m_decay[k];
    d.f[k] = 1.0f - unit(s.factored_decay[k]);
  }
  d.v = 1.0f - unit(s.v_decay[0]);
  return d;
}

// All columns of half a block, given to column(index, values), and its new accumulators. `outer` and `inner` are
// Adafactor's factors, (3, kBlock) each. Inlined, so that what is done with a column happens in registers.
template <bool kClip, bool kFactored, class Take>
PACELINE_INLINE static inline void columns(const Rule& rule, const Decay& d, const float* const* x, const float* outer,
                                    const float* inner, int half, Vec* m_new, Vec& v_new, Vec* diag_new, Take column) {
  const int o = half * kLanes;
  Vec g = load(x[1] + o);
  if (rule.max_gradient > 0) g = vmin(vmax(g, splat(-rule.max_gradient)), splat(rule.max_gradient));
  const Vec square = g * g;
  v_new = lerp(load(x[5] + o), square, d.v);
  const Vec r = rsqrt(v_new + 1e-6f);
  column(0, g);
  column(1, load(x[0] + o));
  column(5, v_new);
  column(9, r);
#pragma GCC unroll 3
  for (int k = 0; k < kDecays; ++k) {
    const Vec m = m_new[k] = lerp(load(x[2 + k] + o), g, d.m[k]);
    column(2 + k, m);
    column(6 + k, m * r);
    if (kFactored) {
      const Vec f = load(outer + k * kBlock + o) * load(inner + k * kBlock + o);
      column(10 + k, g * f);
      column(13 + k, m * f);
    } else {
      const Vec diag = diag_new[k] = lerp(load(x[6 + k] + o), square + 1e-30f, d.f[k]);
      column(10 + k, g * safe_rsqrt(diag + 1e-9f));
      column(13 + k, m * rsqrt(diag + rule.diag_eps));
      column((kClip ? kFull : kBase) + k, diag);
      column((kClip ? kFull : kBase) + 3 + k, rsqrt(diag + 1e-8f));
    }
  }
  if (kClip) {
    column(16, vmin(vmax(g, splat(-0.1f)), splat(0.1f)));
    column(17, g * r);
  }
}

constexpr int kInputs = 9;  // p, g, m (3), v, diag (3)

// The inputs of the block at `at`: where they lie, or a copy filled up with zeros where the block is cut short.
template <bool kFactored>
static inline void gather(const Slot& s, int64_t n, int64_t at, int64_t width, float (*copy)[kBlock],
                          const float** x) {
  const float* from[kInputs] = {s.p, s.g, s.m, s.m + n, s.m + 2 * n, s.v, s.inner, s.inner + n, s.inner + 2 * n};
  constexpr int count = kFactored ? 6 : 9;
  for (int k = 0; k < count; ++k) x[k] = from[k] + at;
  if (width == kBlock) return;
  std::memset(copy, 0, sizeof(float) * kBlock * count);
  for (int k = 0; k < count; ++k) {
    std::memcpy(copy[k], x[k], sizeof(float) * width);
    x[k] = copy[k];
  }
}

static inline int64_t inner_size(const Slot& s) { return s.factored ? s.a * s.b * s.j * s.c : s.j; }
static inline int64_t outer_size(const Slot& s) { return s.factored ? s.a * s.i * s.b * s.c : 0; }
static inline int64_t run_length(const Slot& s) { return s.b * s.j * s.c; }
static inline int64_t num_blocks(const Place& at) { return (at.end - at.begin + kBlock - 1) / kBlock; }

// Values of an outer array (one per b and c of this run) for every element of the segment.
template <class Write>
static inline void spread_outer(const Slot& s, const Place& at, Write write) {
  const int64_t jc = s.j * s.c;
  for (int64_t e = at.begin; e < at.end; ++e) write(e - at.begin, (e / jc) * s.c + e % s.c);
}

static void inner_factors(const Slot& s, const Place& at, std::vector<float>& out) {
  const int64_t size = inner_size(s), blocks = num_blocks(at);
  out.assign(blocks * kDecays * kBlock, 0.0f);
  const float* from = s.factors + kDecays * outer_size(s) + at.a * run_length(s);
  for (int k = 0; k < kDecays; ++k)
    for (int64_t e = at.begin; e < at.end; ++e) {
      const int64_t q = e - at.begin;
      out[(q / kBlock * kDecays + k) * kBlock + q % kBlock] = from[k * size + e];
    }
}

static void outer_factors(const Slot& s, const Place& at, int64_t run, std::vector<float>& out) {
  const int64_t size = outer_size(s), bc = s.b * s.c;
  const float* from = s.factors + (at.a * s.i + run) * bc;
  if (bc == 1) {  // one number for the whole run: a single block serves all
    for (int k = 0; k < kDecays; ++k)
      for (int q = 0; q < kBlock; ++q) out[k * kBlock + q] = from[k * size];
    return;
  }
  for (int k = 0; k < kDecays; ++k)
    spread_outer(s, at, [&](int64_t q, int64_t index) {
      out[(q / kBlock * kDecays + k) * kBlock + q % kBlock] = from[k * size + index];
    });
}

// ---- phases ---------------------------------------------------------------------------------------------------------

static std::vector<Place> places(const Slot* slots, int64_t count) {
  std::vector<Place> out;
  for (int64_t t = 0; t < count; ++t) {
    const Slot& s = slots[t];
    const int64_t length = run_length(s);
    for (int64_t a = 0; a < s.a; ++a)
      for (int64_t first = 0; first < s.i; first += kRows)
        for (int64_t begin = 0; begin < length; begin += kSegment)
          out.push_back({t, a, first, std::min(first + kRows, s.i), begin, std::min(begin + kSegment, length)});
  }
  return out;
}

template <class Body>
static void for_each(int64_t count, int32_t threads, Body body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t k = next++; k < count; k = next++) body(k);
  };
  std::vector<std::thread> pool;
  for (int32_t t = 1; t < std::min<int64_t>(threads, count); ++t) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

// Sums of g^2 over j and over i of every factored slot, per item and then over items in their order.
static void axis_sums(const Rule& rule, Slot* slots, int64_t count, int32_t threads) {
  std::vector<Place> all;
  for (const Place& at : places(slots, count))
    if (slots[at.slot].factored) all.push_back(at);
  std::vector<std::vector<float>> inner(all.size()), outer(all.size());
  for_each(all.size(), threads, [&](int64_t k) {
    const Place& at = all[k];
    const Slot& s = slots[at.slot];
    const int64_t width = at.end - at.begin, length = run_length(s), bc = s.b * s.c;
    inner[k].assign(width, 0.0f);
    outer[k].assign((at.last - at.first) * bc, 0.0f);
    const float top = rule.max_gradient > 0 ? rule.max_gradient : INFINITY;
    for (int64_t run = at.first; run < at.last; ++run) {
      const float* g = s.g + (at.a * s.i + run) * length + at.begin;
      float* in = inner[k].data();
      float* out = outer[k].data() + (run - at.first) * bc;
      Vec lanes = {};
      int64_t e = 0;
      for (; e + kLanes <= width; e += kLanes) {
        const Vec x = vmin(vmax(load(g + e), splat(-top)), splat(top));
        const Vec square = x * x;
        store(in + e, load(in + e) + square);
        lanes += square;
      }
      if (bc == 1) out[0] += total(lanes);
      for (; e < width; ++e) {
        const float x = std::min(std::max(g[e], -top), top);
        in[e] += x * x;
        if (bc == 1) out[0] += x * x;
      }
      if (bc > 1)
        spread_outer(s, at, [&](int64_t q, int64_t index) {
          const float x = std::min(std::max(g[q], -top), top);
          out[index] += x * x;
        });
    }
  });
  for (size_t k = 0; k < all.size();) {  // items of one slot follow each other
    Slot& s = slots[all[k].slot];
    const int64_t ou = outer_size(s), in = inner_size(s), bc = s.b * s.c, length = run_length(s);
    std::vector<double> sums(ou + in, 0.0);
    const int64_t slot = all[k].slot;
    for (; k < all.size() && all[k].slot == slot; ++k) {
      const Place& at = all[k];
      for (size_t q = 0; q < outer[k].size(); ++q) sums[(at.a * s.i + at.first) * bc + q] += outer[k][q];
      for (size_t q = 0; q < inner[k].size(); ++q) sums[ou + at.a * length + at.begin + q] += inner[k][q];
    }
    for (int64_t q = 0; q < ou + in; ++q) s.axis_sums[q] = static_cast<float>(sums[q]);
  }
}

// Adafactor's accumulators from the sums of g^2, and the preconditioners from them.
static void factors(Slot& s) {
  if (!s.factored) return;
  const int64_t ou = outer_size(s), in = inner_size(s), bc = s.b * s.c;
  const Decay d = decays_of(s);
  for (int k = 0; k < kDecays; ++k) {
    float* outer = s.outer_out + k * ou;
    float* inner = s.inner_out + k * in;
    for (int64_t q = 0; q < ou; ++q) outer[q] = lerp1(s.outer[k * ou + q], s.axis_sums[q] / s.j + 1e-30f, d.f[k]);
    for (int64_t q = 0; q < in; ++q) inner[q] = lerp1(s.inner[k * in + q], s.axis_sums[ou + q] / s.i + 1e-30f, d.f[k]);
    float* outer_factor = s.factors + k * ou;
    float* inner_factor = s.factors + kDecays * ou + k * in;
    for (int64_t q = 0; q < ou; ++q) outer_factor[q] = safe_rsqrt1(outer[q]);
    for (int64_t q = 0; q < in; ++q) inner_factor[q] = safe_rsqrt1(inner[q]);
    // the row's factor is relative to its mean over d1, which is i for outer and j for inner
    const int64_t extent = s.row_is_outer ? s.i : s.j, stride = s.row_is_outer ? bc : s.c;
    const float* row = s.row_is_outer ? outer : inner;
    float* row_factor = s.row_is_outer ? outer_factor : inner_factor;
    const int64_t groups = (s.row_is_outer ? ou : in) / extent;
    for (int64_t q = 0; q < groups; ++q) {
      const int64_t base = q / stride * extent * stride + q % stride;
      double sum = 0;
      for (int64_t e = 0; e < extent; ++e) sum += row[base + e * stride];
      const float mean = static_cast<float>(sum / extent) + 1e-9f;
      for (int64_t e = 0; e < extent; ++e) row_factor[base + e * stride] = safe_rsqrt1(row[base + e * stride] / mean);
    }
  }
}

// Calls body(block, x, outer factors, inner factors, position, width, run) for every block of an item.
template <bool kFactored, class Body>
static void for_each_block(const Slot& s, const Place& at, Body body) {
  static thread_local std::vector<float> inner, outer;
  const int64_t blocks = num_blocks(at), length = run_length(s), n = s.a * s.i * length;
  const bool wide = kFactored && s.b * s.c > 1;
  if (kFactored) {
    inner_factors(s, at, inner);
    outer.assign((wide ? blocks : 1) * kDecays * kBlock, 0.0f);
  }
  alignas(64) float copy[kInputs][kBlock];
  const float* x[kInputs];
  for (int64_t run = at.first; run < at.last; ++run) {
    if (kFactored) outer_factors(s, at, run, outer);
    const int64_t start = (at.a * s.i + run) * length + at.begin;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t width = std::min<int64_t>(kBlock, at.end - at.begin - b * kBlock);
      gather<kFactored>(s, n, start + b * kBlock, width, copy, x);
      body(b, x, outer.data() + (wide ? b * kDecays * kBlock : 0), inner.data() + b * kDecays * kBlock,
           start + b * kBlock, width, run);
    }
  }
}

template <bool kClip, bool kFactored>
static void item_sums(const Rule& rule, const Slot& s, const Place& at, double* sums) {
  constexpr int kColumns = num_columns<kClip, kFactored>();
  const Decay d = decays_of(s);
  Vec lanes[kColumns] = {};
  for_each_block<kFactored>(s, at, [&](int64_t, const float* const* x, const float* outer, const float* inner,
                                       int64_t, int64_t width, int64_t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vec m[3], v, diag[3], counts = splat(1.0f);
      if (width < kBlock)  // what lies beyond the end does not count
        for (int l = 0; l < kLanes; ++l) counts[l] = half * kLanes + l < width ? 1.0f : 0.0f;
      columns<kClip, kFactored>(rule, d, x, outer, inner, half, m, v, diag,
                                [&](int f, Vec y) PACELINE_INLINE { lanes[f] += y * y * counts; });
    }
  });
  for (int f = 0; f < kColumns; ++f) {
    const int full = kClip ? kFull : kBase;
    const int to = f < full ? kFullColumns[f].sum : f < full + 3 ? kInner + f - full : kInnerRsqrt + f - full - 3;
    for (int l = 0; l < kLanes; ++l) sums[to] += lanes[f][l];
  }
}

static void vector_sums(const float* values, int64_t size, double* raw, double* rsqrts) {
  for (int k = 0; k < kDecays; ++k)
    for (int64_t q = 0; q < size; ++q) {
      const double x = values[k * size + q], r = rsqrt1(values[k * size + q] + 1e-8f);
      raw[k] += x * x;
      rsqrts[k] += r * r;
    }
}

static void column_sums(const Rule& rule, Slot* slots, int64_t count, int32_t threads) {
  const std::vector<Place> all = places(slots, count);
  std::vector<std::array<double, kCount>> partial(all.size());
  for_each(all.size(), threads, [&](int64_t k) {
    const Slot& s = slots[all[k].slot];
    double* sums = partial[k].data();
    partial[k].fill(0.0);
    if (rule.clipped_columns) s.factored ? item_sums<true, true>(rule, s, all[k], sums)
                                         : item_sums<true, false>(rule, s, all[k], sums);
    else s.factored ? item_sums<false, true>(rule, s, all[k], sums) : item_sums<false, false>(rule, s, all[k], sums);
  });
  for (int64_t t = 0; t < count; ++t) {
    Slot& s = slots[t];
    std::fill(s.sums, s.sums + kSums, 0.0);
    s.sums[kCount] = static_cast<double>(s.a * s.i * run_length(s));
    s.sums[kOuterCount] = static_cast<double>(outer_size(s));
    s.sums[kInnerCount] = static_cast<double>(inner_size(s));
    if (!s.factored) continue;
    vector_sums(s.outer_out, outer_size(s), s.sums + kOuter, s.sums + kOuterRsqrt);
    vector_sums(s.inner_out, inner_size(s), s.sums + kInner, s.sums + kInnerRsqrt);
  }
  for (size_t k = 0; k < all.size(); ++k)
    for (int f = 0; f < kCount; ++f) slots[all[k].slot].sums[f] += partial[k][f];
}

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
  auto scale = [&](int sum, Sum counted) {
    return rsqrt1(static_cast<float>(s.sums[sum] / s.sums[counted]) + kNormalizerEps);
  };
  constexpr int full = kClip ? kFull : kBase;
  for (int f = 0; f < full; ++f) {
    const int row = kClip ? kFullColumns[f].row30 : kFullColumns[f].row28;
    for (int h = 0; h < H; ++h) net.full[f][h] = s.w0[row * H + h] * scale(kFullColumns[f].sum, kCount);
  }
  const int first = kClip ? kRow30 : kRow28;
  for (int k = 0; k < 6; ++k) {  // three decays, raw and then rsqrt: w0 has rows row, col, row_rsqrt, col_rsqrt
    const float* row = s.w0 + (first + k % 3 + k / 3 * 6) * H;
    const float* col = row + 3 * H;
    for (int h = 0; h < H; ++h) {
      if (kFactored) {
        const float* outer = s.row_is_outer ? row : col;
        const float* inner = s.row_is_outer ? col : row;
        net.row[k][h] = outer[h] * scale(kOuter + k, kOuterCount);
        net.col[k][h] = inner[h] * scale(kInner + k, kInnerCount);
      } else {
        net.full[full + k][h] = (row[h] + col[h]) * scale(kInner + k, kCount);
      }
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

// direction and magnitude from the first layer's preactivations, kWidth vectors of elements at a time.
template <int kHidden, int kWidth, class Net>
PACELINE_INLINE static inline void upper_layers(const Net& net, Vec (*h1)[kWidth], Vec (*out)[kWidth]) {
  constexpr int kTile = kHidden < kUnroll ? kHidden : kUnroll;
  for (int h = 0; h < kHidden; ++h)
    for (int q = 0; q < kWidth; ++q) h1[h][q] = relu(h1[h][q]);
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

// The first layer where its columns had to be kept: kTile hidden units over all columns at a time.
template <int kHidden, int kColumns, class Net>
PACELINE_INLINE static inline void first_layer(const Net& net, const Vec (*x)[2], Vec (*h1)[2]) {
  constexpr int kTile = kUnroll;
  for (int t = 0; t < kHidden; t += kTile) {
    Vec acc[kTile][2];
    for (int h = 0; h < kTile; ++h)
      for (int q = 0; q < 2; ++q) acc[h][q] = h1[t + h][q];
    for (int f = 0; f < kColumns; ++f)
      for (int h = 0; h < kTile; ++h)
        for (int q = 0; q < 2; ++q) acc[h][q] += x[f][q] * net.full[f][t + h];
    for (int h = 0; h < kTile; ++h)
      for (int q = 0; q < 2; ++q) h1[t + h][q] = acc[h][q];
  }
}

// The first layer's part of one array of accumulators: values and rsqrt of values, (3, ...) with `stride` between.
template <int kHidden>
static inline void first_layer_part(const float* values, int64_t stride, const float (*w)[kHidden], float* out,
                                    int64_t out_stride) {
  float x[6];
  for (int k = 0; k < kDecays; ++k) {
    x[k] = values[k * stride];
    x[k + 3] = rsqrt1(values[k * stride] + 1e-8f);
  }
  for (int h = 0; h < kHidden; ++h) {
    float sum = 0;
    for (int k = 0; k < 6; ++k) sum += x[k] * w[k][h];
    out[h * out_stride] = sum;
  }
}

template <int kHidden, bool kClip, bool kFactored>
static void item_apply(const Rule& rule, const Slot& s, const Place& at) {
  constexpr int kColumns = num_columns<kClip, kFactored>();
  static thread_local Folded<kHidden, kColumns> net;
  static thread_local std::vector<float> per_place, per_element;
  fold<kHidden, kClip, kFactored>(rule, s, net);
  const Decay d = decays_of(s);
  const int64_t n = s.a * s.i * run_length(s), ou = outer_size(s), in = inner_size(s), bc = s.b * s.c;
  const bool wide = kFactored && bc > 1;
  float per_run[kHidden];
  std::memcpy(per_run, net.b0, sizeof per_run);
  if (kFactored) {
    per_place.assign(num_blocks(at) * kHidden * kBlock, 0.0f);
    for (int64_t e = at.begin; e < at.end; ++e) {
      const int64_t q = e - at.begin;
      first_layer_part<kHidden>(s.inner_out + at.a * run_length(s) + e, in, net.col,
                                per_place.data() + q / kBlock * kHidden * kBlock + q % kBlock, kBlock);
    }
    if (wide) per_element.assign(per_place.size(), 0.0f);
  }
  float step = s.step;
  if (rule.parameter_scaled) step *= std::sqrt(static_cast<float>(s.sums[kP] / s.sums[kCount]) + 1e-9f);
  int64_t current = -1;
  for_each_block<kFactored>(s, at, [&](int64_t b, const float* const* x, const float* outer, const float* inner,
                                       int64_t position, int64_t width, int64_t run) {
    if (kFactored && run != current) {
      current = run;
      const float* values = s.outer_out + (at.a * s.i + run) * bc;
      if (wide) {
        std::vector<float> part(bc * kHidden);
        for (int64_t q = 0; q < bc; ++q) first_layer_part<kHidden>(values + q, ou, net.row, part.data() + q * kHidden, 1);
        spread_outer(s, at, [&](int64_t q, int64_t index) {
          float* to = per_element.data() + q / kBlock * kHidden * kBlock + q % kBlock;
          for (int h = 0; h < kHidden; ++h) to[h * kBlock] = part[index * kHidden + h];
        });
      } else {
        first_layer_part<kHidden>(values, ou, net.row, per_run, 1);
        for (int h = 0; h < kHidden; ++h) per_run[h] += net.b0[h];
      }
    }
    float* to[kInputs] = {s.p_out, nullptr, s.m_out, s.m_out + n, s.m_out + 2 * n, s.v_out,
                          s.inner_out, s.inner_out + n, s.inner_out + 2 * n};
    alignas(64) float cut[kInputs][kBlock];
    for (int k = 0; k < kInputs; ++k) to[k] = width == kBlock ? to[k] + position : cut[k];
    const float* place = kFactored ? per_place.data() + b * kHidden * kBlock : nullptr;
    const float* element = wide ? per_element.data() + b * kHidden * kBlock : nullptr;
    const auto begin = [&](int h, int half) PACELINE_INLINE {
      Vec y = splat(per_run[h]);
      if (kFactored) y += load(place + h * kBlock + half * kLanes);
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
      for (int half = 0; half < 2; ++half) {
        const Vec p = load(x[0] + half * kLanes);
        Vec m[3], v, diag[3], h1[kHidden][1], out[2][1];
        for (int h = 0; h < kHidden; ++h) h1[h][0] = begin(h, half);
        columns<kClip, kFactored>(rule, d, x, outer, inner, half, m, v, diag, [&](int f, Vec y) PACELINE_INLINE {
#pragma GCC unroll 8
          for (int h = 0; h < kHidden; ++h) h1[h][0] += y * net.full[f][h];
        });
        keep(half, m, v, diag);
        upper_layers<kHidden, 1>(net, h1, out);
        move(half, p, out[0][0], out[1][0]);
      }
    } else {
      Vec column[kColumns][2], h1[kHidden][2], out[2][2], p[2];
      for (int half = 0; half < 2; ++half) {
        Vec m[3], v, diag[3];
        p[half] = load(x[0] + half * kLanes);
        columns<kClip, kFactored>(rule, d, x, outer, inner, half, m, v, diag,
                                  [&](int f, Vec y) PACELINE_INLINE { column[f][half] = y; });
        keep(half, m, v, diag);
        for (int h = 0; h < kHidden; ++h) h1[h][half] = begin(h, half);
      }
      first_layer<kHidden, kColumns>(net, column, h1);
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

// Mean of p^2, and mean and variance of the old momenta and second moment, over each tensor.
static void tensor_moments(Slot* slots, int64_t count, int32_t threads) {
  for_each(count, threads, [&](int64_t t) {
    Slot& s = slots[t];
    const int64_t n = s.a * s.i * run_length(s), step = 4096;
    double square = 0, mean[4] = {}, m2[4] = {}, seen = 0;
    for (int64_t at = 0; at < n; at += step) {
      const int64_t width = std::min(step, n - at);
      auto reduce = [&](const float* x, float shift, bool squared) {
        Vec lanes = {};
        int64_t e = 0;
        for (; e + kLanes <= width; e += kLanes) {
          const Vec y = load(x + at + e) - shift;
          lanes += squared ? y * y : y;
        }
        double out = total(lanes);
        for (; e < width; ++e) {
          const float y = x[at + e] - shift;
          out += squared ? y * y : y;
        }
        return out;
      };
      square += reduce(s.p, 0.0f, true);
      for (int k = 0; k < 4; ++k) {  // combined as by Chan et al. 1979, so that nothing cancels
        const float* x = k < 3 ? s.m + k * n : s.v;
        const double local = reduce(x, 0.0f, false) / width, delta = local - mean[k];
        m2[k] += reduce(x, static_cast<float>(local), true) + delta * delta * seen * width / (seen + width);
        mean[k] += delta * width / (seen + width);
      }
      seen += width;
    }
    s.sums[0] = square / n;
    for (int k = 0; k < 4; ++k) {
      s.sums[1 + k] = mean[k];
      s.sums[5 + k] = m2[k] / n;
    }
  });
}

// All phases, a group of slots at a time, so that later phases find in the cache what earlier ones read.
static void update(const Rule& rule, Slot* slots, int64_t count, int32_t threads) {
  for (int64_t first = 0, last = 0; first < count; first = last) {
    for (int64_t n = 0; last < count && n < kGroup; ++last) n += slots[last].a * slots[last].i * run_length(slots[last]);
    for (Phase phase : {kAxisSums, kFactors, kColumnSums, kApply})
      run(rule, phase, slots + first, last - first, threads);
  }
}

void run(const Rule& rule, Phase phase, Slot* slots, int64_t count, int32_t threads) {
  switch (phase) {
    case kUpdate: return update(rule, slots, count, threads);
    case kAxisSums: return axis_sums(rule, slots, count, threads);
    case kFactors: return for_each(count, threads, [&](int64_t t) { factors(slots[t]); });
    case kColumnSums: return column_sums(rule, slots, count, threads);
    case kApply: return apply(rule, slots, count, threads);
    case kTensorMoments: return tensor_moments(slots, count, threads);
  }
}
