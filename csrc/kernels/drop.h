// drop: what is left of a batch's losses and cotangents without the examples that do not count.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// total[s] = Σ value[s, n] over the kept examples of set s, and gradient[s, n, :] = 0 at the others; kept and value [S, N], gradient [S, N, C].
// What is dropped may be infinite or NaN. Sums are made in double, in a fixed order. Cost: one pass over values and the rows that are dropped.
template <class T>
inline KernelStub<void(const Context&, int64_t S, int64_t N, int64_t C, const bool* kept, const T* value, T* gradient, T* total)> drop_stub{"drop"};

}  // namespace infl
