// One pass over a row of outputs: gradient and Hessian are written as they are found, value and divergence are sums over the row (row_reduction.h).
// Bytes: z, target and weight once, each result once.
#include "kernels/elementwise_loss.h"

#include "kernels/cuda/row_reduction.h"

namespace infl {
namespace cuda {
namespace {

template <class T>
struct LossSums {
  T value = 0, divergence = 0;
};

template <class Formula, class T>
struct RowLine {
  using State = LossSums<T>;
  struct Item {
    T z, target, weight, z_s;
  };
  ElementwiseLoss<T> l;
  int64_t n;

  __device__ Item load(int64_t c) const {
    const int64_t i = n * l.C + c;
    return {l.z[i], l.target[i], l.weight ? l.s * l.weight[n * l.weight_stride + c] : l.s, l.z_s ? l.z_s[i] : T(0)};
  }

  // What each element has of its own is written here, not in a second pass.
  __device__ void add(State& state, const Item& item, int64_t c) const {
    const bool counts = item.weight != T(0);  // else nothing, also where the loss itself is infinite
    const int64_t i = n * l.C + c;
    if (l.gradient) l.gradient[i] = counts ? item.weight * Formula::gradient(item.z, item.target, l.a) : T(0);
    if (l.hessian) l.hessian[i] = counts ? item.weight * Formula::hessian(item.z, item.target, l.a) : T(0);
    if (!counts) return;
    if (l.value) state.value += item.weight * Formula::value(item.z, item.target, l.a);
    if (l.bregman) state.divergence += item.weight * Formula::bregman(item.z, item.z_s, item.target, l.a);
  }

  __device__ void merge(State& state, const State& other) const {
    state.value += other.value;
    state.divergence += other.divergence;
  }

  __device__ void store(int64_t, const Item&, const State&) const {}

  __device__ void finish(const State& state) const {
    if (l.value) l.value[n] = state.value;
    if (l.bregman) l.bregman[n] = state.divergence;
  }
};

template <class Formula, class T>
struct Rows {
  using State = LossSums<T>;
  using Item = typename RowLine<Formula, T>::Item;
  static constexpr bool kStores = false;
  ElementwiseLoss<T> l;
  __device__ RowLine<Formula, T> at(int64_t n, int64_t) const { return {l, n}; }
};

template <class Formula, class T>
void rows(const Context& ctx, const ElementwiseLoss<T>& l) {
  reduce_rows(ctx, "elementwise_loss", l.N, l.C, 1, Rows<Formula, T>{l});
}

template <class T>
void elementwise_loss(const Context& ctx, ElementwiseFormula formula, const ElementwiseLoss<T>& l) {
  with_formula(formula, [&](auto one) { rows<decltype(one)>(ctx, l); });
}

INFL_REGISTER_CUDA(elementwise_loss_stub, elementwise_loss)

}  // namespace
}  // namespace cuda
}  // namespace infl
