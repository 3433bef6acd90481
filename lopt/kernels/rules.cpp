// The entry point: runs the build for the processor it finds itself on.
#include "rules.h"

#include "builds.h"

namespace {

#if defined(__x86_64__)
paceline::Builds<paceline::Run> builds{paceline::avx512::run, paceline::avx2::run, paceline::portable::run};
#else
paceline::Builds<paceline::Run> builds{nullptr, nullptr, paceline::portable::run};
#endif

}  // namespace

extern "C" {

const char* paceline_rules_build() { return builds.name(); }

int32_t paceline_rules_use(const char* name) { return builds.use(name); }

int64_t paceline_slot_size() { return sizeof(paceline::Slot); }

void paceline_rules_run(const paceline::Rule* rule, int32_t phase, paceline::Slot* slots, int64_t count,
                        int32_t threads) {
  builds.run()(*rule, static_cast<paceline::Phase>(phase), slots, count, threads);
}
}
