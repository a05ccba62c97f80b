// Pooling of planes [planes, D, H, W] over windows that are a product of one interval for each axis and output coordinate.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/macros.h"

namespace infl {

// Output coordinate o of axis a takes the inputs begin[a][o], begin[a][o] + dilation[a], ... below end[a][o], all within the input.
struct Windows {
  int64_t in[3], out[3], dilation[3];
  const int64_t *begin[3], *end[3];
  const int64_t* count[3];  // averages divide by the product of these; absent for maxima

  INFL_HD int64_t in_plane() const { return in[0] * in[1] * in[2]; }
  INFL_HD int64_t out_plane() const { return out[0] * out[1] * out[2]; }
};

// y[p, o] = the window's maximum, at place index[p, o] of the plane: the first of equals; NaN is larger than any number.
template <class T>
inline KernelStub<void(const Context&, const Windows&, int64_t planes, const T* x, T* y, T* index)> max_pool_stub{"max_pool"};

// out[v, p, o] = in[v, p, index[p, o]]; in [V, planes, in_plane], out [V, planes, out_plane].
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t planes, int64_t in_plane, int64_t out_plane, const T* index, const T* in, T* out)>
    plane_gather_stub{"plane_gather"};

// The transpose: out[v, p, index[p, o]] += in[v, p, o], from zero unless accumulate; in [V, planes, in_plane], out [V, planes, out_plane].
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t planes, int64_t in_plane, int64_t out_plane, const T* index, const T* in, T* out,
                       bool accumulate)>
    plane_scatter_stub{"plane_scatter"};

// y[p, o] = factor · Σ over the window of x / (count · count · count).
template <class T>
inline KernelStub<void(const Context&, const Windows&, int64_t planes, T factor, const T* x, T* y)> window_mean_stub{"window_mean"};

// The transpose: x[p, ·] from y [p, o], or added with accumulate.
template <class T>
inline KernelStub<void(const Context&, const Windows&, int64_t planes, T factor, const T* y, T* x, bool accumulate)> window_spread_stub{
    "window_spread"};

}  // namespace infl
