// Arithmetic on vectors of kLanes floats, and the exponential. Part of rules.inc.h.

static inline float rsqrt1(float x) { return 1.0f / std::sqrt(x); }
static inline float safe_rsqrt1(float x) { return rsqrt1(x < 1e-9f ? 1e-9f : x); }
static inline float lerp1(float old, float now, float w) { return old + w * (now - old); }

static inline Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, which the compiler knows; x + 0 is not for -0
static inline Vec load(const float* x) { Vec r; std::memcpy(&r, x, sizeof r); return r; }
static inline void store(float* x, Vec v) { std::memcpy(x, &v, sizeof v); }
// The first n of a vector's numbers, 0 in place of the rest; what lies beyond them is not touched.
static inline Vec load_first(const float* x, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return n < kLanes ? Vec(_mm512_maskz_loadu_ps((1u << n) - 1, x)) : load(x);
#endif
  Vec r = {};
  std::memcpy(&r, x, sizeof(float) * std::min<int64_t>(n, kLanes));
  return r;
}
static inline Vec first(Vec x, int64_t n) {  // the same of a vector in a register
  constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Int lane;
  std::memcpy(&lane, kLane, sizeof lane);
  return lane < static_cast<int32_t>(std::min<int64_t>(n, kLanes)) ? x : Vec{};
}
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

// y times two to the k-th, a whole number; infinite and zero where it over- and underflows.
static inline Vec scaled(Vec y, Vec k) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return _mm512_scalef_ps(y, k);
#endif
  const Int n = __builtin_convertvector(k, Int), half = n >> 1;
  const Int bits[2] = {(half + 127) << 23, (n - half + 127) << 23};
  Vec powers[2];
  std::memcpy(powers, bits, sizeof powers);
  return y * powers[0] * powers[1];
}

// e^x to about one unit in the last place; infinite and zero where it over- and underflows.
static inline Vec vexp(Vec x) {
  const Vec clamped = vmin(vmax(x, splat(-110.0f)), splat(110.0f));
  const Vec k = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
  const Vec r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return scaled(y, k);
}
