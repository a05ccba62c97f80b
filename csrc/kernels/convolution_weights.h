// convolution_weights: the third direction of convolution.h, the gradient by the kernel. Deterministic.
#pragma once

#include "kernels/convolution.h"

namespace infl {

// out[v, i / images] += the kernel's gradient from x[v, i] and y[v, i], i < n; x and y [V or 1, n, ...] (batch stride 0: shared); out[v] rows
// out_batch apart, blocks of `images` examples out_example apart (n a multiple of images). A prepared x is shared, its
// images `prepared` apart (0: x as it is).
template <class T>
inline KernelStub<void(const Context&, const Convolution&, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
                       int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example)>
    convolution_weights_stub{"convolution_weights"};

}  // namespace infl
