// What decides a tensor's network and step size: time, Celo's schedule, VeLO's hypernetwork. Part of window.inc.h.
//
// The reference is lopt/small_fc.py, celo.py, schedule.py, velo.py, recurrent.py and loss_features.py.

constexpr int kMeans = 10, kTimescales = 11, kFractions = 9, kInputs = 30;
constexpr float kTimes[kTimescales] = {1e0f, 3e0f, 1e1f, 3e1f, 1e2f, 3e2f, 1e3f, 3e3f, 1e4f, 3e4f, 1e5f};
constexpr float kPoints[kFractions] = {0.03f, 0.1f, 0.2f, 0.4f, 0.6f, 0.8f, 0.9f, 1.0f, 1.1f};

struct Memory {  // what a thread computes networks in
  float *inputs, *mixed, *gates, *step_size, *controls, *bias, *network, *zeros;
};

// y[k] = f(vectors of x at k), for n numbers that need no padding.
template <class F>
static inline void each(int64_t n, float* y, F f) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec value = f(k);
    std::memcpy(y + k, &value, sizeof(float) * std::min<int64_t>(kLanes, n - k));
  }
}

// tanh of n numbers in place.
static void tanh_all(float* x, int64_t n) {
  for (int64_t k = 0; k < n; k += kLanes) {
    Vec v{};
    const size_t bytes = sizeof(float) * std::min<int64_t>(kLanes, n - k);
    std::memcpy(&v, x + k, bytes);
    v = vtanh(v);
    std::memcpy(x + k, &v, bytes);
  }
}

static inline const float* entry(const Rule& rule, Entry k, int64_t r) { return rule.theta[k] + r * rule.strides[k]; }
static inline float lesser(float a, float b) { return a != a || a < b ? a : b; }  // a NaN stays

// small_fc_lopt: time features are part of the first bias.
static void time_bias(const Rule& rule, int64_t r, int64_t iteration, float* bias) {
  float times[kTimescales];
  for (int k = 0; k < kTimescales; ++k) times[k] = iteration / kTimes[k] - 1.0f;
  tanh_all(times, kTimescales);
  const float* w = entry(rule, kW0, r) + 28 * rule.hidden;
  for (int64_t h = 0; h < rule.hidden; ++h) bias[h] = entry(rule, kB0, r)[h];
  for (int k = 0; k < kTimescales; ++k)
    for (int64_t h = 0; h < rule.hidden; ++h) bias[h] += times[k] * w[k * rule.hidden + h];
}

// Takes in one loss; what the schedule sees of time and of all losses so far, 18 numbers.
static void time_and_losses(Particle& s, float loss, float* out) {
  for (int k = 0; k < kFractions; ++k) out[k] = (static_cast<float>(s.iteration) / s.num_steps - kPoints[k]) * 10.0f;
  tanh_all(out, kFractions);
  float unbias[kMeans], largest = -INFINITY;
  for (int k = 0; k < kMeans; ++k) {
    unbias[k] = 1.0f - std::pow(s.loss_decays[k], static_cast<float>(s.loss_count + 1));
    const float mean = s.loss_means[k] / unbias[k];
    if (mean > largest || mean != mean) largest = mean;
  }
  if (s.loss_count == 0) largest = loss;
  loss = lesser(2.0f * std::fabs(largest), loss);
  float means[kMeans];
  for (int k = 0; k < kMeans; ++k) {
    s.loss_means[k] = s.loss_means[k] * s.loss_decays[k] + loss * (1.0f - s.loss_decays[k]);
    means[k] = s.loss_means[k] / unbias[k];
    s.loss_min[k] = lesser(s.loss_min[k], means[k]);
  }
  ++s.loss_count;
  for (int k = 0; k + 1 < kMeans; ++k) {
    const float span = means[k + 1] - s.loss_min[k];
    const float position = (means[k] - s.loss_min[k]) / (span < 1e-8f ? 1e-8f : span) - 1.0f;
    out[kFractions + k] = s.loss_count <= 2 ? 0.0f : position < -1.0f ? -1.0f : position > 1.0f ? 1.0f : position;
  }
}

// One step of the LSTM: `rows` rows of `inputs` numbers each, in memory.inputs; leaves the step sizes.
static void advance(const Rule& rule, int64_t r, int64_t rows, int64_t inputs, Particle& s, Memory& memory) {
  const int64_t H = rule.lstm_size;
  float* x = memory.mixed;  // (rows, 2 H): the new input and the hidden state
  float* gates = memory.gates;
  linear(memory.inputs, rows, inputs, entry(rule, kMixW, r), entry(rule, kMixB, r), H, gates);
  float* top = gates + rows * H;
  for (int64_t j = 0; j < H; ++j) {
    top[j] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
      const float y = gates[i * H + j];
      if (y > top[j] || y != y) top[j] = y;
    }
  }
  float* from_inputs = top + H;
  linear(memory.inputs, rows, inputs, entry(rule, kInputW, r), entry(rule, kInputB, r), H, from_inputs);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < H; ++j) {
      x[i * 2 * H + j] = from_inputs[i * H + j] + top[j];
      x[i * 2 * H + H + j] = s.lstm_hidden[i * H + j];
    }
  linear(x, rows, 2 * H, entry(rule, kLstmW, r), entry(rule, kLstmB, r), 4 * H, gates);
  for (int64_t i = 0; i < rows; ++i) {
    const float* gate = gates + i * 4 * H;
    float *hidden = s.lstm_hidden.data() + i * H, *cell = s.lstm_cell.data() + i * H;
    each(H, cell, [&](int64_t k) {
      Vec old{};
      std::memcpy(&old, cell + k, sizeof(float) * std::min<int64_t>(kLanes, H - k));
      return vsigmoid(load(gate + 2 * H + k) + 1.0f) * old + vsigmoid(load(gate + k)) * vtanh(load(gate + H + k));
    });
    each(H, hidden, [&](int64_t k) {
      Vec now{};
      std::memcpy(&now, cell + k, sizeof(float) * std::min<int64_t>(kLanes, H - k));
      return vsigmoid(load(gate + 3 * H + k)) * vtanh(now);
    });
  }
  linear(s.lstm_hidden.data(), rows, H, entry(rule, kStepSizeW, r), entry(rule, kStepSizeB, r), 1, memory.step_size);
}

