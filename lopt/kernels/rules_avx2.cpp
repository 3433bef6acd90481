// The kernels for processors with AVX2 and FMA.
#include "rules.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace paceline::avx2 {
constexpr int kLanes = 8;
constexpr int kUnroll = 4;  // hidden units per register tile
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
static inline Vec vsqrt(Vec x) {
  return _mm256_sqrt_ps(x);
}
#include "rules.inc.h"
}  // namespace paceline::avx2
#pragma GCC pop_options
#endif
