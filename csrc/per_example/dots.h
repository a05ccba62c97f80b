// Inner products of per-example gradients with vectors, by the gradients: a weight that T positions share costs T multiplications to form and W to
// multiply by W vectors, where the vectors' own way through the layer (Rule::jvp) takes T·W. Gradients are formed by parts that stay in a cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/context.h"
#include "per_example/factor.h"

namespace infl {

// Whether forming gradients of so many positions by V cotangents costs less than W tangents, by count.
inline bool forms_for_dots(const Context& ctx, int64_t positions, int64_t V, int64_t W) {
  constexpr int64_t kMoved = 4;  // what writing and reading an element costs, in multiplications
  return !ctx.on_device() && V * (positions + W + kMoved) < W * positions;
}

// Examples whose factors, of so many elements each, are taken together, of n.
template <class T>
int64_t examples_for_dots(int64_t factor_size, int64_t n) {
  constexpr int64_t kFactorBytes = 8 << 20;
  const int64_t most = kFactorBytes / (std::max<int64_t>(1, factor_size) * static_cast<int64_t>(sizeof(T)));
  return std::clamp<int64_t>(most, 1, std::max<int64_t>(1, n));
}

// out[w, i] += ⟨gradient of example i, u_w⟩ for W vectors u, `stride` apart, each standing at the factor's slot; out rows ldo apart. One cotangent.
template <class T>
void add_dots(const Context& ctx, const Factor<T>& factor, int64_t N, int64_t W, const T* u, int64_t stride, T* out, int64_t ldo);

extern template void add_dots<float>(const Context&, const Factor<float>&, int64_t, int64_t, const float*, int64_t, float*, int64_t);
extern template void add_dots<double>(const Context&, const Factor<double>&, int64_t, int64_t, const double*, int64_t, double*, int64_t);

}  // namespace infl
