// The fused window for processors with AVX-512.
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
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,avx2,prefer-vector-width=512")

namespace paceline::avx512 {
constexpr int kLanes = 16, kRegisters = 32;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
static inline Vec vsqrt(Vec x) { return _mm512_sqrt_ps(x); }
static inline float add_lanes(Vec x) { return _mm512_reduce_add_ps(x); }
static inline float max_lanes(Vec x) { return _mm512_reduce_max_ps(x); }
#include "window.inc.h"
}  // namespace paceline::avx512
#pragma GCC pop_options
#endif
