// How a tape goes through its data: the parts and tiles of a node's work, the arrays that a rule sees, and who takes which tile. For the tape's
// own files alone.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"
#include "plan/tape.h"

namespace infl {

// Sets [first, first + sets), n examples each; or, with one set, the n examples of all of them.
template <class T>
struct Tape<T>::Part {
  int64_t first = 0, sets = 1, n = 0;
};

// A node's view of arrays that are indexed by slot id: one entry per operand.
template <class P>
std::vector<P> operands(const Node& node, const std::vector<P>& by_slot) {
  std::vector<P> picked;
  for (int slot : node.slots) picked.push_back(slot >= 0 ? by_slot[slot] : nullptr);
  return picked;
}

// The arrays a rule sees for one tile. Owns the small pointer tables that the Tile points to.
template <class T>
struct Tape<T>::Sweep {
  Sweep(const Tape& tape, const Context& ctx, int index, int64_t V, int64_t n0, int64_t n) : Sweep(tape, ctx, index, V, n0, Part{0, 1, n}) {}
  Sweep(const Tape& tape, const Context& ctx, int index, int64_t V, int64_t n0, const Part& part)
      : node(tape.plan_->nodes()[index]), tile{ctx, node, V, part.n} {
    const Plan<T>& plan = *tape.plan_;
    const Storage& storage = plan.storage(index);
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      const int id = plan.canonical(node.inputs[k]);
      x.push_back(storage.keeps_input[k] ? tape.value(id, n0) + tape.skipped(id, part, tape.N_) : nullptr);
      if (part.sets > 1) x_stride.push_back(plan.needs_tangent(id) ? tape.N_ * plan.width(id) : 0);
    }
    for (size_t k = 0; k < storage.state_widths.size(); ++k) {
      state.push_back(const_cast<T*>(tape.states_[index][k].data()) + (n0 + part.first * tape.N_) * storage.state_widths[k]);
    }
    for (size_t k = 0; k < node.slots.size(); ++k) {
      const T* at = node.slots[k] >= 0 ? tape.theta_at_[node.slots[k]] : nullptr;
      theta.push_back(node.is_trainable(k) ? at + part.first * tape.theta_stride_ : at);
    }
    tile.x = x.data();
    tile.state = state.data();
    tile.theta = theta.data();
    if (part.sets == 1) tile.packed = const_cast<T*>(tape.packed_[index].data()) + part.first * storage.packed_size;
    tile.prepared = tape.prepared_[index];
    tile.sets = part.sets;
    tile.theta_stride = tape.theta_stride_;
    tile.x_stride = x_stride.data();
  }
  const Node& node;
  std::vector<const T*> x, theta;
  std::vector<int64_t> x_stride;
  std::vector<T*> state;
  Tile<T> tile;
};

template <class T>
template <class Wanted>
void Tape<T>::pack_tangents(const Context& ctx, const Schedules& s, int64_t V, const std::vector<const T*>& t_theta, T* packed,
                            const Wanted& wanted) const {
  for (const TangentStep& step : s.tangent) {
    if (plan_->storage(step.node).tangent_packed_size == 0 || !wanted(plan_->storage(step.node))) continue;
    Sweep sweep(*this, ctx, step.node, V, 0, 0);
    const auto tangents = operands(sweep.node, t_theta);
    T* to = packed + V * s.tangent_packed[step.node];
    plan_->rule(step.node).pack_tangents(sweep.tile, {tangents.data(), plan_->num_parameters(), nullptr}, to);
  }
}

// body(first, count): all V right-hand sides, in groups of nearly equal size.
template <class T>
template <class Body>
void Tape<T>::each_group(const Context& ctx, int64_t V, const Body& body) const {
  const int64_t size = sides(ctx, V);
  for (int64_t v0 = 0; v0 < V; v0 += size) body(v0, std::min(size, V - v0));
}

// body(context, first example, number of examples, workspace, accumulator): every tile of the data once. `out` [sums, P] receives the sum of what
// the tiles add to their accumulators (null: none wanted); `sweeps`: by cotangent sweeps, which can write. Exceptions do not cross the parallel
// region.
template <class T>
template <class Body>
void Tape<T>::run_tiles(const Context& ctx, int64_t V, int64_t sums_wanted, T* out, const Body& body, bool shortened, bool sweeps) const {
  const Schedules& s = plan_->schedules(shortened);
  const Tiling t = tiling(ctx, V, sums_wanted, shortened);
  const int64_t size = sums_wanted * sets_ * plan_->num_parameters();
  const int64_t workspace_size = std::max(s.sweep_width * V, s.forward_width) * sets_ * t.tile;
  const int64_t num_tiles = (N_ + t.tile - 1) / t.tile;
  const bool writes = sweeps && !ctx.on_device() && sets_ == 1;  // there one launch that zeroes all is what costs least
  if (!t.by_example || t.num_threads == 1 || num_tiles <= 1) {
    Context inner = ctx;
    if (t.by_example && num_tiles > 1) inner.num_threads = 1;
    if (out) clear(ctx, sums_wanted, s, writes && num_tiles > 0, out);
    Scratch<T> workspace(ctx, workspace_size);
    for (int64_t i = 0; i < num_tiles; ++i) body(inner, i * t.tile, std::min(t.tile, N_ - i * t.tile), workspace.data(), Sums{out, writes && i == 0});
    return;
  }
  Scratch<T> accumulators(ctx, out ? (t.num_threads - 1) * size : 0);  // [threads − 1, V, P]: the first thread's is `out`
  T* others = accumulators.data();
  RegionErrors errors;
#pragma omp parallel num_threads(t.num_threads)
  {
    const int me = omp_get_thread_num(), count = omp_get_num_threads();
    Context inner = ctx;
    inner.num_threads = 1;
    T* sum = out && me > 0 ? others + (me - 1) * size : out;
    try {
      Scratch<T> workspace(inner, workspace_size);
      if (out) clear(inner, sums_wanted, s, writes && me < num_tiles, sum);
      for (int64_t i = me; i < num_tiles && !errors; i += count) {
        body(inner, i * t.tile, std::min(t.tile, N_ - i * t.tile), workspace.data(), Sums{sum, writes && i == me});
      }
    } catch (...) {
      errors.keep();
    }
#pragma omp barrier
    if (out && !errors) {
      const int64_t slice = (size + count - 1) / count, begin = std::min(size, me * slice), end = std::min(size, begin + slice);
      row_accumulate_stub<T>(inner, count - 1, end - begin, others + begin, size, out + begin);
    }
  }
  errors.rethrow();
}

}  // namespace infl
