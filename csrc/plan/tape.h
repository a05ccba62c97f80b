// Tape: a plan linearised at parameters θ on given examples: outputs, and all that products need, computed once.
//
// Products run by one of two schedules (the same plan, rules and numbers up to the order of sums over examples):
//   by example   each thread takes tiles of examples whose whole state fits its cache through all steps, alone, into its own accumulator
//   by operator  one tile at a time, all threads inside each kernel, one accumulator
// Both are deterministic for a given number of threads. On a device the threads are inside the kernels: by example is one kernel that takes tiles
// through a whole chain of dense layers (kernels/mlp.h), and everything else runs by operator.
//
// A tape may stand at several parameter sets at once, for linearize and vjp of one cotangent a set. What depends on no trained parameter is computed
// once and shared. Of the nodes that do, those without parameters of their own take the examples of all sets for one long batch, rules that take sets
// (Rule::takes_sets) have kernels that serve all, and the others are called set by set.
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
  // `inputs`: one array [N, width] per plan input; must outlive the tape. All sets see them.
  Tape(const Context& ctx, std::shared_ptr<const Plan<T>> plan, int64_t N, std::vector<const T*> inputs, int64_t num_sets = 1);

  // The same number of other examples; linearize is to follow.
  void rebind(std::vector<const T*> inputs) {
    inputs_ = std::move(inputs);
    prepared_.assign(prepared_.size(), nullptr);
  }

  // Per node what Rule::prepare_input made of these examples, or null, until they change; for schedules that are whole.
  void set_prepared(std::vector<const T*> prepared) { prepared_ = std::move(prepared); }

  // The forward pass at θ, given per slot; copies what it needs of θ, or with `borrow` reads it where it is, which must then outlive what follows.
  // Of several sets it is always read there, trained parameters `stride` apart.
  void linearize(const Context& ctx, const std::vector<const T*>& theta, bool borrow = false, int64_t stride = 0);

  const Plan<T>& plan() const { return *plan_; }
  int64_t num_examples() const { return N_; }
  int64_t num_sets() const { return sets_; }
  const T* outputs() const { return value(plan_->output(), 0); }  // [sets, N, C]

  void set_schedule(ScheduleChoice choice) { choice_ = choice; }
  void set_shortcuts(bool allowed) { shortcuts_allowed_ = allowed; }
  int64_t sides(const Context& ctx, int64_t V) const;                               // how many of V right-hand sides a sweep takes at once
  Tiling tiling(const Context& ctx, int64_t V) const;                               // of its sweeps in jvp, vjp and ggn
  bool is_whole(const Context& ctx) const { return tiling(ctx, 1, 1).tile >= N_; }  // do sweeps of one right-hand side take all examples at once?
  // Do products onto V vectors take the plan's shortcuts? The first that does makes the Jacobians, once for the life of a linearisation.
  bool takes_shortcuts(const Context& ctx, int64_t V) const;
  int64_t cached_bytes() const;
  int64_t workspace_bytes(const Context& ctx, int64_t V) const;  // of one product onto V vectors, beyond operand and result

  void jvp(const Context& ctx, int64_t V, const T* v, T* t_out) const;  // [V, P] -> [V, N, C]
  void vjp(const Context& ctx, int64_t V, const T* g, T* out) const;    // [V, N, C] -> [V, P], summed over N; [sets, N, C] -> [sets, P]
  // One step of a gradient method by the gradient of vjp, g [N, C]; parameters that one node reads move as soon as their gradient is complete. Of
  // several sets, g [sets, N, C] and what moves [sets, P], in one launch.
  void descend(const Context& ctx, const T* g, const Descent<T>& descent, const Moved<T>& moved) const;
  void ggn(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const;  // [V, P] -> [V, P]

  // Of a plan for second-order products: the cotangent sweep of g [N, C], once; curved nodes keep their output's cotangent for hvp.
  void keep_cotangents(const Context& ctx, const T* g);
  // ∂²(Σ_n g_nᵀ f_n)/∂θ² v + Jᵀ H J v: [V, P] -> [V, P]
  void hvp(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const;

  // ⟨J_nᵀ g[v, n], u_w⟩ for g [V, N, C] and u [W, P]: [V, W, N]. One cotangent sweep for g, then at each trained node ⟨g_y, ∂y/∂θ u_w⟩: the tangents
  // go no further than the node, which is half the work of jvp; or, where weights are shared by so many positions that it takes less, ⟨gradient,
  // u_w⟩.
  void dots(const Context& ctx, int64_t V, const T* g, int64_t W, const T* u, T* out) const;

  // The cotangent sweep of g [V, N, C] for examples [n0, n0 + n): each node's factors. They point into the tape, `workspace` and `storage`.
  std::vector<Factor<T>> factors(const Context& ctx, int64_t V, const T* g, int64_t n0, int64_t n, T* workspace, Arena<T>& storage,
                                 FactorForm form = FactorForm::cheapest) const;
  int64_t factor_workspace(int64_t V, int64_t n) const { return plan_->schedules().sweep_width * V * n; }
  // The same for all examples, a tile at a time, tiles side by side where that pays: body(context, first example, number of examples, factors,
  // sum). `out` [P] receives the sum of what the tiles add to their `sum` (null: none wanted, and none given).
  using FactorBody = std::function<void(const Context&, int64_t n0, int64_t n, const std::vector<Factor<T>>&, T* sum)>;
  void each_tile_of_factors(const Context& ctx, int64_t V, const T* g, T* out, const FactorBody& body) const;

 private:
  struct Sweep;  // one tile in flight
  struct Part;   // of a node's work on all sets
  // What tiles add to, one after another: [sums, P], null if none is wanted. `first`: no tile did, and it is zero but where steps write.
  struct Sums {
    T* data = nullptr;
    bool first = false;
  };

  const T* value(int id, int64_t n0) const;
  std::vector<Part> parts(int node, int64_t n) const;
  int64_t skipped(int id, const Part& part, int64_t n) const;
  std::vector<const T*> slot_rows(const T* flat) const;
  std::vector<T*> slot_rows(T* flat) const;
  void forward_tile(const Context& ctx, int64_t n0, int64_t n, T* workspace);
  // g [V, N, C] of a tile to where the cotangent sweep begins.
  void load_cotangents(const Context& ctx, int64_t V, int64_t n0, int64_t n, const T* g, T* workspace) const;
  // `packed`: of all nodes, packed ahead; else memory for one node's.
  // `untransposed`: without the transposition at the outputs.
  void tangent_tile(const Context& ctx, const Schedules& s, bool untransposed, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta,
                    bool ahead, T* packed, T* workspace) const;
  void cotangent_tile(const Context& ctx, const Schedules& s, bool untransposed, int64_t V, int64_t n0, int64_t n, Sums sums, T* workspace) const;
  void cotangent_step(const Context& ctx, const CotangentStep& step, int64_t V, int64_t n0, int64_t n, const std::vector<T*>& g_theta, T* workspace,
                      bool first = false) const;
  void curved_cotangent_tile(const Context& ctx, bool untransposed, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta,
                             const T* packed, Sums sums, T* workspace) const;
  void product(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, bool second_order, T* out) const;
  void keep_jacobians(const Context& ctx) const;
  // Are the tangents of V vectors packed before the sweep? Not where one tile takes all examples and so packs for itself, a node at a time.
  bool packs_ahead(const Context& ctx, int64_t V, bool shortened) const;
  // Of all nodes that have some, or of those that `wanted` (Storage) names.
  template <class Wanted>
  void pack_tangents(const Context& ctx, const Schedules& s, int64_t V, const std::vector<const T*>& t_theta, T* packed, const Wanted& wanted) const;
  void pack_tangents(const Context& ctx, const Schedules& s, int64_t V, const std::vector<const T*>& t_theta, T* packed) const {
    pack_tangents(ctx, s, V, t_theta, packed, [](const Storage&) { return true; });
  }
  // out[w, n] += ⟨gradients of examples [n0, n0 + n) by the node's parameters, u_w⟩ for g_y [n, width] and u [W, P].
  void add_gradient_dots(const Context& ctx, int node, int64_t n0, int64_t n, const T* g_y, int64_t W, const T* u, T* out) const;
  bool runs_as_chain(const Context& ctx, int64_t V) const;
  void run_chain(const Context& ctx, Mlp<T> product) const;
  Tiling tiling(const Context& ctx, int64_t V, int64_t sums, bool shortened = false) const;
  template <class Body>
  void each_group(const Context& ctx, int64_t V, const Body& body) const;
  template <class Body>
  void run_tiles(const Context& ctx, int64_t V, int64_t sums, T* out, const Body& body, bool shortened = false, bool sweeps = false) const;
  void clear(const Context& ctx, int64_t num, const Schedules& s, bool first, T* sums) const;

  std::shared_ptr<const Plan<T>> plan_;
  int64_t N_, sets_;
  std::vector<const T*> inputs_;
  std::vector<const T*> prepared_;              // per node
  std::vector<Buffer<T>> values_;               // per value: kept outputs [N, width]
  std::vector<std::vector<Buffer<T>>> states_;  // per node
  std::vector<Buffer<T>> packed_;               // per node
  std::vector<Buffer<T>> theta_;                // per slot, empty where it is borrowed
  std::vector<const T*> theta_at_;              // per slot
  int64_t theta_stride_ = 0;                    // between sets
  std::vector<Buffer<T>> cotangents_;           // per node: of the outputs of curved ones [N, width]
  ScheduleChoice choice_ = ScheduleChoice::automatic;
  bool shortcuts_allowed_ = true;
  mutable std::mutex keeping_jacobians_;
  mutable bool jacobians_kept_ = false;
  mutable std::vector<Buffer<T>> jacobians_;  // per shortcut [N, C, width]
};

extern template class Tape<float>;
extern template class Tape<double>;

}  // namespace infl
