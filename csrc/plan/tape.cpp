#include "plan/tape.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"

namespace infl {

namespace {

// A thread's share of a second-level cache that a tile may fill, and the size below which an accumulator per thread stays in it too.
constexpr int64_t kTileBytes = 448 << 10;
constexpr int64_t kAccumulatorBytes = 1 << 20;
constexpr int64_t kSmallestTile = 8, kLargestTile = 240;
constexpr int64_t kWholeWorkspaceBytes = 64 << 20;           // by operator: workspace of one tile; by example: accumulators of all threads
constexpr int64_t kDeviceWorkspaceBytes = int64_t{2} << 30;  // few, large launches

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <class T>
Tape<T>::Tape(const Context& ctx, std::shared_ptr<const Plan<T>> plan, int64_t N, std::vector<const T*> inputs)
    : plan_(std::move(plan)),
      N_(N),
      inputs_(std::move(inputs)),
      values_(plan_->num_values()),
      states_(plan_->nodes().size()),
      packed_(plan_->nodes().size()),
      theta_(plan_->slots().size()),
      theta_at_(plan_->slots().size()),
      cotangents_(plan_->nodes().size()) {
  for (int id = 0; id < plan_->num_values(); ++id) {
    if (plan_->canonical(id) == id && plan_->is_kept(id)) values_[id].resize(ctx, N_ * plan_->width(id));
  }
  for (size_t i = 0; i < states_.size(); ++i) {
    const Storage& storage = plan_->storage(static_cast<int>(i));
    for (int64_t width : storage.state_widths) states_[i].emplace_back(ctx, N_ * width);
    packed_[i].resize(ctx, storage.packed_size);
    if (plan_->nodes()[i].curved) cotangents_[i].resize(ctx, N_ * plan_->nodes()[i].width);
  }
  for (size_t s = 0; s < theta_.size(); ++s) theta_[s].resize(ctx, plan_->slots()[s].size);
}

template <class T>
const T* Tape<T>::value(int id, int64_t n0) const {
  id = plan_->canonical(id);
  if (id < plan_->num_inputs()) return inputs_[id] + n0 * plan_->width(id);
  return plan_->is_kept(id) ? values_[id].data() + n0 * plan_->width(id) : nullptr;
}

template <class T>
std::vector<const T*> Tape<T>::slot_rows(const T* flat) const {
  std::vector<const T*> rows;
  for (const Slot& slot : plan_->slots()) rows.push_back(slot.offset < 0 ? nullptr : flat + slot.offset);
  return rows;
}

template <class T>
std::vector<T*> Tape<T>::slot_rows(T* flat) const {
  std::vector<T*> rows;
  for (const Slot& slot : plan_->slots()) rows.push_back(slot.offset < 0 || flat == nullptr ? nullptr : flat + slot.offset);
  return rows;
}

namespace {

// A node's view of arrays that are indexed by slot id: one entry per operand.
template <class P>
std::vector<P> operands(const Node& node, const std::vector<P>& by_slot) {
  std::vector<P> picked;
  for (int slot : node.slots) picked.push_back(slot >= 0 ? by_slot[slot] : nullptr);
  return picked;
}

}  // namespace

// The arrays a rule sees for one tile. Owns the small pointer tables that the Tile points to.
template <class T>
struct Tape<T>::Sweep {
  Sweep(const Tape& tape, const Context& ctx, int index, int64_t V, int64_t n0, int64_t n) : node(tape.plan_->nodes()[index]), tile{ctx, node, V, n} {
    const Storage& storage = tape.plan_->storage(index);
    for (size_t k = 0; k < node.inputs.size(); ++k) x.push_back(storage.keeps_input[k] ? tape.value(node.inputs[k], n0) : nullptr);
    for (size_t k = 0; k < storage.state_widths.size(); ++k) {
      state.push_back(const_cast<T*>(tape.states_[index][k].data()) + n0 * storage.state_widths[k]);
    }
    for (int slot : node.slots) theta.push_back(slot >= 0 ? tape.theta_at_[slot] : nullptr);
    tile.x = x.data();
    tile.state = state.data();
    tile.theta = theta.data();
    tile.packed = const_cast<T*>(tape.packed_[index].data());
  }
  const Node& node;
  std::vector<const T*> x, theta;
  std::vector<T*> state;
  Tile<T> tile;
};

template <class T>
void Tape<T>::linearize(const Context& ctx, const std::vector<const T*>& theta, bool borrow) {
  theta_at_ = theta;
  for (size_t s = 0; s < theta_.size() && !borrow; ++s) {
    copy<T>(ctx, plan_->slots()[s].size, theta[s], theta_[s].data());
    theta_at_[s] = theta_[s].data();
  }
  for (size_t i = 0; i < packed_.size(); ++i) {
    Sweep sweep(*this, ctx, static_cast<int>(i), 1, 0, 0);
    plan_->rule(static_cast<int>(i)).pack(sweep.tile);
  }
  run_tiles(ctx, 1, 1, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, T*) { forward_tile(inner, n0, n, workspace); });
}

template <class T>
void Tape<T>::forward_tile(const Context& ctx, int64_t n0, int64_t n, T* workspace) {
  for (const ForwardStep& step : plan_->schedules().forward) {
    Sweep sweep(*this, ctx, step.node, 1, n0, n);
    for (size_t k = 0; k < sweep.x.size(); ++k) {
      const int id = plan_->canonical(sweep.node.inputs[k]);
      const T* kept = value(id, n0);
      sweep.x[k] = kept ? kept : workspace + step.inputs[k] * n;
    }
    T* y = step.output == kNowhere ? const_cast<T*>(value(sweep.node.output, n0)) : workspace + step.output * n;
    plan_->rule(step.node).forward(sweep.tile, y);
  }
}

template <class T>
void Tape<T>::pack_tangents(const Context& ctx, int64_t V, const std::vector<const T*>& t_theta, T* packed) const {
  for (const TangentStep& step : plan_->schedules().tangent) {
    if (plan_->storage(step.node).tangent_packed_size == 0) continue;
    Sweep sweep(*this, ctx, step.node, V, 0, 0);
    const auto tangents = operands(sweep.node, t_theta);
    T* to = packed + V * plan_->schedules().tangent_packed[step.node];
    plan_->rule(step.node).pack_tangents(sweep.tile, {tangents.data(), plan_->num_parameters(), nullptr}, to);
  }
}

template <class T>
void Tape<T>::tangent_tile(const Context& ctx, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta, const T* packed,
                           T* workspace) const {
  std::vector<const T*> t_x;
  for (const TangentStep& step : plan_->schedules().tangent) {
    Sweep sweep(*this, ctx, step.node, V, n0, n);
    t_x.clear();
    for (Place place : step.inputs) t_x.push_back(place == kNowhere ? nullptr : workspace + place * V * n);
    const auto tangents = operands(sweep.node, t_theta);
    const T* scale = step.scale_by < 0 ? nullptr : Sweep(*this, ctx, step.scale_by, V, n0, n).state[plan_->storage(step.scale_by).derivative];
    const ParameterTangents<T> t{tangents.data(), plan_->num_parameters(), packed + V * plan_->schedules().tangent_packed[step.node]};
    plan_->rule(step.node).jvp(sweep.tile, t_x.data(), t, scale, workspace + step.output * V * n);
  }
}

template <class T>
void Tape<T>::cotangent_tile(const Context& ctx, int64_t V, int64_t n0, int64_t n, const std::vector<T*>& g_theta, T* workspace) const {
  for (const CotangentStep& step : plan_->schedules().cotangent) cotangent_step(ctx, step, V, n0, n, g_theta, workspace);
}

// `g_theta` empty: parameters are not wanted.
template <class T>
void Tape<T>::cotangent_step(const Context& ctx, const CotangentStep& step, int64_t V, int64_t n0, int64_t n, const std::vector<T*>& g_theta,
                             T* workspace) const {
  Sweep sweep(*this, ctx, step.node, V, n0, n);
  const Rule<T>& rule = plan_->rule(step.node);
  const T* g_y = workspace + step.g_output * V * n;
  if (step.params && !g_theta.empty()) {
    const auto targets = operands(sweep.node, g_theta);
    rule.vjp_params(sweep.tile, g_y, targets.data(), plan_->num_parameters());
  }
  if (step.input >= 0) {
    const T* scale = step.scale_by < 0 ? nullptr : Sweep(*this, ctx, step.scale_by, V, n0, n).state[plan_->storage(step.scale_by).derivative];
    rule.vjp_input(sweep.tile, step.input, g_y, scale, workspace + step.g_input * V * n, step.accumulate);
  }
}

// The tangent of the cotangent sweep: every curved node adds its second-order term.
template <class T>
void Tape<T>::curved_cotangent_tile(const Context& ctx, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta, const T* packed,
                                    const std::vector<T*>& g_theta, T* workspace) const {
  const Schedules& s = plan_->schedules();
  std::vector<const T*> t_x;
  std::vector<T*> g_x;
  for (const CotangentStep& step : s.cotangent) {
    cotangent_step(ctx, step, V, n0, n, g_theta, workspace);
    if (step.second_order < 0) continue;
    const SecondOrderStep& places = s.second_order[step.second_order];
    Sweep sweep(*this, ctx, step.node, V, n0, n);
    t_x.clear();
    g_x.clear();
    for (Place place : places.t_inputs) t_x.push_back(place == kNowhere ? nullptr : workspace + place * V * n);
    for (Place place : places.g_inputs) g_x.push_back(place == kNowhere ? nullptr : workspace + place * V * n);
    const auto tangents = operands(sweep.node, t_theta);
    const auto targets = operands(sweep.node, g_theta);
    SecondOrder<T> order;
    order.g_y = cotangents_[step.node].data() + n0 * sweep.node.width;
    order.t_x = t_x.data();
    order.t_theta = {tangents.data(), plan_->num_parameters(), packed + V * s.tangent_packed[step.node]};
    order.g_x = g_x.data();
    order.g_theta = targets.data();
    order.stride = plan_->num_parameters();
    plan_->rule(step.node).second_order(sweep.tile, order);
  }
}

template <class T>
void Tape<T>::keep_cotangents(const Context& ctx, const T* g) {
  const int64_t C = plan_->output_width();
  run_tiles(ctx, 1, 1, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, T*) {
    copy<T>(inner, n * C, g + n0 * C, workspace + plan_->schedules().output * n);
    int kept = -1;
    for (const CotangentStep& step : plan_->schedules().cotangent) {
      const Node& node = plan_->nodes()[step.node];
      if (node.curved && step.node != kept) {
        kept = step.node;  // before its first step, which may overwrite the cotangent
        copy<T>(inner, n * node.width, workspace + step.g_output * n, cotangents_[kept].data() + n0 * node.width);
      }
      cotangent_step(inner, step, 1, n0, n, {}, workspace);
    }
  });
}

