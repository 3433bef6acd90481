// The entry point: runs the build for the processor it finds itself on.
#include "window.h"

#include "../../lopt/kernels/builds.h"

namespace {

#if defined(__x86_64__)
paceline::Builds<paceline::Run> builds{paceline::avx512::run_window, paceline::avx2::run_window,
                                       paceline::portable::run_window};
#else
paceline::Builds<paceline::Run> builds{nullptr, nullptr, paceline::portable::run_window};
#endif

}  // namespace

extern "C" {

const char* paceline_window_build() { return builds.name(); }

int32_t paceline_window_use(const char* name) { return builds.use(name); }

int64_t paceline_window_size() { return sizeof(paceline::Window); }

void paceline_window_run(const paceline::Window* window, int64_t threads) { builds.run()(*window, threads); }
}