static inline float magnitude(float x) {
  const float y = std::log(std::fabs(10.0f * x) + 1e-8f);
  return 0.5f * (y < -5.0f ? -5.0f : y > 5.0f ? 5.0f : y);
}

// What VeLO's LSTM sees of a tensor and its accumulators before this step: 12 numbers.
static void tensor_inputs(const Rule& rule, const Tensor& t, float* out) {
  const float n = static_cast<float>(t.rows * t.cols);
  const float* moments[4] = {t.m[0], t.m[1], t.m[2], t.v};
  float mean[4], variance[4];
  Vec square{};
  for (int64_t k = 0; k < t.size(); k += kLanes) square += load(t.p + k) * load(t.p + k);
  for (int c = 0; c < 4; ++c) {
    Vec sum{};
    for (int64_t k = 0; k < t.size(); k += kLanes) sum += load(moments[c] + k);
    mean[c] = add_lanes(sum) / n;
    Vec spread_out{};
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.ld; j += kLanes) {
        const Vec x = only(load(moments[c] + i * t.ld + j) - mean[c], first_lanes(t.cols - j));
        spread_out += x * x;
      }
    variance[c] = add_lanes(spread_out) / n;
  }
  const float scale = safe_rsqrt1(add_lanes(square) / n);
  const int rank = (t.factored && t.rows > 1) + (t.cols > 1);
  out[0] = magnitude(mean[3] * scale);
  for (int k = 0; k < 5; ++k) out[1 + k] = rank == k;
  for (int k = 0; k < kDecays; ++k) {
    const float offset = rule.compat ? (mean[3] - mean[k]) * (mean[3] - mean[k]) : 0.0f;
    out[6 + k] = magnitude(variance[k] * (scale * scale));
    out[9 + k] = magnitude((variance[3] + offset) * (scale * scale));
  }
}

// VeLO: a network for every tensor, mixed out of the bank by its LSTM; networks[t] lie in memory.network.
static void mix_networks(const Rule& rule, int64_t r, float loss, Particle& s, Memory& memory, Network* networks) {
  constexpr Entry kBank[6] = {kW0, kB0, kW1, kB1, kW2, kB2};
  const int64_t H = rule.hidden, K = rule.bank_size, T = s.tensors.size();
  const int64_t sizes[6] = {30 * H, H, H * H, H, H * rule.outputs, rule.outputs};
  time_and_losses(s, loss, memory.inputs);
  for (int64_t t = 0; t < T; ++t) {
    if (t) std::memcpy(memory.inputs + t * kInputs, memory.inputs, sizeof(float) * 18);
    tensor_inputs(rule, s.tensors[t], memory.inputs + t * kInputs + 18);
  }
  advance(rule, r, T, kInputs, s, memory);
  linear(s.lstm_hidden.data(), T, rule.lstm_size, entry(rule, kControlsW, r), entry(rule, kControlsB, r), K,
         memory.controls);
  for (int64_t k = 0; k < T * K; ++k) memory.controls[k] *= 100.0f / K;
  float* mixed[6];
  float* to = memory.network;
  for (int e = 0; e < 6; ++e) {
    linear(memory.controls, T, K, entry(rule, kBank[e], r), memory.zeros, sizes[e], to);
    mixed[e] = to;
    to += T * sizes[e];
  }
  for (int64_t t = 0; t < T; ++t) {
    const auto leaf = [&](int e) { return mixed[e] + t * sizes[e]; };
    const float step = static_cast<float>(rule.step_mult) * memory.step_size[t];
    networks[t] = {leaf(0), leaf(1), leaf(2), leaf(3), leaf(4), leaf(5), step};
  }
}

// Every tensor's network at this step, and the state of whatever chose them moved on; `loss` is the step's.
static void choose_networks(const Rule& rule, int64_t r, float loss, Particle& s, Memory& memory, Network* networks) {
  if (rule.kind == kVelo) {
    mix_networks(rule, r, loss, s, memory, networks);
  } else {
    const float* b0 = entry(rule, kB0, r);
    float step = static_cast<float>(rule.step_mult);
    if (rule.kind == kSmallFc) {
      time_bias(rule, r, s.iteration, memory.bias);
      b0 = memory.bias;
    } else if (rule.kind == kCeloSchedule) {
      time_and_losses(s, loss, memory.inputs);
      advance(rule, r, 1, 2 * kFractions, s, memory);
      step *= std::exp(memory.step_size[0]) * 0.1f;
    }
    const Network net{entry(rule, kW0, r), b0, entry(rule, kW1, r), entry(rule, kB1, r), entry(rule, kW2, r),
                      entry(rule, kB2, r), step};
    std::fill(networks, networks + s.tensors.size(), net);
  }
  ++s.iteration;
}
