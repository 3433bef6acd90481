// Celo2: orthogonalised steps of matrices, Adam for the rest. Part of window.inc.h. The reference is lopt/celo2.py.

constexpr float kEps = 1e-9f, kAdamDecays[2] = {0.9f, 0.95f}, kAdamMult = 20.0f, kMaxAdamGradient = 1e18f;
constexpr float kQuintic[3] = {3.4445f, -4.7750f, 2.0315f};  // Newton-Schulz (Jordan et al. 2024, Muon)
constexpr int kQuinticSteps = 5;

struct Square {  // what Newton-Schulz computes in
  float *x, *across, *gram, *polynomial;
};

static float square_sum(const float* x, int64_t n) {
  Vec sum{};
  for (int64_t k = 0; k < n; k += kLanes) sum += load(x + k) * load(x + k);
  return add_lanes(sum);
}

// x (rows, cols), its rows padded with zeros, becomes nearly orthogonal.
static void newton_schulz(float* matrix, int64_t rows, int64_t cols, Square& work) {
  const bool tall = rows > cols;  // the same for less work: x xT is then the larger of the two products
  const int64_t r = tall ? cols : rows, c = tall ? rows : cols, ld = padded(c), wide = padded(r);
  float* x = tall ? work.x : matrix;
  if (tall) transpose(matrix, padded(cols), rows, cols, x);
  const float norm = 1.0f / (std::sqrt(square_sum(x, r * ld)) + 1e-8f);
  for (int64_t k = 0; k < r * ld; k += kLanes) store(x + k, load(x + k) * norm);
  for (int step = 0; step < kQuinticSteps; ++step) {
    transpose(x, ld, r, c, work.across);
    product({x, ld, 1}, work.across, wide, nullptr, work.gram, wide, r, wide, c);
    product({work.gram, wide, 1}, work.gram, wide, nullptr, work.polynomial, wide, r, wide, r);
    for (int64_t k = 0; k < r * wide; k += kLanes)
      store(work.polynomial + k, kQuintic[1] * load(work.gram + k) + kQuintic[2] * load(work.polynomial + k));
    for (int64_t i = 0; i < r; ++i) work.polynomial[i * wide + i] += kQuintic[0];
    product({work.polynomial, wide, 1}, x, ld, nullptr, work.across, ld, r, ld, r);
    std::memcpy(x, work.across, sizeof(float) * r * ld);
  }
  if (tall) transpose(x, ld, r, c, matrix);
}

// t.g holds the network's directions; the parameters move by them, orthogonalised, with root mean square one.
static void apply_directions(const Rule& rule, Tensor& t, Square& work) {
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = t.cols; j < t.ld; ++j) t.g[i * t.ld + j] = 0.0f;
  if (rule.orthogonalize && t.factored) newton_schulz(t.g, t.rows, t.cols, work);
  const float scale = rsqrt1(square_sum(t.g, t.size()) / (t.rows * t.cols) + kEps);
  const float step = static_cast<float>(rule.step_mult);
  for (int64_t k = 0; k < t.size(); k += kLanes)
    store(t.p + k, load(t.p + k) - step * (load(t.g + k) * scale));
}

// A vector by Adam, without bias correction; its two moments are m[0] and v.
static void apply_adam(const Rule& rule, Tensor& t, float tau) {
  const float step = static_cast<float>(rule.step_mult);
  for (int64_t j = 0; j < t.ld; j += kLanes) {
    const Vec scaled = load(t.g + j) * tau;
    const Vec g = only(vmin(vmax(scaled, splat(-kMaxAdamGradient)), splat(kMaxAdamGradient)), first_lanes(t.cols - j));
    const Vec m = lerp(load(t.m[0] + j), g, 1.0f - kAdamDecays[0]), v = lerp(load(t.v + j), g * g, 1.0f - kAdamDecays[1]);
    store(t.m[0] + j, m);
    store(t.v + j, v);
    store(t.p + j, load(t.p + j) - step * (m * rsqrt(v + 1e-8f) * kAdamMult));
  }
}
