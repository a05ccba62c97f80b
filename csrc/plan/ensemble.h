// Ensemble: one plan at several parameter sets, each of which takes a training step on the same examples.
//
// Sets do not depend on each other, so threads share them out, and a thread takes one set through forward pass, loss, cotangent sweep and update
// before the next: what a set needs (packed weights, activations, gradient) stays in the core's cache, and the thread's tape and gradient serve
// every set it takes. Where threads outnumber sets, sets go one after another with all threads inside each kernel.
//
// A device takes all sets through each kernel: one tape stands at all of them (plan/tape.h). The number of launches does not depend on theirs but at
// nodes that are called set by set: affine maps, products with a matrix, norms of which a part is frozen, and where a value of each set meets one
// that all share. Nothing waits for the device but what checks indices in the data. An MLP of L layers, with an activation between two, takes
//   forward    of each layer a batched product and its bias, and the activations                             3 L − 1 launches
//   loss       values and gradients; zeros for what is dropped and the sums                                  2
//   cotangents zeros for the gradient, a copy of the cotangent; of each layer a batched product and a sum of   4 L
//              columns (two launches if long), above the first a batched product and the derivative
//   update     of all parameters                                                                             1
//
// A convolution takes three launches forward (a copy of its input for the gradient, kernels packed, product) and at most six back (kernel's gradient
// and a sum by channel, two each if long; kernels packed, product), whose grids have sets as a dimension; batch norm with given statistics takes
// five, layer and group norm three.
//
// A set moves 10 P numbers (Adam: 12 P) at most: weights are read by two products, gradients zeroed, read, written, and five (seven) accesses are the
// update's. A hidden unit of an example of a set moves 15: its product's output, 2 for the bias, 3 for the activation and its derivative, the next
// product's input; its cotangent, 3 for the derivative, 2 for the weights' gradient, 1 for the bias's and the next product's input. The examples
// themselves are shared: one copy, a batch stride of zero.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/descent.h"
#include "losses/loss.h"
#include "plan/tape.h"

namespace infl {

template <class T>
struct EnsembleStep {
  int64_t num_sets = 0;                   // S
  std::vector<const T*> constants;        // per slot: what is not trained; null: in θ, at the slot's offset
  T* theta = nullptr;                     // [S, P]
  T *first = nullptr, *second = nullptr;  // [S, P], the optimiser's moments
  Descent<T> descent;
  const Loss<T>* loss = nullptr;
  LossArguments<T> arguments;  // of the examples of sets_at_once sets; z, value and gradient are the step's own
  const bool* kept = nullptr;  // [S, N], whether an example counts
  T* total = nullptr;          // [S], the sum of the losses that count
};

template <class T>
class Ensemble {
 public:
  Ensemble(std::shared_ptr<const Plan<T>> plan, int64_t num_examples) : plan_(std::move(plan)), N_(num_examples) {}

  // How many of S sets take each kernel together.
  static int64_t sets_at_once(const Context& ctx, int64_t S) { return ctx.on_device() ? S : 1; }

  // `inputs`: one array [N, width] per plan input. Callers from several threads take turns.
  void step(const Context& ctx, const std::vector<const T*>& inputs, const EnsembleStep<T>& step);

  const Plan<T>& plan() const { return *plan_; }
  int64_t num_examples() const { return N_; }
  int64_t cached_bytes() const;  // of the tapes and the prepared inputs

 private:
  std::vector<const T*> prepare(const Context& ctx, const std::vector<const T*>& inputs);
  void take(const Context& ctx, Tape<T>& tape, const EnsembleStep<T>& step, int64_t first) const;

  std::shared_ptr<const Plan<T>> plan_;
  int64_t N_;
  std::vector<std::unique_ptr<Tape<T>>> tapes_;  // per thread; on a device one of all sets
  std::vector<Buffer<T>> prepared_;              // per node
  std::mutex stepping_;
};

extern template class Ensemble<float>;
extern template class Ensemble<double>;

}  // namespace infl
