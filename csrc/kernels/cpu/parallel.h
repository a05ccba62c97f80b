// How kernels share a loop between threads.
#pragma once

#include <omp.h>

#include "common/context.h"
#include "common/parallel.h"
#include "kernels/cpu/simd.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which one thread does it alone: starting others would take longer

inline int threads_for(const Context& ctx, int64_t elements) { return elements < kGrain ? 1 : ctx.num_threads; }

enum class Shares { equal, on_demand };

// body(i) for all i < count. For loops that call what may throw: kernels that allocate, buffers that grow. Others are plain OpenMP loops.
template <Shares shares = Shares::equal, class Body>
inline __attribute__((always_inline)) void parallel_for(int threads, int64_t count, const Body& body) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  RegionErrors errors;
  const auto guarded = [&](int64_t i) {
    try {
      body(i);
    } catch (...) {
      errors.keep();
    }
  };
  if constexpr (shares == Shares::on_demand) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) guarded(i);
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) guarded(i);
  }
  errors.rethrow();
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