template <class T>
Tiling Tape<T>::tiling(const Context& ctx, int64_t V) const {
  if (!runs_as_chain(ctx, V)) return tiling(ctx, V, V);
  return {.by_example = true, .tile = mlp_tiling<T>(V, N_, plan_->chain_shape().width).rows, .num_threads = ctx.num_threads};
}

// Whether products run by example on a device: as one kernel, where the plan is a chain.
template <class T>
bool Tape<T>::runs_as_chain(const Context& ctx, int64_t V) const {
  if (!ctx.on_device() || plan_->chain().empty() || N_ == 0 || V == 0 || choice_ == ScheduleChoice::by_operator) return false;
  return choice_ == ScheduleChoice::by_example || mlp_pays<T>(plan_->chain_shape(), V, N_);
}

template <class T>
Mlp<T> Tape<T>::chain(int64_t V) const {
  Mlp<T> mlp;
  mlp.V = V;
  mlp.N = N_;
  mlp.P = plan_->num_parameters();
  const auto offset = [&](const Node& node, size_t k) { return node.is_trainable(k) ? plan_->slots()[node.slots[k]].offset : -1; };
  for (const ChainLink& link : plan_->chain()) {
    const Node& node = plan_->nodes()[link.node];
    const Dense& dense = plan_->storage(link.node).dense;
    MlpLayer<T>& layer = mlp.layers[mlp.depth++];
    layer.inputs = static_cast<int>(dense.inputs);
    layer.outputs = static_cast<int>(dense.outputs);
    layer.weight = theta_at_[node.slots[0]];
    layer.out_stride = static_cast<int>(dense.out_stride);
    layer.in_stride = static_cast<int>(dense.in_stride);
    layer.weight_at = offset(node, 0);
    layer.bias_at = offset(node, 1);
    if (node.is_trainable(0)) layer.x = value(node.inputs[0], 0);
    if (link.scale_by >= 0) layer.scale = states_[link.scale_by][plan_->storage(link.scale_by).derivative].data();
  }
  return mlp;
}

