// Batches: the examples of a key, as tasks/random.py and tasks/data/images.py draw them. Part of window.inc.h.

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;

static inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
static inline uint64_t fold_in(uint64_t key, uint64_t tag) { return mix(mix(key + kGamma) ^ tag); }
static inline uint64_t number(uint64_t key, uint64_t i) { return mix(key + (i + 1) * kGamma); }
static inline int64_t below(uint64_t drawn, int64_t high) { return ((drawn >> 32) * high) >> 32; }

struct Batch {
  float* x;  // (batch, padded(pixels))
  std::vector<int64_t> labels, rows;  // rows: of the data set, those of the batch that is fetched next
  std::vector<float> noise;
};

// Number q of the stream becomes the places 2 q and 2 q + 1 of all images of the batch in a row (Box & Muller).
static void add_noise(const Problem& problem, uint64_t key, Batch& out) {
  const int64_t pixels = problem.widths[0], ld = padded(pixels), total = problem.batch * pixels;
  const float noise = static_cast<float>(problem.noise), turn = static_cast<float>(2 * 3.14159265358979323846 * 0x1p-32);
  out.noise.resize((total / (2 * kLanes) + 1) * 2 * kLanes);
  alignas(64) float radius[kLanes], angle[kLanes];
  for (int64_t first = 0; 2 * first < total; first += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t drawn = number(key, first + l);
      radius[l] = static_cast<float>(static_cast<int64_t>(drawn >> 32));
      angle[l] = static_cast<float>(static_cast<int64_t>(drawn & 0xFFFFFFFFu));
    }
    const Vec r = vsqrt(-2.0f * vlog((load(radius) + 0.5f) * 0x1p-32f));
    Vec sine, cosine;
    vsincos(load(angle) * turn, sine, cosine);
    interleave(noise * (r * cosine), noise * (r * sine), out.noise.data() + 2 * first);
  }
  for (int64_t b = 0; b < problem.batch; ++b)
    for (int64_t k = 0; k < pixels; ++k) out.x[b * ld + k] += out.noise[b * pixels + k];
}

// Chooses the examples of a step, so that the memory can send them while another step is computed.
static void draw(const Problem& problem, uint64_t key, Batch& out) {
  const size_t bytes = problem.widths[0] * (problem.bytes ? 1 : sizeof(float));
  for (int64_t b = 0; b < problem.batch; ++b) {
    out.rows[b] = problem.order[problem.first + below(number(key, b), problem.examples)];
    const char* image = static_cast<const char*>(problem.images) + out.rows[b] * bytes;
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(image + line);
  }
}

static inline float level(float value) { return value; }
// value / 255 as division rounds it, by a product and its correction
static inline float level(uint8_t value) {
  constexpr float kInverse = 1.0f / 255.0f;
  const float x = value, y = x * kInverse;
  return y + (x - y * 255.0f) * kInverse;
}

template <class Pixel>
static void convert(const Problem& problem, uint64_t key, Batch& out) {
  const int64_t pixels = problem.widths[0], ld = padded(pixels), side = problem.side, shift = problem.shift;
  const uint64_t moves = fold_in(key, problem.shift_tag);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Pixel* image = static_cast<const Pixel*>(problem.images) + out.rows[b] * pixels;
    float* to = out.x + b * ld;
    out.labels[b] = problem.labels[out.rows[b]];
    if (!shift) {
      for (int64_t k = 0; k < pixels; ++k) to[k] = level(image[k]);
      continue;
    }
    const int64_t down = below(number(moves, 2 * b), 2 * shift + 1) - shift;
    const int64_t right = below(number(moves, 2 * b + 1), 2 * shift + 1) - shift;
    for (int64_t c = 0; c < problem.channels; ++c)
      for (int64_t i = 0; i < side; ++i) {
        const int64_t y = i + down, first = std::max<int64_t>(0, -right), last = std::min(side, side - right);
        float* row = to + (c * side + i) * side;
        std::fill(row, row + side, 0.0f);
        if (y < 0 || y >= side) continue;
        const Pixel* from = image + (c * side + y) * side + right;
        for (int64_t j = first; j < last; ++j) row[j] = level(from[j]);
      }
  }
}

// The batch whose examples `draw` has chosen with the same key.
static void fetch(const Problem& problem, uint64_t key, Batch& out) {
  problem.bytes ? convert<uint8_t>(problem, key, out) : convert<float>(problem, key, out);
  if (problem.noise > 0) add_noise(problem, fold_in(key, problem.noise_tag), out);
}
