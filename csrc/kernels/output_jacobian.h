// Products with the Jacobians B_n = ∂z_n/∂u_n [C, width] of the outputs by a value of the network, for V right-hand sides:
//
//   output_jacobian             t_z[v, n, c] += Σ_i B[n, c, i] t_u[v, n, i]
//   output_jacobian_transposed  g_u[v, n, i]  = Σ_c B[n, c, i] g_z[v, n, c]
//
// 4 · C · width · n bytes are read once for all V, and V · C · width · n multiplications made. Deterministic.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t n, int64_t C, int64_t width, const T* B, const T* t_u, T* t_z)> output_jacobian_stub{
    "output_jacobian"};

template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t n, int64_t C, int64_t width, const T* B, const T* g_z, T* g_u)>
    output_jacobian_transposed_stub{"output_jacobian_transposed"};

}  // namespace infl
