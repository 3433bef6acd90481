// The update rule's kernels, written once in vectors of kLanes floats and compiled per instruction set.
//
// Included by rules_portable.cpp, rules_avx2.cpp and rules_avx512.cpp inside their namespace, after kLanes and Vec are
// set. The reference is lopt/per_parameter.py; formulas are explained there and in accumulators.py and features.py.
//
// Work is cut into items: up to kRows runs of one slot, kSegment elements each. What depends on the run only (outer) or
// on the place in the run only (inner) is multiplied with the first layer once per item, not once per element.

#define PACELINE_INLINE __attribute__((always_inline))

constexpr int kBlock = 2 * kLanes;      // elements per inner loop: two vectors share every broadcast weight
constexpr int64_t kSegment = 4096;      // elements of a run per item; hidden x kSegment floats stay in the L2 cache
constexpr int64_t kRows = 32;           // runs per item
constexpr int64_t kGroup = 1 << 19;     // elements of a group of slots: 12 MB, to stay in the last cache
constexpr float kNormalizerEps = 1e-5f;

#include "vectors.inc.h"
#include "columns.inc.h"
#include "statistics.inc.h"
#include "network.inc.h"

// All phases, a group of slots at a time, so that later phases find in the cache what earlier ones read. More threads
// take larger groups, since they are started once per phase.
static void update(const Rule& rule, Slot* slots, int64_t count, int32_t threads) {
  for (int64_t first = 0, last = 0; first < count; first = last) {
    for (int64_t n = 0; last < count && n < kGroup * threads; ++last)
      n += slots[last].a * slots[last].i * run_length(slots[last]);
    for (Phase phase : {kAxisSums, kFactors, kColumnSums, kApply})
      run(rule, phase, slots + first, last - first, threads);
  }
}

void run(const Rule& rule, Phase phase, Slot* slots, int64_t count, int32_t threads) {
  switch (phase) {
    case kUpdate: return update(rule, slots, count, threads);
    case kAxisSums: return axis_sums(rule, slots, count, threads);
    case kFactors: return for_each(count, threads, [&](int64_t t) { factors(rule, slots[t]); });
    case kColumnSums: return column_sums(rule, slots, count, threads);
    case kApply: return apply(rule, slots, count, threads);
    case kTensorMoments: return tensor_moments(slots, count, threads);
  }
}
