// The fused window for any processor.
#include "window.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

namespace paceline::portable {
constexpr int kLanes = 4, kRegisters = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
static inline Vec vsqrt(Vec x) {
  Vec r;
  for (int l = 0; l < kLanes; ++l) r[l] = std::sqrt(x[l]);
  return r;
}
static inline float add_lanes(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
static inline float max_lanes(Vec x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
#include "window.inc.h"
}  // namespace paceline::portable
