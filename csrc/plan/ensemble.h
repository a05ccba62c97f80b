// Ensemble: one plan at several parameter sets, each of which takes a training step on the same examples.
//
// Sets do not depend on each other, so threads share them out, and a thread takes one set through forward pass, loss, cotangent sweep and update
// before the next: what a set needs (packed weights, activations, gradient) stays in the core's cache, and the thread's tape and gradient serve
// every set it takes. Where threads outnumber sets, and on a device, sets go one after another with all threads inside each kernel.
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
  LossArguments<T> arguments;                 // of the examples; z, value and gradient are each set's own
  std::vector<std::vector<int64_t>> dropped;  // per set: examples that do not count
  T* total = nullptr;                         // [S], the sum of the losses that count
};

template <class T>
class Ensemble {
 public:
  Ensemble(std::shared_ptr<const Plan<T>> plan, int64_t num_examples) : plan_(std::move(plan)), N_(num_examples) {}

  // `inputs`: one array [N, width] per plan input. Callers from several threads take turns.
  void step(const Context& ctx, const std::vector<const T*>& inputs, const EnsembleStep<T>& step);

  const Plan<T>& plan() const { return *plan_; }
  int64_t num_examples() const { return N_; }
  int64_t cached_bytes() const;  // of the tapes and the prepared inputs

 private:
  std::vector<const T*> prepare(const Context& ctx, const std::vector<const T*>& inputs);
  void one(const Context& ctx, Tape<T>& tape, const EnsembleStep<T>& step, int64_t set) const;

  std::shared_ptr<const Plan<T>> plan_;
  int64_t N_;
  std::vector<std::unique_ptr<Tape<T>>> tapes_;  // per thread
  std::vector<Buffer<T>> prepared_;              // per node
  std::mutex stepping_;
};

extern template class Ensemble<float>;
extern template class Ensemble<double>;

}  // namespace infl
