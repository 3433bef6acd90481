// A window of inner steps of all particles, written once in vectors of kLanes floats, compiled per instruction set.
//
// Included by window_portable.cpp, window_avx2.cpp and window_avx512.cpp inside their namespace, after kLanes, Vec and
// kRegisters are set. Both sides of a pair take each step one after the other, so that they share the batch; all that
// they work on stays in the core's second cache for the whole window. Pairs are independent, so results do not depend
// on the number of threads.

#include "../../lopt/kernels/vectors.inc.h"
#include "functions.inc.h"
#include "matmul.inc.h"
#include "batch.inc.h"
#include "model.inc.h"
#include "particle.inc.h"
#include "statistics.inc.h"
#include "rule.inc.h"
#include "schedule.inc.h"
#include "celo2.inc.h"

// All that one thread needs: two particles, their batch, and what their steps are computed in.
class Bench {
 public:
  explicit Bench(const Window& window) : window_(window) {
    const Problem& problem = window.problem;
    const Rule& rule = window.rule;
    const int64_t T = 2 * problem.layers, n = problem.batch;
    const int64_t widest = padded(*std::max_element(problem.widths, problem.widths + problem.layers + 1));
    for (Particle& side : sides_) side = new_particle(problem, rule, arena_);
    batch_ = {arena_.floats(n * padded(problem.widths[0])), std::vector<int64_t>(n), std::vector<int64_t>(n), {}};
    work_.hidden.push_back(nullptr), work_.slope.push_back(nullptr), work_.delta.push_back(nullptr);
    for (int64_t l = 1; l <= problem.layers; ++l)
      for (auto* buffers : {&work_.hidden, &work_.slope, &work_.delta})
        buffers->push_back(arena_.floats(n * padded(problem.widths[l])));
    work_.centered = arena_.floats(n * padded(problem.widths[0]));
    work_.transposed = arena_.floats(widest * widest);
    work_.columns = arena_.floats(widest);
    for (int k = 0; k < kDecays; ++k)
      for (float** leaf : {&factors_.outer[k], &factors_.inner[k], &factors_.outer_square[k], &factors_.inner_square[k]})
        *leaf = arena_.floats(widest);
    factors_.outer_sum = arena_.floats(widest), factors_.inner_sum = arena_.floats(widest);
    mask_.resize(widest);
    factors_.mask = mask_.data();
    const int64_t U = rule.hidden <= 4 ? 4 : (rule.hidden + kUnits - 1) / kUnits * kUnits;
    folded_ = {U, arena_.floats(24 * U), arena_.floats(6 * U), arena_.floats(6 * U), arena_.floats(U),
               arena_.floats(U * U), arena_.floats(U), arena_.floats(2 * U), arena_.floats(2),
               arena_.floats(U * widest), arena_.floats(U * widest)};
    hidden_ = arena_.floats(2 * U * kLanes);
    const int64_t H = rule.lstm_size, inner = rule.hidden * (rule.hidden + 32 + rule.outputs) + rule.hidden + 3;
    memory_ = {arena_.floats(T * kInputs), arena_.floats(T * 2 * H), arena_.floats(T * 4 * H + H + kLanes),
               arena_.floats(T), arena_.floats(T * rule.bank_size), arena_.floats(rule.hidden),
               arena_.floats(rule.kind == kVelo ? T * inner : 0), arena_.floats(30 * rule.hidden)};
    if (rule.kind == kCelo2)
      for (float** buffer : {&square_.x, &square_.across, &square_.gram, &square_.polynomial})
        *buffer = arena_.floats(widest * widest);
    networks_.resize(T);
    net_.resize(problem.layers);
  }

