// GFLOP/s of fused multiply-adds on one core, the ceiling that benchmarks/apply.py relates its arithmetic to.
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));

int main() {
  constexpr int kChains = 12;
  constexpr long kRounds = 20000000;
  Vec a[kChains], b = Vec{} + 0.999f, c = Vec{} + 0.001f;
  for (int k = 0; k < kChains; ++k) a[k] = Vec{} + 0.01f * k;
  const auto start = std::chrono::steady_clock::now();
  for (long round = 0; round < kRounds; ++round) {
    for (int k = 0; k < kChains; ++k) a[k] = a[k] * b + c;
    asm volatile("" : : "x"(a[0]), "x"(a[1]));  // keeps the loop a loop
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  float sum = 0;
  for (int k = 0; k < kChains; ++k) sum += a[k][0];
  std::printf("%.1f\n", sum > 0 ? 2.0 * kRounds * kChains * kLanes / seconds / 1e9 : 0.0);
}
