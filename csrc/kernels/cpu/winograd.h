// The three directions of a convolution by Winograd's algorithm, for shapes with takes_winograd (kernels/winograd.h); arguments as those of
// the kernels that call them.
#pragma once

#include "kernels/convolution.h"
#include "kernels/cpu/simd.h"

namespace infl {
namespace INFL_ISA {

template <class T>
void winograd_pack(const Context& ctx, const Convolution& conv, bool up, int64_t num, const T* w, int64_t w_batch, T* packed);

int64_t winograd_prepared_size(const Convolution& conv);

template <class T>
void winograd_prepare(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t size, T* prepared);

// convolution_columns of images that are prepared.
template <class T>
void winograd_columns(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t prepared, T* columns);

// At least one of the terms is present.
template <class T>
void winograd_product(const Context& ctx, const Convolution& conv, const ConvolutionProduct<T>& p);

template <class T>
void winograd_weights(const Context& ctx, const Convolution& conv, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
                      int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example);

}  // namespace INFL_ISA
}  // namespace infl
