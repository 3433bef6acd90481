// The task: forward and backward pass of one particle's MLP on one batch. Part of window.inc.h.
//
// The reference is tasks/families/mlp.py, image_mlp.py, mlp_ae.py and activations.py.

// The order of tasks.families.activations.KINDS.
enum Activation : int64_t { kRelu, kRelu6, kSelu, kTanh, kSigmoid, kSilu, kSwish, kGelu, kLeakyRelu, kCos, kSin };

// A value and its derivative.
PACELINE_INLINE static inline void activate(int64_t kind, Vec x, Vec& y, Vec& slope) {
  const Vec one = splat(1.0f), zero{};
  switch (kind) {
    case kRelu: y = relu(x), slope = x > 0.0f ? one : zero; return;
    case kRelu6: y = vmin(relu(x), splat(6.0f)), slope = (x > 0.0f) & (x < 6.0f) ? one : zero; return;
    case kSelu: {
      constexpr float kScale = 1.0507009873554805f, kAlpha = 1.6732632423543772f;
      const Vec e = kScale * kAlpha * vexp(x);
      y = x > 0.0f ? kScale * x : e - kScale * kAlpha;
      slope = x > 0.0f ? splat(kScale) : e;
      return;
    }
    case kTanh: y = vtanh(x), slope = 1.0f - y * y; return;
    case kSigmoid: y = vsigmoid(x), slope = y * (1.0f - y); return;
    case kSilu: case kSwish: {
      const Vec s = vsigmoid(x);
      y = x * s, slope = s * (1.0f + x * (1.0f - s));
      return;
    }
    case kGelu: {
      constexpr float kA = 0.7978845608028654f, kB = 0.044715f;
      const Vec s = vsigmoid(2.0f * kA * (x + kB * (x * x * x)));  // (1 + tanh) / 2
      y = x * s;
      slope = s + 2.0f * x * (s * (1.0f - s)) * (kA * (1.0f + 3.0f * kB * (x * x)));
      return;
    }
    case kLeakyRelu: y = x > 0.0f ? x : 0.01f * x, slope = x > 0.0f ? one : splat(0.01f); return;
    case kCos: vsincos(x, slope, y), slope = -slope; return;
    default: vsincos(x, y, slope); return;
  }
}

// In place, with the derivatives; one loop for each function.
static void activate_all(int64_t kind, float* z, float* slopes, int64_t count) {
  const auto loop = [&](int64_t fixed) PACELINE_INLINE {
    for (int64_t k = 0; k < count; k += kLanes) {
      Vec y, slope;
      activate(fixed, load(z + k), y, slope);
      store(z + k, y);
      store(slopes + k, slope);
    }
  };
  kind == kRelu ? loop(kRelu) : loop(kind);
}

// What a thread computes a step of one particle with; the sizes follow from the problem.
struct Workspace {
  std::vector<float*> hidden, slope;  // of each layer: (batch, padded(width)); hidden[0] is the input
  std::vector<float*> delta;  // the loss by each layer's outputs before its activation
  float *centered, *transposed, *columns;
};

struct Choices {  // what a particle's dynamic configuration says
  int64_t activation;
  bool center, constrain, log_loss;
  float tau;
};

// Loss and delta of the last layer's outputs z (batch, padded(classes)).
static float classification(const Problem& problem, const std::vector<int64_t>& labels, const float* z, float* delta) {
  const int64_t classes = problem.widths[problem.layers], ld = padded(classes), tail = ld - kLanes;
  const Int mask = first_lanes(classes - tail);
  const bool squared = problem.loss == kSquaredError;
  const float scale = squared ? 2.0f / (problem.batch * classes) : 1.0f / problem.batch;
  double total = 0;
  Vec masses{};
  for (int64_t b = 0; b < problem.batch; ++b, z += ld, delta += ld) {
    if (squared) {
      Vec sum{};
      for (int64_t j = 0; j < ld; j += kLanes) {
        store(delta + j, load(z + j));
        if (labels[b] >= j && labels[b] < j + kLanes) delta[labels[b]] -= 1.0f;
        const Vec error = j == tail ? only(load(delta + j), mask) : load(delta + j);
        sum += error * error;
        store(delta + j, error * scale);
      }
      total += add_lanes(sum);
      continue;
    }
    Vec top = mask ? load(z + tail) : splat(-INFINITY);
    for (int64_t j = 0; j < tail; j += kLanes) top = vmax(top, load(z + j));
    const float highest = max_lanes(top);
    Vec sum{};
    for (int64_t j = 0; j < ld; j += kLanes) {
      const Vec e = vexp(load(z + j) - highest), counted = j == tail ? only(e, mask) : e;
      store(delta + j, counted);
      sum += counted;
    }
    const float mass = add_lanes(sum), factor = scale / mass;
    for (int64_t j = 0; j < ld; j += kLanes) store(delta + j, load(delta + j) * factor);
    delta[labels[b]] -= scale;
    total += highest - z[labels[b]];
    masses[b % kLanes] = mass;  // their logarithms are taken together
    if (b % kLanes == kLanes - 1 || b + 1 == problem.batch)
      total += add_lanes(only(vlog(masses), first_lanes(b % kLanes + 1)));
  }
  return static_cast<float>(squared ? total * 0.5 * scale : total * scale);
}

