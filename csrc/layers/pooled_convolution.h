// Which convolutions are one node with the max pool behind them (pooled_convolution.cpp).
#pragma once

#include "layers/node.h"

namespace infl {

// By counted cycles of the CPU's kernels.
template <class T>
bool pools_convolution(const Node& convolution, const Node& pool);

}  // namespace infl