template <class T>
void Tape<T>::run_chain(const Context& ctx, const Mlp<T>& chain) const {
  int64_t written = 0;
  for (int l = 0; l < chain.depth; ++l) {
    const MlpLayer<T>& layer = chain.layers[l];
    written += (layer.weight_at < 0 ? 0 : int64_t{layer.inputs} * layer.outputs) + (layer.bias_at < 0 ? 0 : layer.outputs);
  }
  if (chain.out && written < chain.P) fill_zero<T>(ctx, chain.V * chain.P, chain.out);
  mlp_stub<T>(ctx, chain);
}

// Of a sweep for V right-hand sides that adds to `sums` vectors [P].
template <class T>
Tiling Tape<T>::tiling(const Context& ctx, int64_t V, int64_t sums) const {
  const int num_threads = ctx.num_threads;
  const bool on_device = ctx.on_device();
  const Schedules& s = plan_->schedules();
  int64_t kept = 0;  // tape elements per example that a sweep reads
  for (size_t i = 0; i < plan_->nodes().size(); ++i) {
    for (int64_t width : plan_->storage(static_cast<int>(i)).state_widths) kept += width;
    if (plan_->nodes()[i].curved) kept += plan_->nodes()[i].width;
  }
  for (int id = 0; id < plan_->num_values(); ++id) {
    if (plan_->canonical(id) == id && (plan_->is_kept(id) || id < plan_->num_inputs())) kept += plan_->width(id);
  }
  const int64_t sweep_bytes = std::max<int64_t>(1, std::max(s.sweep_width * V, s.forward_width)) * sizeof(T);
  const int64_t accumulator = sums * plan_->num_parameters() * static_cast<int64_t>(sizeof(T));
  const int64_t example_bytes = sweep_bytes + kept * static_cast<int64_t>(sizeof(T));
  const int64_t cached_tile = std::clamp(kTileBytes / example_bytes, kSmallestTile, kLargestTile);
  // By example pays where accumulators stay in the cache, or where moving them for every tile costs less than writing and reading the activations.
  const int64_t accumulator_traffic = ceil_div(N_, cached_tile) * 2 * accumulator;
  bool by_example = accumulator <= kAccumulatorBytes ||
                    (accumulator_traffic < 2 * N_ * example_bytes && num_threads * accumulator <= kWholeWorkspaceBytes && N_ >= 2 * num_threads);
  if (choice_ != ScheduleChoice::automatic) by_example = choice_ == ScheduleChoice::by_example;
  if (plan_->on_calling_thread() || on_device) by_example = false;
  Tiling tiling;
  tiling.num_threads = num_threads;
  tiling.by_example = by_example;
  if (by_example) {
    tiling.tile = cached_tile;
    // Equal shares: a multiple of the number of threads, tiles of nearly equal size.
    const int64_t tiles = ceil_div(ceil_div(std::max<int64_t>(N_, 1), tiling.tile), num_threads) * num_threads;
    tiling.tile = std::max<int64_t>(1, ceil_div(N_, tiles));
  } else {
    const int64_t budget = on_device ? kDeviceWorkspaceBytes : kWholeWorkspaceBytes;
    tiling.tile = std::clamp<int64_t>(budget / sweep_bytes, std::min<int64_t>(64, std::max<int64_t>(N_, 1)), on_device ? N_ + 1 : 2048);
    const int64_t tiles = ceil_div(std::max<int64_t>(N_, 1), tiling.tile);
    tiling.tile = std::max<int64_t>(1, ceil_div(N_, tiles));
  }
  return tiling;
}

