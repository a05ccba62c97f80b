// One reduction over the classes of each place (row_reduction.h): maximum, sum of exponentials, target mass and value are found together, and nothing
// is stored beyond the results. Logits and targets are read once where a line of classes stays on the chip (on sm_90 and later up to 232,000 classes
// of float, 116,000 of double), so for z, gradient and p with labels 3 K numbers pass; where positions lie beside each other, twice, the second time
// from the caches as far as they hold. The value alone reads everything once at any size. Bytes a class: z (and target) read, gradient and p written.
// The divergence takes two such reductions, for it needs a mean first.
#include "kernels/cross_entropy.h"

#include <cmath>

#include "kernels/cuda/row_reduction.h"
#include "math/exp.h"
#include "math/losses.h"

namespace infl {
namespace cuda {
namespace {

// What a place has of its own: class k of it is at first + k · positions. Targets q_k = w_k (hit · target_k + base).
template <class T>
struct Place {
  int64_t first, step, label;  // label: −1 for probabilities
  bool counts;
  T hit, base;
  const T *target, *class_weight;

  __device__ T target_of(int64_t k) const {
    const T share = target ? target[first + k * step] : k == label ? T(1) : T(0);
    const T q = hit * share + base;
    return !counts ? T(0) : class_weight ? class_weight[k] * q : q;
  }
};

template <class T>
__device__ Place<T> place_of(const CrossEntropy<T>& l, int64_t n, int64_t position) {
  const int64_t label = l.index ? l.index[n * l.positions + position] : -1;
  return {n * l.K * l.positions + position,
          l.positions,
          label,
          l.index == nullptr || label >= 0,
          T(1) - l.smoothing,
          l.smoothing / T(l.K),
          l.target,
          l.class_weight};
}

// Sums leave out the largest logit m of the classes so far: next to p_m ≈ 1 the others would lose their digits.
template <class T>
struct LossState {
  T top = -INFINITY, q_top = 0;  // z_m, q_m
  T rest = 0, q_rest = 0;        // Σ exp(z_k − top), Σ q_k, k ≠ m
  T value = 0;                   // Σ q_k (top − z_k)
  int m = INT_MAX;
};

template <class T>
struct LossLine : Place<T> {
  using State = LossState<T>;
  struct Item {
    T z, q;
  };
  T s;
  const T* z;
  T *gradient, *p, *mass, *value;

  __device__ Item load(int64_t k) const { return {z[this->first + k * this->step], this->target_of(k)}; }

  // What merge does with the state of this element alone.
  __device__ void add(State& state, const Item& item, int64_t k) const {
    if (state.m != INT_MAX && item.z < state.top) {
      state.rest += exp_nonpositive(item.z - state.top);
      state.q_rest += item.q;
      if (item.q != T(0)) state.value += item.q * (state.top - item.z);
      return;
    }
    State one;
    one.top = item.z;
    one.q_top = item.q;
    one.m = static_cast<int>(k);
    merge(state, one);
  }

  __device__ void merge(State& state, const State& other) const {
    merge_into_larger(state, other, [](State& a, const State& b) {
      const T q = b.q_rest + b.q_top;
      a.rest += (b.rest + T(1)) * (a.top == b.top ? T(1) : exp_nonpositive(b.top - a.top));
      a.q_rest += q;
      a.value += b.value + (q == T(0) ? T(0) : q * (a.top - b.top));  // a class that counts for nothing may be at −∞
    });
  }

  // Q p − q, of the largest logit as minus the sum of the others: it would lose its digits where p is close to 1.
  __device__ void store(int64_t k, const Item& item, const State& state) const {
    const int64_t at = this->first + k * this->step;
    const T sum = T(1) + state.rest, share = k == state.m ? T(1) / sum : exp_nonpositive(item.z - state.top) / sum;
    if (p) p[at] = share;
    if (gradient == nullptr) return;
    const T Q = state.q_rest + state.q_top;
    gradient[at] = s * (k == state.m ? state.q_rest - Q * (state.rest / sum) : Q * share - item.q);
  }

