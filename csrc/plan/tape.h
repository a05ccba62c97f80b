// Tape: a plan linearised at parameters θ on given examples: outputs, and all that products need, computed once.
//
// Products run by one of two schedules (the same plan, rules and numbers up to the order of sums over examples):
//   by example   each thread takes tiles of examples whose whole state fits its cache through all steps, alone, into its own accumulator
//   by operator  one tile at a time, all threads inside each kernel, one accumulator
// Both are deterministic for a given number of threads. On a device the threads are inside the kernels: by example is one kernel that takes tiles
// through a whole chain of dense layers (kernels/mlp.h), and everything else runs by operator.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "common/arena.h"
#include "common/buffer.h"
#include "kernels/output_hessian.h"
#include "plan/plan.h"

namespace infl {

enum class ScheduleChoice : int { automatic = 0, by_example = 1, by_operator = 2 };

struct Tiling {
  bool by_example = false;
  int64_t tile = 1;  // examples
  int num_threads = 1;
};

template <class T>
class Tape {
 public:
  // `inputs`: one array [N, width] per plan input; must outlive the tape.
  Tape(const Context& ctx, std::shared_ptr<const Plan<T>> plan, int64_t N, std::vector<const T*> inputs);

  // The same number of other examples; linearize is to follow.
  void rebind(std::vector<const T*> inputs) { inputs_ = std::move(inputs); }

  // The forward pass at θ, given per slot; copies what it needs of θ, or with `borrow` reads it where it is, which must then outlive what follows.
  void linearize(const Context& ctx, const std::vector<const T*>& theta, bool borrow = false);

  const Plan<T>& plan() const { return *plan_; }
  int64_t num_examples() const { return N_; }
  const T* outputs() const { return value(plan_->output(), 0); }  // [N, C]

  void set_schedule(ScheduleChoice choice) { choice_ = choice; }
  Tiling tiling(const Context& ctx, int64_t V) const;  // of jvp, vjp and ggn onto V vectors
  int64_t cached_bytes() const;
  int64_t workspace_bytes(const Context& ctx, int64_t V) const;  // of one product onto V vectors, beyond operand and result

  void jvp(const Context& ctx, int64_t V, const T* v, T* t_out) const;                           // [V, P] -> [V, N, C]
  void vjp(const Context& ctx, int64_t V, const T* g, T* out) const;                             // [V, N, C] -> [V, P], summed over N
  void ggn(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const;  // [V, P] -> [V, P]

  // Of a plan for second-order products: the cotangent sweep of g [N, C], once; curved nodes keep their output's cotangent for hvp.
  void keep_cotangents(const Context& ctx, const T* g);
  // ∂²(Σ_n g_nᵀ f_n)/∂θ² v + Jᵀ H J v: [V, P] -> [V, P]
  void hvp(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const;

  // The cotangent sweep of g [V, N, C] for examples [n0, n0 + n): each node's factors. They point into the tape, `workspace` and `storage`.
  // `outer`: as outer products wherever the rule has them (FactorSink).
  std::vector<Factor<T>> factors(const Context& ctx, int64_t V, const T* g, int64_t n0, int64_t n, T* workspace, Arena<T>& storage,
                                 bool outer = false) const;
  int64_t factor_workspace(int64_t V, int64_t n) const { return plan_->schedules().sweep_width * V * n; }
  // The same for all examples, a tile at a time, tiles side by side where that pays: body(context, first example, number of examples, factors,
  // sum). `out` [P] receives the sum of what the tiles add to their `sum` (null: none wanted, and none given).
  using FactorBody = std::function<void(const Context&, int64_t n0, int64_t n, const std::vector<Factor<T>>&, T* sum)>;
  void each_tile_of_factors(const Context& ctx, int64_t V, const T* g, T* out, const FactorBody& body) const;

 private:
  struct Sweep;  // one tile in flight

  const T* value(int id, int64_t n0) const;
  std::vector<const T*> slot_rows(const T* flat) const;
  std::vector<T*> slot_rows(T* flat) const;
  void forward_tile(const Context& ctx, int64_t n0, int64_t n, T* workspace);
  void tangent_tile(const Context& ctx, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta, const T* packed, T* workspace) const;
  void cotangent_tile(const Context& ctx, int64_t V, int64_t n0, int64_t n, const std::vector<T*>& g_theta, T* workspace) const;
  void cotangent_step(const Context& ctx, const CotangentStep& step, int64_t V, int64_t n0, int64_t n, const std::vector<T*>& g_theta,
                      T* workspace) const;
  void curved_cotangent_tile(const Context& ctx, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta, const T* packed,
                             const std::vector<T*>& g_theta, T* workspace) const;
  void product(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, bool second_order, T* out) const;
  void pack_tangents(const Context& ctx, int64_t V, const std::vector<const T*>& t_theta, T* packed) const;
  bool runs_as_chain(const Context& ctx, int64_t V) const;
  Mlp<T> chain(int64_t V) const;
  void run_chain(const Context& ctx, const Mlp<T>& chain) const;
  Tiling tiling(const Context& ctx, int64_t V, int64_t sums) const;
  template <class Body>
  void run_tiles(const Context& ctx, int64_t V, int64_t sums, T* out, const Body& body) const;

  std::shared_ptr<const Plan<T>> plan_;
  int64_t N_;
  std::vector<const T*> inputs_;
  std::vector<Buffer<T>> values_;               // per value: kept outputs [N, width]
  std::vector<std::vector<Buffer<T>>> states_;  // per node
  std::vector<Buffer<T>> packed_;               // per node
  std::vector<Buffer<T>> theta_;                // per slot, unless borrowed
  std::vector<const T*> theta_at_;              // per slot
  std::vector<Buffer<T>> cotangents_;           // per node: of the outputs of curved ones [N, width]
  ScheduleChoice choice_ = ScheduleChoice::automatic;
};

extern template class Tape<float>;
extern template class Tape<double>;

}  // namespace infl
