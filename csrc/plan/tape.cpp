#include "plan/tape.h"

#include <algorithm>
#include <span>
#include <stdexcept>

#include "common/interruption.h"
#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"
#include "kernels/output_jacobian.h"
#include "plan/sweep.h"

namespace infl {

template <class T>
Tape<T>::Tape(const Context& ctx, std::shared_ptr<const Plan<T>> plan, int64_t N, std::vector<const T*> inputs, int64_t num_sets)
    : plan_(std::move(plan)),
      N_(N),
      sets_(num_sets),
      inputs_(std::move(inputs)),
      prepared_(plan_->nodes().size()),
      values_(plan_->num_values()),
      states_(plan_->nodes().size()),
      packed_(plan_->nodes().size()),
      theta_(plan_->slots().size()),
      theta_at_(plan_->slots().size()),
      cotangents_(plan_->nodes().size()) {
  const auto rows = [&](int id) { return (plan_->needs_tangent(id) ? sets_ : 1) * N_; };
  for (int id = 0; id < plan_->num_values(); ++id) {
    if (plan_->canonical(id) == id && plan_->is_kept(id)) values_[id].resize(ctx, rows(id) * plan_->width(id));
  }
  for (size_t i = 0; i < states_.size(); ++i) {
    const Storage& storage = plan_->storage(static_cast<int>(i));
    const Node& node = plan_->nodes()[i];
    for (int64_t width : storage.state_widths) states_[i].emplace_back(ctx, rows(node.output) * width);
    const std::vector<Part> shares = parts(static_cast<int>(i), N_);
    if (shares[0].sets == 1) packed_[i].resize(ctx, static_cast<int64_t>(shares.size()) * storage.packed_size);
    if (node.curved) cotangents_[i].resize(ctx, N_ * node.width);
  }
}

template <class T>
std::vector<typename Tape<T>::Part> Tape<T>::parts(int index, int64_t n) const {
  const Node& node = plan_->nodes()[index];
  if (sets_ == 1 || !plan_->needs_tangent(node.output)) return {{0, 1, n}};
  const auto any = [](const std::vector<bool>& flags, bool wanted) { return std::find(flags.begin(), flags.end(), wanted) != flags.end(); };
  if (!any(node.trainable, true) && !any(node.needs_tangent, false)) return {{0, 1, sets_ * n}};
  if (plan_->rule(index).takes_sets(node)) return {{0, sets_, n}};
  std::vector<Part> each;
  for (int64_t set = 0; set < sets_; ++set) each.push_back({set, 1, n});
  return each;
}

// Elements of a value [sets, n, width] before a part's first set.
template <class T>
int64_t Tape<T>::skipped(int id, const Part& part, int64_t n) const {
  return plan_->needs_tangent(id) ? part.first * n * plan_->width(id) : 0;
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

template <class T>
void Tape<T>::linearize(const Context& ctx, const std::vector<const T*>& theta, bool borrow, int64_t stride) {
  theta_at_ = theta;
  theta_stride_ = stride;
  jacobians_kept_ = false;
  for (size_t s = 0; s < theta_.size() && sets_ == 1 && !borrow; ++s) {
    theta_[s].resize(ctx, plan_->slots()[s].size);
    copy<T>(ctx, plan_->slots()[s].size, theta[s], theta_[s].data());
    theta_at_[s] = theta_[s].data();
  }
  for (size_t i = 0; i < packed_.size(); ++i) {
    interruption_point();
    for (const Part& part : parts(static_cast<int>(i), 0)) {
      Sweep sweep(*this, ctx, static_cast<int>(i), 1, 0, part);
      if (part.sets == 1) plan_->rule(static_cast<int>(i)).pack(sweep.tile);
    }
  }
  run_tiles(ctx, 1, 1, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums) { forward_tile(inner, n0, n, workspace); });
}

template <class T>
void Tape<T>::forward_tile(const Context& ctx, int64_t n0, int64_t n, T* workspace) {
  for (const ForwardStep& step : plan_->schedules().forward) {
    interruption_point();
    for (const Part& part : parts(step.node, n)) {
      Sweep sweep(*this, ctx, step.node, 1, n0, part);
      for (size_t k = 0; k < sweep.x.size(); ++k) {
        const int id = plan_->canonical(sweep.node.inputs[k]);
        const T* kept = value(id, n0);
        sweep.x[k] = (kept ? kept : workspace + step.inputs[k] * sets_ * n) + skipped(id, part, n);
      }
      const int output = sweep.node.output;
      T* y = step.output == kNowhere ? const_cast<T*>(value(output, n0)) : workspace + step.output * sets_ * n;
      plan_->rule(step.node).forward(sweep.tile, y + skipped(output, part, n));
    }
  }
}

template <class T>
void Tape<T>::tangent_tile(const Context& ctx, const Schedules& s, bool untransposed, int64_t V, int64_t n0, int64_t n,
                           const std::vector<const T*>& t_theta, bool ahead, T* packed, T* workspace) const {
  std::vector<const T*> t_x;
  for (const TangentStep& step : std::span(s.tangent).first(s.tangent.size() - (untransposed ? 1 : 0))) {
    interruption_point();
    Sweep sweep(*this, ctx, step.node, V, n0, n);
    t_x.clear();
    for (Place place : step.inputs) t_x.push_back(place == kNowhere ? nullptr : workspace + place * V * n);
    const auto tangents = operands(sweep.node, t_theta);
    const T* scale = step.scale_by < 0 ? nullptr : Sweep(*this, ctx, step.scale_by, V, n0, n).state[plan_->storage(step.scale_by).derivative];
    const ParameterTangents<T> t{tangents.data(), plan_->num_parameters(), packed + (ahead ? V * s.tangent_packed[step.node] : 0)};
    if (!ahead && plan_->storage(step.node).tangent_packed_size > 0) plan_->rule(step.node).pack_tangents(sweep.tile, t, packed);
    plan_->rule(step.node).jvp(sweep.tile, t_x.data(), t, scale, workspace + step.output * V * n);
  }
}

template <class T>
void Tape<T>::load_cotangents(const Context& ctx, int64_t V, int64_t n0, int64_t n, const T* g, T* workspace) const {
  const int64_t C = plan_->output_width(), rows = V * sets_;
  copy_rows_stub<T>(ctx, rows, n * C, g + n0 * C, N_ * C, workspace + plan_->schedules().output * rows * n, n * C, false);
}

template <class T>
void Tape<T>::cotangent_tile(const Context& ctx, const Schedules& s, bool untransposed, int64_t V, int64_t n0, int64_t n, Sums sums,
                             T* workspace) const {
  const auto g_theta = slot_rows(sums.data);
  for (const CotangentStep& step : std::span(s.cotangent).subspan(untransposed ? 1 : 0))
    cotangent_step(ctx, step, V, n0, n, g_theta, workspace, sums.first);
}

// `g_theta` empty: parameters are not wanted.
template <class T>
void Tape<T>::cotangent_step(const Context& ctx, const CotangentStep& step, int64_t V, int64_t n0, int64_t n, const std::vector<T*>& g_theta,
                             T* workspace, bool first) const {
  interruption_point();
  const Rule<T>& rule = plan_->rule(step.node);
  for (const Part& part : parts(step.node, n)) {
    Sweep sweep(*this, ctx, step.node, V, n0, part);
    const T* g_y = workspace + step.g_output * V * sets_ * n + skipped(sweep.node.output, part, n);
    if (step.params && !g_theta.empty()) {
      auto targets = operands(sweep.node, g_theta);
      for (T*& target : targets) target += target ? part.first * plan_->num_parameters() : 0;
      sweep.tile.first = first && step.writes;
      rule.vjp_params(sweep.tile, g_y, targets.data(), plan_->num_parameters());
    }
    if (step.input >= 0) {
      const T* scale = step.scale_by < 0 ? nullptr : Sweep(*this, ctx, step.scale_by, V, n0, part).state[plan_->storage(step.scale_by).derivative];
      T* g_x = workspace + step.g_input * V * sets_ * n + skipped(sweep.node.inputs[step.input], part, n);
      rule.vjp_input(sweep.tile, step.input, g_y, scale, g_x, step.accumulate);
    }
  }
}

// The tangent of the cotangent sweep: every curved node adds its second-order term.
template <class T>
void Tape<T>::curved_cotangent_tile(const Context& ctx, bool untransposed, int64_t V, int64_t n0, int64_t n, const std::vector<const T*>& t_theta,
                                    const T* packed, Sums sums, T* workspace) const {
  const Schedules& s = plan_->schedules();
  const auto g_theta = slot_rows(sums.data);
  std::vector<const T*> t_x;
  std::vector<T*> g_x;
  for (const CotangentStep& step : std::span(s.cotangent).subspan(untransposed ? 1 : 0)) {
    cotangent_step(ctx, step, V, n0, n, g_theta, workspace, sums.first);
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
  run_tiles(ctx, 1, 1, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums) {
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

// Zeroes num vectors [P], of every set: for the first tile of a cotangent sweep what its steps only add to, else all.
template <class T>
void Tape<T>::clear(const Context& ctx, int64_t num, const Schedules& s, bool first, T* sums) const {
  const int64_t P = plan_->num_parameters();
  if (!first) return fill_zero<T>(ctx, num * sets_ * P, sums);
  for (int64_t v = 0; v < num; ++v) {
    for (const auto& [begin, end] : s.added) fill_zero<T>(ctx, end - begin, sums + v * P + begin);
  }
}

template <class T>
void Tape<T>::jvp(const Context& ctx, int64_t V, const T* v, T* t_out) const {
  if (runs_as_chain(ctx, V)) return run_chain(ctx, {.V = V, .v = v, .t_out = t_out});
  const int64_t C = plan_->output_width();
  each_group(ctx, V, [&](int64_t first, int64_t count) {
    const auto t_theta = slot_rows(v + first * plan_->num_parameters());
    const Schedules& s = plan_->schedules();
    const bool ahead = packs_ahead(ctx, count, false);
    Scratch<T> packed(ctx, count * (ahead ? s.tangent_packed_size : s.most_tangent_packed));
    T* packed_data = packed.data();
    if (ahead) pack_tangents(ctx, s, count, t_theta, packed_data);
    run_tiles(ctx, count, count, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums) {
      tangent_tile(inner, s, false, count, n0, n, t_theta, ahead, packed_data, workspace);
      const T* t_z = workspace + plan_->schedules().output * count * n;
      copy_rows_stub<T>(inner, count, n * C, t_z, n * C, t_out + (first * N_ + n0) * C, N_ * C, false);
    });
  });
}

template <class T>
void Tape<T>::vjp(const Context& ctx, int64_t V, const T* g, T* out) const {
  if (runs_as_chain(ctx, V)) return run_chain(ctx, {.V = V, .g = g, .out = out});
  each_group(ctx, V, [&](int64_t first, int64_t count) {
    const auto of_tile = [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums sums) {
      load_cotangents(inner, count, n0, n, g + first * sets_ * N_ * plan_->output_width(), workspace);
      cotangent_tile(inner, plan_->schedules(), false, count, n0, n, sums, workspace);
    };
    run_tiles(ctx, count, count, out + first * plan_->num_parameters(), of_tile, false, true);
  });
}

template <class T>
void Tape<T>::descend(const Context& ctx, const T* g, const Descent<T>& descent, const Moved<T>& moved) const {
  const Schedules& s = plan_->schedules();
  const int64_t P = plan_->num_parameters(), C = plan_->output_width();
  Scratch<T> gradient(ctx, sets_ * P);
  if (ctx.on_device() || sets_ > 1 || !is_whole(ctx)) {  // with several tiles, a gradient is complete after the last one only
    vjp(ctx, 1, g, gradient.data());
    Descent<T> of_all = descent;
    of_all.anchor_size = sets_ > 1 ? P : 0;
    infl::descend<T>(ctx, 0, sets_ * P, of_all, gradient.data(), moved);
    return;
  }
  std::vector<T*> sums = slot_rows(gradient.data());
  std::vector<std::vector<size_t>> early(plan_->nodes().size());  // per node: the operands that move during the sweep
  std::vector<std::pair<int64_t, int64_t>> moved_early;           // their begin and end in the flat vector
  for (const CotangentStep& step : s.cotangent) {
    const Node& node = plan_->nodes()[step.node];
    for (size_t k = 0; step.params && k < node.slots.size(); ++k) {
      if (!node.is_trainable(k) || !plan_->is_read_once(node.slots[k]) || !plan_->rule(step.node).descends(node, k)) continue;
      const Slot& slot = plan_->slots()[node.slots[k]];
      early[step.node].push_back(k);
      moved_early.emplace_back(slot.offset, slot.offset + slot.size);
      sums[node.slots[k]] = nullptr;
    }
  }
  std::sort(moved_early.begin(), moved_early.end());
  moved_early.emplace_back(P, P);
  const auto each_other_part = [&](const auto& body) {
    int64_t at = 0;
    for (const auto& [begin, end] : moved_early) {
      if (begin > at) body(at, begin - at);
      at = end;
    }
  };
  each_other_part([&](int64_t begin, int64_t size) { fill_zero<T>(ctx, size, gradient.data() + begin); });
  Scratch<T> workspace(ctx, s.sweep_width * N_);
  copy<T>(ctx, N_ * C, g, workspace.data() + s.output * N_);
  for (const CotangentStep& step : s.cotangent) {
    if (step.params) {
      Sweep sweep(*this, ctx, step.node, 1, 0, N_);
      for (const size_t k : early[step.node]) {
        const int64_t begin = plan_->slots()[sweep.node.slots[k]].offset;
        plan_->rule(step.node).descend(sweep.tile, k, workspace.data() + step.g_output * N_, descent, moved, begin);
      }
    }
    cotangent_step(ctx, step, 1, 0, N_, sums, workspace.data());
  }
  each_other_part([&](int64_t begin, int64_t size) { infl::descend<T>(ctx, begin, size, descent, gradient.data() + begin, moved); });
}

template <class T>
void Tape<T>::ggn(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const {
  if (runs_as_chain(ctx, V) && !h.untransposed) return run_chain(ctx, {.V = V, .v = v, .hessian = h, .out = out});
  product(ctx, V, v, h, false, out);
}

template <class T>
void Tape<T>::hvp(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, T* out) const {
  product(ctx, V, v, h, true, out);
}

template <class T>
void Tape<T>::product(const Context& ctx, int64_t V, const T* v, const OutputHessian<T>& h, bool second_order, T* out) const {
  const bool shortened = takes_shortcuts(ctx, V);
  const Schedules& s = plan_->schedules(shortened);
  const int64_t C = plan_->output_width();
  if (h.untransposed && h.C != h.positions * plan_->untransposed_classes())
    throw std::invalid_argument("Tape: expected a loss Hessian of this network's outputs, got one of outputs before a transposition.");
  if (shortened) keep_jacobians(ctx);
  // body(a shortcut's Jacobians of a tile, its width, where its tangent and cotangent are)
  const auto each_shortcut = [&](int64_t count, int64_t n0, int64_t n, T* workspace, const auto& body) {
    for (size_t k = 0; shortened && k < jacobians_.size(); ++k) {
      const Shortcut& shortcut = plan_->shortcuts()[k];
      body(jacobians_[k].data() + n0 * C * shortcut.width, shortcut.width, workspace + shortcut.place * count * n);
    }
  };
  each_group(ctx, V, [&](int64_t first, int64_t count) {
    const int64_t at = first * plan_->num_parameters();
    const auto t_theta = slot_rows(v + at);
    const bool ahead = packs_ahead(ctx, count, shortened);
    Scratch<T> packed(ctx, count * (ahead ? s.tangent_packed_size : s.most_tangent_packed));
    T* packed_data = packed.data();
    if (ahead) pack_tangents(ctx, s, count, t_theta, packed_data);
    const auto of_tile = [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums sums) {
      T* z = workspace + (h.untransposed ? s.untransposed : s.output) * count * n;
      tangent_tile(inner, s, h.untransposed, count, n0, n, t_theta, ahead, packed_data, workspace);
      each_shortcut(count, n0, n, workspace,
                    [&](const T* B, int64_t width, const T* t_u) { output_jacobian_stub<T>(inner, count, n, C, width, B, t_u, z); });
      output_hessian_stub<T>(inner, h.from(n0), HessianPart::product, count, n, z);
      each_shortcut(count, n0, n, workspace,
                    [&](const T* B, int64_t width, T* g_u) { output_jacobian_transposed_stub<T>(inner, count, n, C, width, B, z, g_u); });
      if (second_order) {
        curved_cotangent_tile(inner, h.untransposed, count, n0, n, t_theta, packed_data, sums, workspace);
      } else {
        cotangent_tile(inner, s, h.untransposed, count, n0, n, sums, workspace);
      }
    };
    run_tiles(ctx, count, count, out + at, of_tile, shortened, true);
  });
}

// By cotangent sweeps of unit vectors at the outputs; where the node that computes a shortcut's value begins, its cotangent is complete. Whoever
// comes meanwhile makes them, too: nobody waits for a sweep, in which a signal handler may ask for the same product.
template <class T>
void Tape<T>::keep_jacobians(const Context& of_product) const {
  std::vector<Buffer<T>> jacobians;
  {
    const std::lock_guard<std::mutex> guard(keeping_jacobians_);
    if (jacobians_kept_) return;
    jacobians.swap(jacobians_);  // the memory of those of another point
  }
  Context ctx = of_product;
  ctx.precision = Precision::full;  // they belong to the point, which products of every precision share
  const std::vector<Shortcut>& shortcuts = plan_->shortcuts();
  const Schedules& s = plan_->schedules();
  const int64_t C = plan_->output_width();
  jacobians.resize(shortcuts.size());
  for (size_t k = 0; k < shortcuts.size(); ++k) jacobians[k].resize(ctx, N_ * C * shortcuts[k].width);
  each_group(ctx, C, [&](int64_t first, int64_t count) {
    run_tiles(ctx, count, 1, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums) {
      T* g = workspace + s.output * count * n;
      fill_zero<T>(inner, count * n * C, g);
      for (int64_t v = 0; v < count; ++v) {
        for (int64_t i = 0; i < n; ++i) g[(v * n + i) * C + first + v] = 1;
      }
      size_t left = shortcuts.size();  // those before it are further down
      for (const CotangentStep& step : s.cotangent) {
        if (plan_->producer(shortcuts[left - 1].value) == step.node) {
          const int64_t width = shortcuts[--left].width;
          for (int64_t v = 0; v < count; ++v) {
            T* B = jacobians[left].data() + (n0 * C + first + v) * width;
            copy_rows_stub<T>(inner, n, width, workspace + (step.g_output * count + v * width) * n, width, B, C * width, false);
          }
          if (left == 0) return;
        }
        cotangent_step(inner, step, count, n0, n, {}, workspace);
      }
    });
  });
  const std::lock_guard<std::mutex> guard(keeping_jacobians_);
  if (jacobians_kept_) return;
  jacobians_ = std::move(jacobians);
  jacobians_kept_ = true;
}

template class Tape<float>;
template class Tape<double>;

}  // namespace infl
