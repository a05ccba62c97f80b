// The vectors of conjugate gradients: V recurrences side by side, whose scalars stay where the vectors are. Columns that are not running are left as
// they are. Inner products are added up in double, in an order that depends on P and, on a device, on whether vectors can be read 16 bytes at a time:
// whether all start at such addresses and P is a multiple of what 16 bytes hold.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "math/krylov.h"

namespace infl {

// p[v] = z[v] + β p[v], β from rᵀz, which is set (rz_next); arrays [V, P]. z absent: z = r, whose ‖r‖² is known (rr). p is zero before the first
// step.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t P, const T* r, const T* z, T* p, CgColumn* columns)> cg_direction_stub{"cg_direction"};

// x += α p, r −= α q with q = A p and α = rz_next / pᵀq, and each column's scalars and status after that step; arrays [V, P].
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t P, double lower, const T* p, const T* q, T* x, T* r, CgColumn* columns)> cg_step_stub{
    "cg_step"};

}  // namespace infl
