// One particle's state while its window is computed: padded copies that stay in the core's cache. Part of window.inc.h.

// A matrix (rows, cols), or a vector, which has one row and no factored moment. Rows are padded to whole vectors, with
// zeros but in the rule's columns. A matrix lies transposed where that takes less padding: its rows are then the
// layer's outputs.
struct Tensor {
  int64_t rows, cols, ld;
  bool factored, by_adam;  // by_adam: one of Celo2's vectors, which has one momentum and no full second moment
  bool transposed, row_is_outer;  // whether Adafactor's "row", which lacks the larger axis, is `outer`
  float *p, *g, *m[kDecays], *v;
  float *outer[kDecays], *inner[kDecays];  // rows each, cols each; of a vector: inner is its full second moment
  float *scaled, *straight;  // what the loss sees: p times tau, and that as the layer has it (inputs, padded outputs)

  int64_t size() const { return rows * ld; }
};

struct Particle {
  std::vector<Tensor> tensors;
  int64_t iteration, num_steps, loss_count;
  float loss_decays[10], loss_means[10], loss_min[10];
  std::vector<float> lstm_hidden, lstm_cell;
  Choices choices;
};

// Memory for a thread, zeroed, cut into pieces on cache lines that do not all map to the same set.
class Arena {
 public:
  float* floats(int64_t count) {
    const int64_t bytes = (count + 16) * sizeof(float) + 64;
    blocks_.emplace_back(bytes / sizeof(float) + 16, 0.0f);
    const uintptr_t at = (reinterpret_cast<uintptr_t>(blocks_.back().data()) + 63) / 64 * 64;
    return reinterpret_cast<float*>(at);
  }

 private:
  std::vector<std::vector<float>> blocks_;
};

static Particle new_particle(const Problem& problem, const Rule& rule, Arena& arena) {
  Particle particle{};
  for (int64_t l = 0; l < problem.layers; ++l)
    for (bool matrix : {true, false}) {
      Tensor t{};
      const int64_t in = matrix ? problem.widths[l] : 1, out = problem.widths[l + 1];
      t.factored = matrix;
      t.by_adam = !matrix && rule.kind == kCelo2 && rule.orthogonalize;
      t.transposed = matrix && in * padded(out) > out * padded(in);
      t.row_is_outer = (out >= in) != t.transposed;  // of equal axes the second counts as the larger
      t.rows = t.transposed ? out : in, t.cols = t.transposed ? in : out, t.ld = padded(t.cols);
      for (float** leaf : {&t.p, &t.g, &t.m[0], &t.m[1], &t.m[2], &t.v, &t.scaled}) *leaf = arena.floats(t.size());
      t.straight = arena.floats(t.transposed ? in * padded(out) : 0);
      for (int k = 0; k < kDecays; ++k) {
        if (t.factored) t.outer[k] = arena.floats(padded(t.rows));
        t.inner[k] = arena.floats(t.ld);
      }
      particle.tensors.push_back(t);
    }
  const int64_t copies = rule.kind == kVelo ? 2 * problem.layers : rule.kind == kCeloSchedule ? 1 : 0;
  particle.lstm_hidden.resize(copies * rule.lstm_size);
  particle.lstm_cell.resize(copies * rule.lstm_size);
  return particle;
}

// Calls move(packed, step, stored, count) for every run of numbers of row r that lies in one piece where it is stored.
template <class Move>
static void for_each_run(Particle& particle, const Rule& rule, const Rows& rows, int64_t r, Move move) {
  for (size_t k = 0; k < particle.tensors.size(); ++k) {
    Tensor& t = particle.tensors[k];
    const int64_t n = t.rows * t.cols, lines = t.transposed ? t.cols : t.rows, length = n / lines;
    const int64_t step = t.transposed ? t.ld : 1, line = t.transposed ? 1 : t.ld;
    const int momenta = t.by_adam ? 1 : kDecays;
    for (int64_t i = 0; i < lines; ++i) {
      move(t.p + i * line, step, rows.p[k] + r * n + i * length, length);
      move(t.v + i * line, step, rows.v[k] + r * n + i * length, length);
      for (int d = 0; d < momenta; ++d)
        move(t.m[d] + i * line, step, rows.m[k] + (r * momenta + d) * n + i * length, length);
    }
    float* const* outer = t.transposed ? rows.inner : rows.outer;
    float* const* inner = t.transposed ? rows.outer : rows.inner;
    for (int d = 0; d < kDecays && !t.by_adam; ++d) {
      if (t.factored) move(t.outer[d], 1, outer[k] + (r * kDecays + d) * t.rows, t.rows);
      move(t.inner[d], 1, inner[k] + (r * kDecays + d) * t.cols, t.cols);
    }
  }
  const int64_t size = rule.lstm_size;
  for (size_t k = 0; k * size < particle.lstm_hidden.size(); ++k) {
    move(particle.lstm_hidden.data() + k * size, 1, rows.lstm_hidden[k] + r * size, size);
    move(particle.lstm_cell.data() + k * size, 1, rows.lstm_cell[k] + r * size, size);
  }
  if (!rows.loss_means) return;
  move(particle.loss_decays, 1, rows.loss_decays + r * 10, 10);
  move(particle.loss_means, 1, rows.loss_means + r * 10, 10);
  move(particle.loss_min, 1, rows.loss_min + r * 10, 10);
}

static void read_particle(const Window& window, const Rows& rows, int64_t r, Particle& particle) {
  for_each_run(particle, window.rule, rows, r, [](float* packed, int64_t step, const float* stored, int64_t count) {
    if (step == 1) std::memcpy(packed, stored, sizeof(float) * count);
    else for (int64_t k = 0; k < count; ++k) packed[k * step] = stored[k];
  });
  particle.iteration = rows.iteration ? rows.iteration[r] : 0;
  particle.num_steps = rows.num_steps ? rows.num_steps[r] : 0;
  particle.loss_count = rows.loss_count ? rows.loss_count[r] : 0;
  const Problem& problem = window.problem;
  particle.choices = {rows.activation ? rows.activation[r] : problem.activation,
                      rows.center ? rows.center[r] != 0 : problem.center != 0,
                      rows.constrain ? rows.constrain[r] != 0 : problem.constrain != 0,
                      rows.log_loss ? rows.log_loss[r] != 0 : problem.log_loss != 0, rows.tau ? rows.tau[r] : 1.0f};
}

static void write_particle(const Window& window, const Rows& rows, int64_t r, Particle& particle) {
  for_each_run(particle, window.rule, rows, r, [](const float* packed, int64_t step, float* stored, int64_t count) {
    if (step == 1) std::memcpy(stored, packed, sizeof(float) * count);
    else for (int64_t k = 0; k < count; ++k) stored[k] = packed[k * step];
  });
  if (rows.iteration) rows.iteration[r] = particle.iteration;
  if (rows.num_steps) rows.num_steps[r] = particle.num_steps;
  if (rows.loss_count) rows.loss_count[r] = particle.loss_count;
}