  __device__ void finish(const State& state) const {
    const T Q = state.q_rest + state.q_top;
    if (mass) *mass = s * Q;
    if (value) *value = s * (state.value + Q * std::log1p(state.rest));
  }
};

// kWrites: gradient or p is wanted.
template <bool kWrites, class T>
struct LossOfPlaces {
  using State = LossState<T>;
  using Item = typename LossLine<T>::Item;
  static constexpr bool kStores = kWrites;
  CrossEntropy<T> l;
  T* value;  // [N, positions]
  __device__ LossLine<T> at(int64_t n, int64_t position) const {
    const int64_t i = n * l.positions + position;
    return {place_of(l, n, position), l.s, l.z, l.gradient, l.p, l.mass ? l.mass + i : nullptr, value ? value + i : nullptr};
  }
};

// Of the reference outputs of a place: top = max z_s, sum = Σ exp(z_s − top), change = Σ exp(z_s − top) (z − z_s), and the target's mass.
template <class T>
struct Reference {
  T top = -INFINITY, sum = 0, change = 0, mass = 0;
};

template <class T>
struct ReferenceLine : Place<T> {
  using State = Reference<T>;
  struct Item {
    T z, z_s, q;
  };
  const T *z, *z_s;
  State* out;

  __device__ Item load(int64_t k) const {
    const int64_t at = this->first + k * this->step;
    return {z[at], z_s[at], this->target_of(k)};
  }
  __device__ void add(State& state, const Item& item, int64_t) const { merge(state, State{item.z_s, T(1), item.z - item.z_s, item.q}); }
  __device__ void merge(State& state, const State& other) const {
    const State lower = exchanged(other.top > state.top, state, other);
    const T scale = state.top == lower.top ? T(1) : exp_nonpositive(lower.top - state.top);
    state.sum += scale * lower.sum;
    state.change += scale * lower.change;
    state.mass += lower.mass;
  }
  __device__ void store(int64_t, const Item&, const State&) const {}
  __device__ void finish(const State& state) const { *out = state; }
};

template <class T>
struct ReferenceOfPlaces {
  using State = Reference<T>;
  using Item = typename ReferenceLine<T>::Item;
  static constexpr bool kStores = false;
  CrossEntropy<T> l;
  State* out;
  __device__ ReferenceLine<T> at(int64_t n, int64_t position) const {
    return {place_of(l, n, position), l.z, l.z_s, out + n * l.positions + position};
  }
};

// KL(p_s ‖ p) = log Σ p_s exp(d), d = z − z_s less its mean under p_s. All |d| < 1: log1p of Σ p_s (exp(d) − 1 − d), which loses no digits;
// else a logsumexp.
template <class T>
struct Divergence {
  T widest = 0, near = 0;          // max |d|, Σ exp(z_s − top) (exp(d) − 1 − d)
  T highest = -INFINITY, far = 0;  // the largest exponent z_s − top + d, Σ exp of exponents less it
};

template <class T>
struct DivergenceLine {
  using State = Divergence<T>;
  struct Item {
    T z, z_s;
  };
  int64_t first, step;
  T s;
  Reference<T> reference;
  const T *z, *z_s;
  T* out;

