// Arithmetic on vectors of kLanes floats, and the exponential. Part of rules.inc.h.

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
