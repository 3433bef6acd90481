// Elementary functions on vectors of kLanes floats, beyond lopt/kernels/vectors.inc.h. Part of window.inc.h.

#define PACELINE_INLINE __attribute__((always_inline))

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
static inline Int bits_of(Vec x) { Int r; std::memcpy(&r, &x, sizeof r); return r; }
static inline Vec float_of(Int x) { Vec r; std::memcpy(&r, &x, sizeof r); return r; }
static inline Vec only(Vec x, Int mask) { return float_of(bits_of(x) & mask); }

// All ones in the first `count` lanes.
static inline Int first_lanes(int64_t count) {
  Int mask;
  for (int l = 0; l < kLanes; ++l) mask[l] = l < count ? -1 : 0;
  return mask;
}

// A rational approximation, good to a few units in the last place, also near zero.
static inline Vec vtanh(Vec x) {
  const Vec y = vmin(vmax(x, splat(-7.90531110763549805f)), splat(7.90531110763549805f));
  const Vec s = y * y;
  Vec p = splat(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s - 8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Vec q = splat(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  const Vec one = x < 0.0f ? splat(-1.0f) : splat(1.0f);
  return x * x > 81.0f ? one : y * p / q;  // where it rounds to one, it is
}

static inline Vec vsigmoid(Vec x) { return 1.0f / (1.0f + vexp(-x)); }

// The natural logarithm of positive finite numbers; a NaN stays.
static inline Vec vlog(Vec x) {
  const Int b = bits_of(x);
  Int exponent = ((b >> 23) & 255) - 126;
  Vec m = float_of((b & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const Int low = m < 0.707106781186547524f;
  exponent += low;  // a true lane is -1
  m = m - 1.0f + only(m, low);
  const Vec e = __builtin_convertvector(exponent, Vec), z = m * m;
  Vec y = splat(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z - 2.12194440e-4f * e - 0.5f * z;
  return x != x ? x : m + y + 0.693359375f * e;
}

// Sine and cosine; arguments of more than some thousand are left to the C library.
static inline void vsincos(Vec x, Vec& sine, Vec& cosine) {
  const Vec a = x < 0.0f ? -x : x;
  Int octant = __builtin_convertvector(vmin(a, splat(8192.0f)) * 1.27323954473516f, Int);
  octant = (octant + 1) & ~1;
  const Vec k = __builtin_convertvector(octant, Vec);
  const Vec r = ((a - k * 0.78515625f) - k * 2.4187564849853515625e-4f) - k * 3.77489497744594108e-8f, z = r * r;
  Vec c = splat(2.443315711809948e-5f);
  c = (c * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  Vec s = splat(-1.9515295891e-4f);
  s = (s * z + 8.3321608736e-3f) * z - 1.6666654611e-1f;
  s = s * z * r + r;
  const Int swap = (octant & 2) != 0, flip_sine = ((octant & 4) != 0) ^ (x < 0.0f);
  const Int flip_cosine = ((octant + 2) & 4) != 0;
  sine = swap ? c : s;
  cosine = swap ? s : c;
  sine = flip_sine ? -sine : sine;
  cosine = flip_cosine ? -cosine : cosine;
  if (max_lanes(a) < 8192.0f) return;
  for (int l = 0; l < kLanes; ++l)
    if (a[l] >= 8192.0f) sine[l] = std::sin(x[l]), cosine[l] = std::cos(x[l]);
}

// to = a[0], b[0], a[1], b[1], ...
static inline void interleave(Vec a, Vec b, float* to) {
  Int low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l % 2 * kLanes + l / 2;
    high[l] = low[l] + kLanes / 2;
  }
  store(to, __builtin_shuffle(a, b, low));
  store(to + kLanes, __builtin_shuffle(a, b, high));
}