  __device__ Item load(int64_t k) const { return {z[first + k * step], z_s[first + k * step]}; }
  __device__ void add(State& state, const Item& item, int64_t) const {
    const T exponent = item.z_s - reference.top, d = item.z - item.z_s - reference.change / reference.sum;
    const T size = d < T(0) ? -d : d;
    merge(state, State{size, size < T(1) ? exp_nonpositive(exponent) * exp_tail_within_one(d) : T(0), exponent + d, T(1)});
  }
  __device__ void merge(State& state, const State& other) const {
    const bool other_is_higher = other.highest > state.highest;
    const T high = other_is_higher ? other.highest : state.highest, low = other_is_higher ? state.highest : other.highest;
    const T of_high = other_is_higher ? other.far : state.far, of_low = other_is_higher ? state.far : other.far;
    state.far = of_high + of_low * (high == low ? T(1) : exp_nonpositive(low - high));
    state.highest = high;
    state.near += other.near;
    state.widest = other.widest > state.widest ? other.widest : state.widest;
  }
  __device__ void store(int64_t, const Item&, const State&) const {}
  __device__ void finish(const State& state) const {
    const T kl = state.widest < T(1) ? std::log1p(state.near / reference.sum) : std::log(state.far / reference.sum) + state.highest;
    *out = s * reference.mass * (kl < T(0) ? T(0) : kl);  // negative by rounding
  }
};

template <class T>
struct DivergenceOfPlaces {
  using State = Divergence<T>;
  using Item = typename DivergenceLine<T>::Item;
  static constexpr bool kStores = false;
  CrossEntropy<T> l;
  const Reference<T>* reference;
  T* out;  // [N, positions]
  __device__ DivergenceLine<T> at(int64_t n, int64_t position) const {
    const int64_t i = n * l.positions + position;
    return {n * l.K * l.positions + position, l.positions, l.s, reference[i], l.z, l.z_s, out + i};
  }
};

// out[n] = Σ over the positions of [N, positions].
template <class T>
struct SumLine {
  const T* x;
  T* out;
  __device__ T load(int64_t b) const { return x[b]; }
  __device__ void add(Sum<T>& sum, T value, int64_t) const { sum.value += value; }
  __device__ void merge(Sum<T>& sum, const Sum<T>& other) const { sum.value += other.value; }
  __device__ void store(int64_t, T, const Sum<T>&) const {}
  __device__ void finish(const Sum<T>& sum) const { *out = sum.value; }
};

template <class T>
struct SumOfPositions {
  using State = Sum<T>;
  using Item = T;
  static constexpr bool kStores = false;
  int64_t positions;
  const T* x;
  T* out;
  __device__ SumLine<T> at(int64_t n, int64_t) const { return {x + n * positions, out + n}; }
};

template <class T>
void cross_entropy(const Context& ctx, const CrossEntropy<T>& l) {
  constexpr const char* kWho = "cross_entropy";
  const int64_t places = l.N * l.positions;
  if (places == 0) return;
  if (l.K >= INT_MAX) throw std::invalid_argument("cross_entropy: expected fewer than 2^31 classes, got " + std::to_string(l.K) + ".");
  Buffer<T> by_position;
  if (l.positions > 1) by_position.resize(ctx, places);
  // What body leaves for each place goes to out [N].
  const auto per_example = [&](T* out, const auto& body) {
    body(out == nullptr || l.positions == 1 ? out : by_position.data());
    if (out == nullptr || l.positions == 1) return;
    reduce_rows(ctx, kWho, l.N, l.positions, 1, SumOfPositions<T>{l.positions, by_position.data(), out});
  };
  if (l.value || l.gradient || l.p || l.mass) {
    per_example(l.value, [&](T* value) {
      if (l.gradient || l.p) {
        reduce_rows(ctx, kWho, l.N, l.K, l.positions, LossOfPlaces<true, T>{l, value});
      } else {
        reduce_rows(ctx, kWho, l.N, l.K, l.positions, LossOfPlaces<false, T>{l, value});
      }
    });
  }
  if (l.bregman) {
    Buffer<Reference<T>> reference(ctx, places);
    reduce_rows(ctx, kWho, l.N, l.K, l.positions, ReferenceOfPlaces<T>{l, reference.data()});
    per_example(l.bregman, [&](T* out) { reduce_rows(ctx, kWho, l.N, l.K, l.positions, DivergenceOfPlaces<T>{l, reference.data(), out}); });
  }
}

INFL_REGISTER_CUDA(cross_entropy_stub, cross_entropy)

}  // namespace
}  // namespace cuda
}  // namespace infl
