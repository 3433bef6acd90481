// The input columns of a block of elements, and where in a slot they come from. Part of rules.inc.h.

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

struct Decay { float m[3], v, f[3], max_gradient; };  // 1 - decay, and the bound on gradients
static inline float unit(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }
static Decay decays_of(const Rule& rule, const Slot& s) {
  Decay d;
  for (int k = 0; k < kDecays; ++k) {
    d.m[k] = 1.0f - s.m_decay[k];
    d.f[k] = 1.0f - unit(s.factored_decay[k]);
  }
  d.v = 1.0f - unit(s.v_decay[0]);
  d.max_gradient = rule.max_gradient > 0 ? rule.max_gradient : INFINITY;
  return d;
}

// Adafactor's factors of a block: outer and inner, each (3, kBlock) with a stride between the decays.
struct Factors {
  const float *outer, *inner;
  int64_t outer_stride, inner_stride;
  Vec operator()(int k, int o) const { return load(outer + k * outer_stride + o) * load(inner + k * inner_stride + o); }
};

// All columns of half a block, given to column(index, values), and its new accumulators. Inlined, so that what is done
// with a column happens in registers.
template <bool kClip, bool kFactored, class Take>
PACELINE_INLINE static inline void columns(const Rule& rule, const Decay& d, const float* const* x,
                                           const Factors& factors, int half, Vec* m_new, Vec& v_new, Vec* diag_new,
                                           Take column) {
  const int o = half * kLanes;
  Vec g = load(x[1] + o);
  g = vmin(vmax(g, splat(-d.max_gradient)), splat(d.max_gradient));
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
      const Vec f = factors(k, o);
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

constexpr int kAhead = 512;  // elements between what is worked on and what is fetched
constexpr int kInputs = 9;  // p, g, m (3), v, diag (3)

// The inputs of the block at `at`: where they lie, or a copy filled up with zeros where the block is cut short.
template <bool kFactored>
static inline void gather(const Slot& s, int64_t n, int64_t at, int64_t width, float (*copy)[kBlock],
                          const float** x) {
  const float* from[kInputs] = {s.p, s.g, s.m, s.m + n, s.m + 2 * n, s.v, s.inner, s.inner + n, s.inner + 2 * n};
  constexpr int count = kFactored ? 6 : 9;
  for (int k = 0; k < count; ++k) {
    x[k] = from[k] + at;
    // the processor's own prefetching stops at the end of every page; past the end of a tensor this does nothing
    for (int line = 0; line < kBlock; line += 16) __builtin_prefetch(x[k] + kAhead + line);
  }
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

// Short runs are worked on as one long one: a block then holds the ends of several, and no block is cut short but the
// last. What depends on the run is spread over its elements.
constexpr int64_t kShort = kSegment / kRows;
static inline bool joined(const Slot& s) { return s.factored && s.b * s.c == 1 && s.j <= kShort; }
static inline int64_t num_joined(const Slot& s, const Place& at) { return (at.last - at.first) * s.j; }
using Table = std::unique_ptr<float[]>;  // not cleared, as a vector would be
// Between rows of a table of joined runs: room for a last vector, and an odd number of vectors, so that rows do not
// fall on the same lines of the cache.
static inline int64_t joined_stride(const Slot& s, const Place& at) {
  return ((num_joined(s, at) / kLanes + 3) | 1) * kLanes;
}

// out[run of the item, q] = combine(of the run, of q): one row of such a table. `inner` is read beyond its end.
template <class Combine>
static inline void join(const Slot& s, const Place& at, const float* outer, const float* inner, float* out,
                        Combine combine) {
  const int64_t runs = at.last - at.first, width = s.j;
  for (int64_t run = 0; run < runs; ++run, out += width)  // each overwrites what the one before stored too much
    for (int64_t q = 0; q < width; q += kLanes) store(out + q, combine(splat(outer[run]), load(inner + q)));
}

static inline int64_t num_blocks(const Place& at) { return (at.end - at.begin + kBlock - 1) / kBlock; }

// Which value of an outer array (one per b and c of a run) belongs to each element of the segment, the same in all
// runs; nothing where a run has a single value.
static std::vector<int32_t> outer_index(const Slot& s, const Place& at) {
  if (!s.factored || s.b * s.c == 1) return {};
  std::vector<int32_t> index(at.end - at.begin);
  const int64_t jc = s.j * s.c;
  int64_t first = at.begin / jc * s.c, in_jc = at.begin % jc, in_c = at.begin % s.c;
  for (int32_t& each : index) {
    each = static_cast<int32_t>(first + in_c);
    if (++in_c == s.c) in_c = 0;
    if (++in_jc == jc) in_jc = 0, first += s.c;
  }
  return index;
}

// Values of `rows` outer arrays for every element, block by block.
static void spread(const std::vector<int32_t>& index, int rows, const float* from, int64_t stride, float* out) {
  const int64_t width = index.size();
  for (int64_t begin = 0; begin < width; begin += kBlock)
    for (int row = 0; row < rows; ++row, out += kBlock)
      for (int64_t q = begin; q < std::min<int64_t>(begin + kBlock, width); ++q)
        out[q - begin] = from[row * stride + index[q]];
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

static void outer_factors(const Slot& s, const Place& at, int64_t run, const std::vector<int32_t>& index,
                          std::vector<float>& out) {
  const int64_t size = outer_size(s), bc = s.b * s.c;
  const float* from = s.factors + (at.a * s.i + run) * bc;
  if (bc == 1) {  // one number for the whole run: a single block serves all
    for (int k = 0; k < kDecays; ++k)
      for (int q = 0; q < kBlock; ++q) out[k * kBlock + q] = from[k * size];
    return;
  }
  spread(index, kDecays, from, size, out.data());
}
