// The plain C interface between worker/fused/cpu.py and the kernels that compute whole windows of MLP tasks.
//
// Knows nothing of torch, so that one binary serves every version of it. All floating numbers are fp32. State is
// particle-major: particle r's part of a leaf starts r times the leaf's size behind its pointer. n tasks make 2n
// particles, r and n + r being the two sides of an antithetic pair, which share their batches.
#pragma once
#include <cstdint>

namespace paceline {

constexpr int kDecays = 3;  // momenta and Adafactor decays

enum LossKind : int32_t { kCrossEntropy, kSquaredError, kReconstruction };
enum RuleKind : int32_t { kSmallFc, kCelo, kCeloSchedule, kVelo, kCelo2 };

// The task: an MLP with `layers` layers of widths[0] ... widths[layers], and where its batches come from.
struct Problem {
  const int64_t* widths;
  int64_t layers, batch;
  int64_t loss, activation;  // LossKind; index into tasks' KINDS, where the particles have none of their own
  int64_t center, constrain, log_loss;  // of kReconstruction, where the particles have none of their own
  int64_t channels, side;  // widths[0] = channels side^2
  const void* images;  // (any, widths[0]) uint8 or fp32
  const int64_t *labels, *order;  // example k of the split is row order[first + k]
  int64_t bytes, first, examples, shift;
  double noise;
  uint64_t examples_tag, shift_tag, noise_tag;  // tasks.random.fold's
};

// Theta: entry k of particle r starts r strides[k] floats behind theta[k].
enum Entry { kW0, kB0, kW1, kB1, kW2, kB2, kMomentumDecay, kRmsDecay, kAdafactorDecay, kMixW, kMixB, kInputW, kInputB,
             kLstmW, kLstmB, kStepSizeW, kStepSizeB, kControlsW, kControlsB, kEntries };

struct Rule {
  int64_t kind, hidden, outputs;
  int64_t clipped_columns;  // 1: the 30 columns of VeLO and Celo; 0: the 28 of small_fc_lopt
  int64_t parameter_scaled;  // 1: the step is multiplied by rms(p)
  int64_t lstm_size, bank_size, compat, orthogonalize;
  double max_gradient, diag_eps, rsqrt_eps, normalizer_eps, step_mult;
  const float* theta[kEntries];
  int64_t strides[kEntries];
};

// State of particles. Tensors are w0, b0, w1, b1, ...; matrices have outer (3, rows) and inner (3, cols) accumulators,
// vectors the full second moment (3, n) in `inner`; those that Celo2 leaves to Adam have one m and no more. What a rule does not have is null, as are the dynamic fields.
struct Rows {
  float *const *p, *const *m, *const *v, *const *outer, *const *inner;
  float *const *lstm_hidden, *const *lstm_cell;  // one each, or one per tensor
  int64_t *iteration, *num_steps, *loss_count;
  float *loss_decays, *loss_means, *loss_min;
  const float* tau;
  const int64_t* activation;
  const uint8_t *center, *constrain, *log_loss;
};

// An episode that begins with inner step `step`, for `task`; its k-th row and its (starts + k)-th are in `fresh`.
struct Start {
  int64_t step, task;
};

struct Window {
  Problem problem;
  Rule rule;
  Rows particles, fresh;
  const Start* starts;  // by step
  const uint64_t *batches, *step_tags;  // one key for each task, folded with the tag of each step
  float* losses;  // (steps, 2 tasks)
  int64_t num_starts, tasks, steps;
};

using Run = void (*)(const Window&, int64_t threads);
namespace portable { void run_window(const Window&, int64_t threads); }
namespace avx2 { void run_window(const Window&, int64_t threads); }
namespace avx512 { void run_window(const Window&, int64_t threads); }

}  // namespace paceline