template <class T>
int64_t Tape<T>::cached_bytes() const {
  int64_t bytes = 0;
  for (const auto& b : values_) bytes += b.bytes();
  for (const auto& node : states_) {
    for (const auto& b : node) bytes += b.bytes();
  }
  for (const auto& b : packed_) bytes += b.bytes();
  for (const auto& b : theta_) bytes += b.bytes();
  for (const auto& b : cotangents_) bytes += b.bytes();
  return bytes;
}

template <class T>
int64_t Tape<T>::workspace_bytes(const Context& ctx, int64_t V) const {
  if (runs_as_chain(ctx, V)) return mlp_workspace<T>(V, N_, plan_->num_parameters(), plan_->chain_shape().width);
  const Tiling t = tiling(ctx, V);
  const int64_t sweep = plan_->schedules().sweep_width * V * t.tile;
  const int64_t per_thread = t.by_example ? ctx.num_threads * (sweep + V * plan_->num_parameters()) : sweep;
  return (per_thread + V * plan_->schedules().tangent_packed_size) * static_cast<int64_t>(sizeof(T));
}

// body(context, first example, number of examples, workspace, accumulator): every tile of the data once. `out` [sums, P] receives the sum of what
// the tiles add to their accumulators (null: none wanted). Exceptions do not cross the parallel region.
template <class T>
template <class Body>
void Tape<T>::run_tiles(const Context& ctx, int64_t V, int64_t sums_wanted, T* out, const Body& body) const {
  const Schedules& s = plan_->schedules();
  const Tiling t = tiling(ctx, V, sums_wanted);
  const int64_t size = sums_wanted * plan_->num_parameters();
  const int64_t workspace_size = std::max(s.sweep_width * V, s.forward_width) * t.tile;
  const int64_t num_tiles = ceil_div(N_, t.tile);
  if (out) fill_zero<T>(ctx, size, out);
  if (!t.by_example || t.num_threads == 1 || num_tiles <= 1) {
    Context inner = ctx;
    if (t.by_example && num_tiles > 1) inner.num_threads = 1;
    Scratch<T> workspace(ctx, workspace_size);
    for (int64_t i = 0; i < num_tiles; ++i) body(inner, i * t.tile, std::min(t.tile, N_ - i * t.tile), workspace.data(), out);
    return;
  }
  Scratch<T> accumulators(ctx, out ? t.num_threads * size : 0);  // [threads, V, P]
  T* sums = accumulators.data();
  RegionErrors errors;
#pragma omp parallel num_threads(t.num_threads)
  {
    const int me = omp_get_thread_num(), count = omp_get_num_threads();
    Context inner = ctx;
    inner.num_threads = 1;
    T* sum = out ? sums + me * size : nullptr;
    try {
      Scratch<T> workspace(inner, workspace_size);
      if (out) fill_zero<T>(inner, size, sum);
      for (int64_t i = me; i < num_tiles; i += count) body(inner, i * t.tile, std::min(t.tile, N_ - i * t.tile), workspace.data(), sum);
    } catch (...) {
      errors.keep();
    }
#pragma omp barrier
    if (out && !errors) {
      const int64_t slice = ceil_div(size, count), begin = std::min(size, me * slice), end = std::min(size, begin + slice);
      row_accumulate_stub<T>(inner, count, end - begin, sums + begin, size, out + begin);
    }
  }
  errors.rethrow();
}

