// The kernels for any processor.
#include "rules.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace paceline::portable {
constexpr int kLanes = 4;
constexpr int kUnroll = 4;  // hidden units per register tile
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
static inline Vec vsqrt(Vec x) {
  Vec r;
  for (int l = 0; l < kLanes; ++l) r[l] = std::sqrt(x[l]);
  return r;
}
#include "rules.inc.h"
}  // namespace paceline::portable
