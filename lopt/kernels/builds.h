// The builds of a kernel for several instruction sets, and the one in use: at first the best that this processor runs.
#pragma once
#include <cstdint>
#include <cstring>

namespace paceline {

#if defined(__x86_64__)
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
inline bool has_avx512() { return false; }
inline bool has_avx2() { return false; }
#endif

template <class Run>
class Builds {
 public:
  // avx512 and avx2 are null where they cannot be built.
  Builds(Run avx512, Run avx2, Run portable)
      : builds_{{"avx512", avx512, has_avx512()}, {"avx2", avx2, has_avx2()}, {"portable", portable, true}} {
    while (!builds_[chosen_].supported) ++chosen_;
  }

  const char* name() const { return builds_[chosen_].name; }
  Run run() const { return builds_[chosen_].run; }

  // Uses the named build from now on; 0 where there is none or this processor cannot run it.
  int32_t use(const char* name) {
    for (int k = 0; k < 3; ++k)
      if (builds_[k].supported && std::strcmp(builds_[k].name, name) == 0) {
        chosen_ = k;
        return 1;
      }
    return 0;
  }

 private:
  struct Build {
    const char* name;
    Run run;
    bool supported;
  };
  Build builds_[3];
  int chosen_ = 0;
};

}  // namespace paceline
