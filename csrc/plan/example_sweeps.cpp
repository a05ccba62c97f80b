// The sweeps of per-example quantities: factors of the gradients, and the gradients' inner products with vectors.
#include "common/interruption.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"
#include "kernels/reduction.h"
#include "per_example/dots.h"
#include "plan/sweep.h"

namespace infl {

template <class T>
void Tape<T>::dots(const Context& ctx, int64_t V, const T* g, int64_t W, const T* u, T* out) const {
  const Schedules& s = plan_->schedules();
  each_group(ctx, W, [&](int64_t first, int64_t count) {
    const auto t_theta = slot_rows(u + first * plan_->num_parameters());
    Scratch<T> packed(ctx, count * s.tangent_packed_size);
    const T* packed_data = packed.data();
    const auto forms = [&](const Storage& storage) { return forms_for_dots(ctx, storage.positions, V, count); };
    pack_tangents(ctx, s, count, t_theta, packed.data(), [&](const Storage& storage) { return !forms(storage); });
    run_tiles(ctx, V + count, count, nullptr, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums) {
      Scratch<T> sums(inner, V * count * n), of_node(inner, count * n);
      fill_zero<T>(inner, V * count * n, sums.data());
      load_cotangents(inner, V, n0, n, g, workspace);
      T* t_y = workspace + s.sweep_width * V * n;
      for (const CotangentStep& step : s.cotangent) {
        const int64_t width = plan_->nodes()[step.node].width;
        const auto cotangent = [&](int64_t v) { return workspace + (step.g_output * V + v * width) * n; };
        if (step.params && forms(plan_->storage(step.node))) {
          const T* of_group = u + first * plan_->num_parameters();
          for (int64_t v = 0; v < V; ++v) add_gradient_dots(inner, step.node, n0, n, cotangent(v), count, of_group, sums.data() + v * count * n);
        } else if (step.params) {
          Sweep sweep(*this, inner, step.node, count, n0, n);
          const std::vector<const T*> no_tangents(sweep.x.size(), nullptr);
          const auto tangents = operands(sweep.node, t_theta);
          const ParameterTangents<T> t{tangents.data(), plan_->num_parameters(), packed_data + count * s.tangent_packed[step.node]};
          plan_->rule(step.node).jvp(sweep.tile, no_tangents.data(), t, nullptr, t_y);
          for (int64_t v = 0; v < V; ++v) {
            weighted_sum_axis_stub<T>(inner, count, n, width, 1, cotangent(v), t_y, of_node.data());
            combine_stub<T>(inner, count * n, T(1), of_node.data(), T(0), nullptr, sums.data() + v * count * n, true);
          }
        }
        cotangent_step(inner, step, V, n0, n, {}, workspace);
      }
      for (int64_t v = 0; v < V; ++v) {
        copy_rows_stub<T>(inner, count, n, sums.data() + v * count * n, n, out + (v * W + first) * N_ + n0, N_, false);
      }
    });
  });
}

template <class T>
void Tape<T>::add_gradient_dots(const Context& ctx, int node, int64_t n0, int64_t n, const T* g_y, int64_t W, const T* u, T* out) const {
  const int64_t together = examples_for_dots<T>(plan_->storage(node).factor_size, n);
  for (int64_t i = 0; i < n; i += together) {
    interruption_point();
    const int64_t count = std::min(together, n - i);
    Arena<T> storage(ctx);
    FactorSink<T> sink(ctx, storage, FactorForm::for_products);
    Sweep sweep(*this, ctx, node, 1, n0 + i, count);
    plan_->rule(node).per_example(sweep.tile, g_y + i * sweep.node.width, sink);
    for (const Factor<T>& factor : sink.take()) {
      add_dots<T>(ctx, factor, count, W, u + plan_->slots()[factor.slot].offset, plan_->num_parameters(), out + i, n);
    }
  }
}

template <class T>
std::vector<Factor<T>> Tape<T>::factors(const Context& ctx, int64_t V, const T* g, int64_t n0, int64_t n, T* workspace, Arena<T>& storage,
                                        FactorForm form) const {
  load_cotangents(ctx, V, n0, n, g, workspace);
  FactorSink<T> sink(ctx, storage, form);
  for (const CotangentStep& step : plan_->schedules().cotangent) {
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
  run_tiles(ctx, V, 1, out, [&](const Context& inner, int64_t n0, int64_t n, T* workspace, Sums sums) {
    Arena<T> storage(inner);
    body(inner, n0, n, factors(inner, V, g, n0, n, workspace, storage), sums.data);
  });
}

#define INFL_EXAMPLE_SWEEPS(T)                                                                                                            \
  template void Tape<T>::dots(const Context&, int64_t, const T*, int64_t, const T*, T*) const;                                            \
  template void Tape<T>::add_gradient_dots(const Context&, int, int64_t, int64_t, const T*, int64_t, const T*, T*) const;                 \
  template std::vector<Factor<T>> Tape<T>::factors(const Context&, int64_t, const T*, int64_t, int64_t, T*, Arena<T>&, FactorForm) const; \
  template void Tape<T>::each_tile_of_factors(const Context&, int64_t, const T*, T*, const FactorBody&) const;
INFL_EXAMPLE_SWEEPS(float)
INFL_EXAMPLE_SWEEPS(double)

}  // namespace infl
