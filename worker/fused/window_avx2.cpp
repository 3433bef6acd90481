// The fused window for processors with AVX2 and FMA.
#include "window.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace paceline::avx2 {
constexpr int kLanes = 8, kRegisters = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
static inline Vec vsqrt(Vec x) { return _mm256_sqrt_ps(x); }
static inline float add_lanes(Vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
static inline float max_lanes(Vec x) {
  float top = x[0];
  for (int l = 1; l < kLanes; ++l) top = x[l] > top ? x[l] : top;
  return top;
}
#include "window.inc.h"
}  // namespace paceline::avx2
#pragma GCC pop_options
#endif
