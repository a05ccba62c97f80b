// Product and roots of the softmax shape by one reduction a line (row_reduction.h): u and p are read once and u written once where a line stays in
// registers or in the shared memory of a cluster, so 12 bytes and about 20 operations an element. p is shared by all right-hand sides: lines that
// differ in v alone are neighbours, so it comes from L2 after the first. Passes over memory of a line of K classes, in units of K numbers:
//
//               sm_90, up to 232,000 classes of float    sm_80, up to 50,257 (the rest from L2)    classes before each of several positions
//     V = 1     3                                        3 (and 1.2 from L2)                       5 (p and u twice, u written)
//     V = 8     17                                       17 (and 9.4 from L2)                      26
//
// Of float64 half as many classes. What is longer is read again beyond these numbers; positions beside each other, a column each, are read twice,
// from the caches where the columns of a block fit.
#include "kernels/output_hessian.h"

#include "kernels/cuda/row_reduction.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

// Sums leave out the most probable class m of the elements so far: next to p_m ≈ 1 the others would lose their digits. The Hessian does not see a
// constant added to x, so x_m counts as zero, and 1 − p_m is the sum of the others.
template <class T>
struct SoftmaxState {
  T top = 0, at_top = 0;  // p_m, x_m
  T rest = 0;             // Σ p_c, c ≠ m
  T dot = 0;              // Σ p_c (x_c − x_m), or of the root Σ √p_c x_c, c ≠ m
  int m = INT_MAX;
  int unused = 0;  // no padding is copied
};

template <class T>
struct SoftmaxLine {
  using State = SoftmaxState<T>;
  struct Item {
    T p, x;
  };
  HessianPart part;
  int64_t step;
  T weight;
  const T* p;
  T* x;

  __device__ Item load(int64_t c) const { return {p[c * step], x[c * step]}; }

  // What merge does with the state of this element alone.
  __device__ void add(State& state, const Item& item, int64_t c) const {
    if (state.m != INT_MAX && item.p < state.top) {
      state.dot += part == HessianPart::root ? std::sqrt(item.p) * item.x : item.p * (item.x - state.at_top);
      state.rest += item.p;
      return;
    }
    State one;
    one.top = item.p;
    one.at_top = item.x;
    one.m = static_cast<int>(c);
    merge(state, one);
  }

  __device__ void merge(State& state, const State& other) const {
    merge_into_larger(state, other, [this](State& a, const State& b) {
      a.dot += b.dot + (part == HessianPart::root ? std::sqrt(b.top) * b.at_top : (b.rest + b.top) * (b.at_top - a.at_top));
      a.rest += b.rest + b.top;
    });
  }

  __device__ void store(int64_t c, const Item& item, const State& state) const {
    T value;
    if (part == HessianPart::product) {
      value = item.p * ((item.x - state.at_top) - state.dot);
    } else if (part == HessianPart::root_transposed) {
      value = std::sqrt(item.p) * ((item.x - state.at_top) - state.dot);
    } else {
      const T top = std::sqrt(state.top) * state.at_top;
      value = c == state.m ? top * state.rest - state.top * state.dot : std::sqrt(item.p) * item.x - item.p * (state.dot + top);
    }
    x[c * step] = weight * value;
  }

  __device__ void finish(const State&) const {}
};

template <class T>
__device__ T weight_of(const OutputHessian<T>& h, HessianPart part, int64_t place) {
  const T weight = h.scale * (h.weights ? h.weights[place] : T(1));
  return part == HessianPart::product ? weight : std::sqrt(weight);
}

template <class T>
struct SoftmaxHessian {
  using State = SoftmaxState<T>;
  using Item = typename SoftmaxLine<T>::Item;
  static constexpr bool kStores = true;
  OutputHessian<T> h;
  HessianPart part;
  int64_t V, n;
  T* u;
  __device__ SoftmaxLine<T> at(int64_t row, int64_t position) const {
    const int64_t i = row / V, v = row - i * V;
    return {part, h.positions, weight_of(h, part, i * h.positions + position), h.state + i * h.C + position, u + (v * n + i) * h.C + position};
  }
};

// Elements i of [n, C]: scaled identity or diagonal.
template <class T>
struct Diagonal {
  OutputHessian<T> h;
  HessianPart part;
  int64_t V, n;
  T* u;
  template <int W>
  __device__ void run(int64_t i) const {
    const T weight = weight_of(h, part, i / h.C);
    Vector<T, W> factor;
    if (h.shape == HessianShape::diagonal) factor = load<W>(h.state + i);
    for (int k = 0; k < W; ++k) {
      if (h.shape != HessianShape::diagonal) {
        factor.v[k] = weight;
      } else {
        factor.v[k] = weight * (part == HessianPart::product ? factor.v[k] : std::sqrt(factor.v[k]));
      }
    }
    write_sides<W>(V, u + i, n * h.C, [&](int64_t v) {
      auto x = load<W>(u + v * n * h.C + i);
      for (int k = 0; k < W; ++k) x.v[k] *= factor.v[k];
      return x;
    });
  }
};

template <class T>
void output_hessian(const Context& ctx, const OutputHessian<T>& h, HessianPart part, int64_t V, int64_t n, T* u) {
  if (V == 0 || n == 0) return;
  if (h.classes_innermost) return output_hessian(ctx, h.by_position(), part, V, n * h.positions, u);
  if (h.shape == HessianShape::softmax) {
    if (h.C / h.positions >= INT_MAX) {
      throw std::invalid_argument("output_hessian: expected fewer than 2^31 classes, got " + std::to_string(h.C / h.positions) + ".");
    }
    return reduce_rows(ctx, "output_hessian", V * n, h.C / h.positions, h.positions, SoftmaxHessian<T>{h, part, V, n, u});
  }
  const bool vectorised = h.C % kVectorWidth<T> == 0 && is_aligned({u, h.state});
  for_each<T>(ctx, "output_hessian", n * h.C, vectorised, Diagonal<T>{h, part, V, n, u});
}

INFL_REGISTER_CUDA(output_hessian_stub, output_hessian)

}  // namespace
}  // namespace cuda
}  // namespace infl