// The same of a reconstruction of x; `columns` holds channels x side numbers.
static float reconstruction(const Problem& problem, const Choices& choice, const float* x, const float* z,
                            float* columns, float* delta) {
  const int64_t side = problem.side, pixels = problem.widths[0], ld = padded(pixels), width = problem.channels * side;
  const float scale = 1.0f / (problem.batch * width);
  double total = 0;
  for (int64_t b = 0; b < problem.batch; ++b, x += ld, z += ld, delta += ld) {
    std::fill(columns, columns + width, 0.0f);
    for (int64_t j = 0; j < ld; j += kLanes) {  // for now delta is the error, and slope its derivative by z
      const Vec raw = load(z + j);
      const Vec out = !choice.constrain ? raw : choice.center ? vtanh(raw) : vsigmoid(raw);
      store(delta + j, out - load(x + j));
    }
    for (int64_t k = 0; k < pixels; ++k) columns[k / (side * side) * side + k % side] += delta[k] * delta[k];
    for (int64_t k = 0; k < width; ++k) {
      const float mean = columns[k] / side;
      total += choice.log_loss ? std::log(mean + 1e-8f) : mean;
      columns[k] = scale * 2.0f / side * (choice.log_loss ? 1.0f / (mean + 1e-8f) : 1.0f);
    }
    for (int64_t k = 0; k < pixels; ++k) {
      const float out = delta[k] + x[k];
      const float slope = !choice.constrain ? 1.0f : choice.center ? 1.0f - out * out : out * (1.0f - out);
      delta[k] *= columns[k / (side * side) * side + k % side] * slope;
    }
    for (int64_t k = pixels; k < ld; ++k) delta[k] = 0.0f;
  }
  return static_cast<float>(total * scale);
}

// One layer: what the loss sees (times tau), and where its gradient goes; all rows are padded.
struct Layer {
  const float *w, *b;  // (inputs, outputs), (outputs)
  const float* back;  // w transposed, where it is at hand
  float *dw, *db;  // dw (outputs, inputs) where `back` is at hand
};

// The loss of a batch, and its gradient.
static float loss_and_gradient(const Problem& problem, const Choices& choice, const Batch& batch,
                               const std::vector<Layer>& net, Workspace& work) {
  const int64_t layers = problem.layers, n = problem.batch;
  const int64_t* widths = problem.widths;
  float* x = batch.x;
  if (problem.loss == kReconstruction && choice.center) {
    x = work.centered;
    for (int64_t k = 0; k < n * padded(widths[0]); k += kLanes) store(x + k, 2.0f * load(batch.x + k) - 1.0f);
  }
  work.hidden[0] = x;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t in = padded(widths[l]), out = padded(widths[l + 1]);
    float* z = work.hidden[l + 1];
    product({work.hidden[l], in, 1}, net[l].w, out, net[l].b, z, out, n, out, widths[l]);
    if (l + 1 == layers) break;
    activate_all(choice.activation, z, work.slope[l + 1], n * out);
  }
  float* delta = work.delta[layers];
  const float loss = problem.loss == kReconstruction
      ? reconstruction(problem, choice, x, work.hidden[layers], work.columns, delta)
      : classification(problem, batch.labels, work.hidden[layers], delta);
  for (int64_t l = layers; l-- > 0;) {
    const int64_t in = padded(widths[l]), out = padded(widths[l + 1]);
    delta = work.delta[l + 1];
    if (net[l].back) product({delta, 1, out}, work.hidden[l], in, nullptr, net[l].dw, in, widths[l + 1], in, n);
    else product({work.hidden[l], 1, in}, delta, out, nullptr, net[l].dw, out, widths[l], out, n);
    for (int64_t j = 0; j < out; j += kLanes) {
      Vec sum{}, other{};
      int64_t b = 0;
      for (; b + 2 <= n; b += 2) sum += load(delta + b * out + j), other += load(delta + (b + 1) * out + j);
      if (b < n) sum += load(delta + b * out + j);
      store(net[l].db + j, sum + other);
    }
    if (l == 0) break;
    float* before = work.delta[l];
    if (!net[l].back) transpose(net[l].w, out, widths[l], widths[l + 1], work.transposed);
    product({delta, out, 1}, net[l].back ? net[l].back : work.transposed, in, nullptr, before, in, n, in, widths[l + 1]);
    for (int64_t k = 0; k < n * in; k += kLanes) store(before + k, load(before + k) * load(work.slope[l] + k));
  }
  return loss;
}
