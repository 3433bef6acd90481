// The kernels for processors with AVX-512.
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
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,avx2")

namespace paceline::avx512 {
constexpr int kLanes = 16;
constexpr int kUnroll = 8;  // hidden units per register tile
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
static inline Vec vsqrt(Vec x) {
  return _mm512_sqrt_ps(x);
}
#include "rules.inc.h"
}  // namespace paceline::avx512
#pragma GCC pop_options
#endif