  // The whole window of one pair.
  void run(int64_t task) {
    const int64_t rows[2] = {task, window_.tasks + task};
    int64_t next = next_start(task, 0);
    if (next == window_.num_starts || window_.starts[next].step > 0)
      for (int side = 0; side < 2; ++side) read_particle(window_, window_.particles, rows[side], sides_[side]);
    draw(window_.problem, key_of(task, 0), batch_);
    for (int64_t step = 0; step < window_.steps; ++step) {
      if (next < window_.num_starts && window_.starts[next].step == step) {
        for (int side = 0; side < 2; ++side)
          read_particle(window_, window_.fresh, next + side * window_.num_starts, sides_[side]);
        next = next_start(task, next + 1);
      }
      fetch(window_.problem, key_of(task, step), batch_);
      if (step + 1 < window_.steps) draw(window_.problem, key_of(task, step + 1), batch_);
      for (int side = 0; side < 2; ++side)
        window_.losses[step * 2 * window_.tasks + rows[side]] = inner_step(sides_[side], rows[side]);
    }
    for (int side = 0; side < 2; ++side) write_particle(window_, window_.particles, rows[side], sides_[side]);
  }

 private:
  uint64_t key_of(int64_t task, int64_t step) const {
    return fold_in(fold_in(window_.batches[task], window_.step_tags[step]), window_.problem.examples_tag);
  }

  int64_t next_start(int64_t task, int64_t from) const {
    while (from < window_.num_starts && window_.starts[from].task != task) ++from;
    return from;
  }

  // One step of particle r; returns its loss before the update.
  float inner_step(Particle& s, int64_t r) {
    const Rule& rule = window_.rule;
    const float tau = s.choices.tau;
    for (size_t l = 0; l < net_.size(); ++l) {
      Tensor &w = s.tensors[2 * l], &b = s.tensors[2 * l + 1];
      const float* lying = scaled(w, tau);
      if (w.transposed) transpose(lying, w.ld, w.rows, w.cols, w.straight);
      net_[l] = {w.transposed ? w.straight : lying, scaled(b, tau), w.transposed ? lying : nullptr, w.g, b.g};
    }
    const float loss = loss_and_gradient(window_.problem, s.choices, batch_, net_, work_);
    choose_networks(rule, r, loss, s, memory_, networks_.data());
    Decay d;
    for (int k = 0; k < kDecays; ++k) {
      d.m[k] = 1.0f - entry(rule, kMomentumDecay, r)[k];
      d.f[k] = 1.0f - unit(entry(rule, kAdafactorDecay, r)[k]);
    }
    d.v = 1.0f - unit(entry(rule, kRmsDecay, r)[0]);
    d.max_gradient = rule.max_gradient > 0 ? static_cast<float>(rule.max_gradient) : INFINITY;
    for (size_t t = 0; t < s.tensors.size(); ++t) update(d, networks_[t], s.tensors[t], tau);
    return loss;
  }

  static float unit(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

  static const float* scaled(Tensor& t, float tau) {
    if (tau == 1.0f) return t.p;
    for (int64_t k = 0; k < t.size(); k += kLanes) store(t.scaled + k, load(t.p + k) * tau);
    return t.scaled;
  }

  void update(const Decay& d, const Network& net, Tensor& t, float tau) {
    const Rule& rule = window_.rule;
    if (t.by_adam) return apply_adam(rule, t, tau);
    const auto with = [&](auto clip, auto factored) {
      update_tensor<clip.value, factored.value>(rule, d, net, t, tau, factors_, folded_, hidden_);
    };
    const std::true_type yes;
    const std::false_type no;
    if (rule.clipped_columns) t.factored ? with(yes, yes) : with(yes, no);
    else t.factored ? with(no, yes) : with(no, no);
    if (rule.kind == kCelo2) apply_directions(rule, t, square_);
  }

  const Window& window_;
  Arena arena_;
  Particle sides_[2];
  Batch batch_;
  Workspace work_;
  Factors factors_;
  Folded folded_;
  Memory memory_;
  Square square_;
  float* hidden_;
  std::vector<int32_t> mask_;
  std::vector<Network> networks_;
  std::vector<Layer> net_;
};

void run_window(const Window& window, int64_t threads) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Bench bench(window);
    for (int64_t task; (task = next++) < window.tasks;) bench.run(task);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min(threads, window.tasks); ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}
