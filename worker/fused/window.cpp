// The entry point: picks the build for the processor it runs on.
#include "window.h"

#include <cstring>

namespace {

struct Build {
  const char* name;
  paceline::Run run;
  bool supported;
};

const Build builds[] = {
#if defined(__x86_64__)
    {"avx512", paceline::avx512::run_window,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw")},
    {"avx2", paceline::avx2::run_window, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
    {"portable", paceline::portable::run_window, true},
};

const Build* best() {
  const Build* build = builds;
  while (!build->supported) ++build;
  return build;
}

const Build* chosen = best();

}  // namespace

extern "C" {

const char* paceline_window_build() { return chosen->name; }

// Uses the named build from now on; 0 where there is none or this processor cannot run it.
int32_t paceline_window_use(const char* name) {
  for (const Build& build : builds)
    if (build.supported && std::strcmp(build.name, name) == 0) {
      chosen = &build;
      return 1;
    }
  return 0;
}

int64_t paceline_window_size() { return sizeof(paceline::Window); }

void paceline_window_run(const paceline::Window* window, int64_t threads) { chosen->run(*window, threads); }
}
