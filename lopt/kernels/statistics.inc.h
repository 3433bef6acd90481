// What an update needs to know of a whole tensor: Adafactor's moments and the size of every column; and VeLO's view of
// a tensor. Sums are per item, then over items in their order. Part of rules.inc.h.

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
    const std::vector<int32_t> index = outer_index(s, at);
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
      for (size_t q = 0; q < index.size(); ++q) {
        const float x = std::min(std::max(g[q], -top), top);
        out[index[q]] += x * x;
      }
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
static void factors(const Rule& rule, Slot& s) {
  if (!s.factored) return;
  const int64_t ou = outer_size(s), in = inner_size(s), bc = s.b * s.c;
  const Decay d = decays_of(rule, s);
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

// The product of both factors for every element of joined runs, (3, elements) with joined_stride() between.
static Table joined_factors(const Slot& s, const Place& at) {
  const int64_t stride = joined_stride(s, at);
  Table out(new float[kDecays * stride]);
  alignas(64) float inner[kShort + kLanes];
  for (int k = 0; k < kDecays; ++k) {
    std::memcpy(inner, s.factors + kDecays * outer_size(s) + k * inner_size(s) + at.a * s.j, sizeof(float) * s.j);
    join(s, at, s.factors + k * outer_size(s) + at.a * s.i + at.first, inner, out.get() + k * stride,
         [](Vec x, Vec y) { return x * y; });
  }
  return out;
}

// Calls body(block, x, factors, position, width, run) for every block of an item; the run of joined ones is -1.
template <bool kFactored, class Body>
static void for_each_block(const Slot& s, const Place& at, const std::vector<int32_t>& index, Body body) {
  std::vector<float> inner, outer;
  const int64_t blocks = num_blocks(at), length = run_length(s), n = s.a * s.i * length;
  const bool wide = kFactored && s.b * s.c > 1;
  alignas(64) float copy[kInputs][kBlock];
  const float* x[kInputs];
  if (kFactored && joined(s)) {
    const Table table = joined_factors(s, at);
    alignas(64) float ones[kBlock];
    std::fill(ones, ones + kBlock, 1.0f);
    const int64_t size = num_joined(s, at), start = (at.a * s.i + at.first) * length;
    for (int64_t b = 0; b * kBlock < size; ++b) {
      const int64_t width = std::min<int64_t>(kBlock, size - b * kBlock);
      gather<kFactored>(s, n, start + b * kBlock, width, copy, x);
      body(b, x, Factors{table.get() + b * kBlock, ones, joined_stride(s, at), 0}, start + b * kBlock, width, -1);
    }
    return;
  }
  if (kFactored) {
    inner_factors(s, at, inner);
    outer.assign((wide ? blocks : 1) * kDecays * kBlock, 0.0f);
  }
  for (int64_t run = at.first; run < at.last; ++run) {
    if (kFactored) outer_factors(s, at, run, index, outer);
    const int64_t start = (at.a * s.i + run) * length + at.begin;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t width = std::min<int64_t>(kBlock, at.end - at.begin - b * kBlock);
      gather<kFactored>(s, n, start + b * kBlock, width, copy, x);
      const float* of_run = outer.data() + (wide ? b * kDecays * kBlock : 0);
      body(b, x, Factors{of_run, inner.data() + b * kDecays * kBlock, kBlock, kBlock}, start + b * kBlock, width, run);
    }
  }
}

template <bool kClip, bool kFactored>
static void item_sums(const Rule& rule, const Slot& s, const Place& at, double* sums) {
  constexpr int kColumns = num_columns<kClip, kFactored>();
  const Decay d = decays_of(rule, s);
  Vec lanes[kColumns] = {};
  for_each_block<kFactored>(s, at, outer_index(s, at), [&](int64_t, const float* const* x,
                                                           const Factors& factors, int64_t, int64_t width, int64_t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2 && half * kLanes < width; ++half) {
      Vec m[3], v, diag[3];
      if (width == kBlock) {
        columns<kClip, kFactored>(rule, d, x, factors, half, m, v, diag,
                                  [&](int f, Vec y) PACELINE_INLINE { lanes[f] += y * y; });
        continue;
      }
      columns<kClip, kFactored>(rule, d, x, factors, half, m, v, diag,
                                [&](int f, Vec y) PACELINE_INLINE { lanes[f] += first(y * y, width - half * kLanes); });
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
    for (int64_t begin = 0; begin < size; begin += kSegment) {
      Vec squares = {}, inverses = {};
      const int64_t end = std::min(begin + kSegment, size);
      for (int64_t q = begin; q < end; q += kLanes) {
        const Vec x = load_first(values + k * size + q, end - q), r = rsqrt(x + 1e-8f);
        squares += x * x;
        inverses += first(r * r, end - q);
      }
      raw[k] += total(squares);
      rsqrts[k] += total(inverses);
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