template <class T>
void Tape<T>::jvp(const Context& ctx, int64_t V, const T* v, T* t_out) const {
  if (runs_as_chain(ctx, V)) {
    Mlp<T> mlp = chain(V);
    mlp.v = v;
    mlp.t_out = t_out;
    return run_chain(ctx, mlp);
  }
  const int64_t C = plan_->output_width();
  const auto t_theta = slot_rows(v);
  Scratch<T> packed(ctx, V * plan_->schedules().tangent_packed_size);
  const T* packed_data = packed.data();
  pack_tangents(ctx, V, t_theta, packed.data());
  run_tiles(ctx, V, V, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, T*) {
    tangent_tile(inner, V, n0, n, t_theta, packed_data, workspace);
    const T* t_z = workspace + plan_->schedules().output * V * n;
    copy_rows_stub<T>(inner, V, n * C, t_z, n * C, t_out + n0 * C, N_ * C, false);
  });
}

template <class T>
void Tape<T>::vjp(const Context& ctx, int64_t V, const T* g, T* out) const {
  if (runs_as_chain(ctx, V)) {
    Mlp<T> mlp = chain(V);
    mlp.g = g;
    mlp.out = out;
    return run_chain(ctx, mlp);
  }
  const int64_t C = plan_->output_width();
  run_tiles(ctx, V, V, out, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, T* sum) {
    T* g_z = workspace + plan_->schedules().output * V * n;
    copy_rows_stub<T>(inner, V, n * C, g + n0 * C, N_ * C, g_z, n * C, false);
    cotangent_tile(inner, V, n0, n, slot_rows(sum), workspace);
  });
}

