// The plain C interface between lopt/kernels/__init__.py and the update rule's kernels.
//
// Owns the layout of a Slot: one tensor of one particle. Knows nothing of torch, so that one binary serves every
// version of it. All numbers are fp32 and contiguous; sums that cross blocks are double and added in a fixed order, so
// results do not depend on the number of threads.
//
// A tensor of shape s with two factored axes i < j is seen as (A, I, B, J, C). Adafactor's two accumulators are
// `outer`, which lacks j: (3, A, I, B, C), and `inner`, which lacks i: (3, A, B, J, C). Which of them is the "row" (the
// one averaged over the largest axis d0) is `row_is_outer`. A tensor with fewer than two axes is (1, 1, 1, n, 1), not
// factored, and `inner` is its full second moment.
#pragma once
#include <cstdint>

namespace paceline {

constexpr int kDecays = 3;    // momenta and Adafactor decays
constexpr int kSums = 33;    // doubles per slot in Slot::sums: sums of squares of the columns, then three counts

struct Slot {
  const float *p, *g, *m, *v, *outer, *inner;
  float *p_out, *m_out, *v_out, *outer_out, *inner_out;  // may be the inputs
  const float *w0, *b0, *w1, *b1, *w2, *b2;              // [inputs][hidden], [hidden], [hidden][hidden], ...
  const float *m_decay, *v_decay, *factored_decay;       // 3, 1, 3
  float* axis_sums;                                      // outer size + inner size: sums of g^2
  float* factors;                                        // 3 x outer size, 3 x inner size: preconditioners
  double* sums;                                          // kSums: sums of squares of every column
  int64_t a, i, b, j, c;
  int32_t factored, row_is_outer;
  float step, lr, weight_decay;  // p <- p - lr (step ... + weight_decay p)
  float reserved;
};

struct Rule {
  int32_t hidden, outputs;
  int32_t clipped_columns;   // 1: the 30 columns of VeLO and Celo; 0: the 28 of small_fc_lopt
  int32_t parameter_scaled;  // 1: the step is multiplied by rms(p)
  float max_gradient, diag_eps;
};

// One phase over all slots, or all phases of an update: the first four, in this order. kTensorMoments is VeLO's.
enum Phase : int32_t { kAxisSums = 0, kFactors = 1, kColumnSums = 2, kApply = 3, kTensorMoments = 4, kUpdate = 5 };

using Run = void (*)(const Rule&, Phase, Slot*, int64_t slots, int32_t threads);
namespace portable { void run(const Rule&, Phase, Slot*, int64_t, int32_t); }
namespace avx2 { void run(const Rule&, Phase, Slot*, int64_t, int32_t); }
namespace avx512 { void run(const Rule&, Phase, Slot*, int64_t, int32_t); }

}  // namespace paceline
