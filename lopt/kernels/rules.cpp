// The entry point: picks the kernels for the processor it runs on.
#include "rules.h"

#include <cstring>

namespace {

struct Build {
  const char* name;
  paceline::Run run;
  bool supported;
};

const Build builds[] = {
#if defined(__x86_64__)
    {"avx512", paceline::avx512::run,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw")},
    {"avx2", paceline::avx2::run, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
    {"portable", paceline::portable::run, true},
};

const Build* best() {
  const Build* build = builds;
  while (!build->supported) ++build;
  return build;
}

const Build* chosen = best();

}  // namespace

extern "C" {

const char* paceline_rules_build() { return chosen->name; }

// Uses the named build from now on; 0 where there is none or this processor cannot run it.
int32_t paceline_rules_use(const char* name) {
  for (const Build& build : builds)
    if (build.supported && std::strcmp(build.name, name) == 0) {
      chosen = &build;
      return 1;
    }
  return 0;
}

int64_t paceline_slot_size() { return sizeof(paceline::Slot); }

void paceline_rules_run(const paceline::Rule* rule, int32_t phase, paceline::Slot* slots, int64_t count,
                        int32_t threads) {
  chosen->run(*rule, static_cast<paceline::Phase>(phase), slots, count, threads);
}
}