template <class T>
void Tape<T>::ggn(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const {
  if (runs_as_chain(ctx, V)) {
    Mlp<T> mlp = chain(V);
    mlp.v = v;
    mlp.hessian = h;
    mlp.out = out;
    return run_chain(ctx, mlp);
  }
  product(ctx, V, v, h, false, out);
}

template <class T>
void Tape<T>::hvp(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const {
  product(ctx, V, v, h, true, out);
}

template <class T>
void Tape<T>::product(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, bool second_order, T* out) const {
  const auto t_theta = slot_rows(v);
  Scratch<T> packed(ctx, V * plan_->schedules().tangent_packed_size);
  const T* packed_data = packed.data();
  pack_tangents(ctx, V, t_theta, packed.data());
  run_tiles(ctx, V, V, out, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, T* sum) {
    tangent_tile(inner, V, n0, n, t_theta, packed_data, workspace);
    output_hessian_stub<T>(inner, h.from(n0), HessianPart::product, V, n, workspace + plan_->schedules().output * V * n);
    if (second_order) {
      curved_cotangent_tile(inner, V, n0, n, t_theta, packed_data, slot_rows(sum), workspace);
    } else {
      cotangent_tile(inner, V, n0, n, slot_rows(sum), workspace);
    }
  });
}

template <class T>
std::vector<Factor<T>> Tape<T>::factors(const Context& ctx, int64_t V, const T* g, int64_t n0, int64_t n, T* workspace, Arena<T>& storage,
                                        bool outer) const {
  const Schedules& s = plan_->schedules();
  const int64_t C = plan_->output_width();
  copy_rows_stub<T>(ctx, V, n * C, g + n0 * C, N_ * C, workspace + s.output * V * n, n * C, false);
  FactorSink<T> sink(ctx, storage, outer);
  for (const CotangentStep& step : s.cotangent) {
    if (step.params) {
      Sweep sweep(*this, ctx, step.node, V, n0, n);
      const T* g_y = workspace + step.g_output * V * n;
      sink.passing(g_y, V * n * sweep.node.width);
      plan_->rule(step.node).per_example(sweep.tile, g_y, sink);
    }
    cotangent_step(ctx, step, V, n0, n, {}, workspace);
  }
  return sink.take();
}

template <class T>
void Tape<T>::each_tile_of_factors(const Context& ctx, int64_t V, const T* g, T* out, const FactorBody& body) const {
  run_tiles(ctx, V, 1, out, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, T* sum) {
    Arena<T> storage(inner);
    body(inner, n0, n, factors(inner, V, g, n0, n, workspace, storage), sum);
  });
}

template class Tape<float>;
template class Tape<double>;

}  // namespace infl
