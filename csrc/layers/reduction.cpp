// reduce: y = Σ x over some axes of an example, or its mean (attribute mean); lists `shape` and `reduced` (per axis 0 or 1).
//   jvp          t_y = Σ t_x
//   vjp_input    g_x = g_y at every place that was summed
//   tape         nothing
//   Neighbouring axes with equal flags are one; each block of summed axes is a pass over [rows, size, inner].
//
// reduce_nonlinear: y = ρ(x) over one axis of an example [outer, size, inner]; attributes kind, a (kernels/reduction.h).
//   forward      y = ρ(x), d = ∂y/∂x
//   jvp          t_y = Σ d ∘ t_x
//   vjp_input    g_x = d ∘ g_y
//   second_order S_x = g_y ∇²ρ t_x; not curved where ρ is piecewise linear (extrema, sums of absolute values)
//   tape         d [N, width of x]; if curved y, and x for a product
//
// cumulative_sum: y_s = Σ_{s' <= s} x_s' over one axis of an example [outer, size, inner].
//   jvp          the same of t_x
//   vjp_input    g_x_s = Σ_{s' >= s} g_y_s'
//   tape         nothing
//
// None has parameters.
#include "kernels/reduction.h"

#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "layers/rule.h"

namespace infl {
namespace {

struct Axis {
  explicit Axis(const Node& node) : outer(node.attribute("outer")), size(node.attribute("size")), inner(node.attribute("inner")) {}
  int64_t outer, size, inner;

  void check(const Node& node, int64_t width) const {
    if (outer <= 0 || size <= 0 || inner <= 0 || outer * size * inner != node.input_widths[0] || node.width != width) {
      throw std::invalid_argument(node.rule + " (" + node.name + "): expected an input of outer * size * inner = " + std::to_string(outer) + " * " +
                                  std::to_string(size) + " * " + std::to_string(inner) + " elements and an output of " + std::to_string(width) +
                                  ", got " + std::to_string(node.input_widths[0]) + " and " + std::to_string(node.width) + ".");
    }
  }
};

// A pass over [rows · outer, size, inner], rows = V·n examples.
struct Pass {
  int64_t outer, size, inner;
};

template <class T>
class Reduce final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const auto& shape = node.list("shape");
    const auto& reduced = node.list("reduced");
    int64_t in = 1, out = 1;
    for (size_t k = 0; k < shape.size(); ++k) {
      in *= shape[k];
      out *= k < reduced.size() && reduced[k] ? 1 : shape[k];
    }
    if (shape.size() != reduced.size() || in != node.input_widths[0] || out != node.width || in <= 0) {
      throw std::invalid_argument("reduce (" + node.name + "): expected lists shape and reduced of equal length that lead from " +
                                  std::to_string(node.input_widths[0]) + " to " + std::to_string(node.width) + " elements, got from " +
                                  std::to_string(in) + " to " + std::to_string(out) + ".");
    }
    return {.keeps_input = {false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { sum(tile, tile.n, tile.x[0], y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    sum(tile, tile.V * tile.n, t_x[0], t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const int64_t rows = tile.V * tile.n;
    const std::vector<Pass> all = passes(tile.node);
    if (all.empty()) return combine_stub<T>(tile.ctx, rows * tile.node.width, T(1), g_y, T(0), nullptr, g_x, accumulate);
    Between between(tile.ctx, rows, all);
    const T* from = g_y;
    for (size_t k = all.size(); k-- > 0;) {
      const Pass& p = all[k];
      const bool last = k == 0;
      T* to = last ? g_x : between.after(k - 1);
      broadcast_axis_stub<T>(tile.ctx, rows * p.outer, p.size, p.inner, last ? factor(tile.node) : T(1), from, to, last && accumulate);
      from = to;
    }
  }

 private:
  static T factor(const Node& node) { return node.attribute("mean") ? T(node.width) / T(node.input_widths[0]) : T(1); }

  // What lies between the passes, two buffers in turn: a pass reads one and writes the other, and later passes leave less.
  class Between {
   public:
    Between(const Context& ctx, int64_t rows, const std::vector<Pass>& all)
        : even_(ctx, all.size() > 1 ? rows * all[0].outer * all[0].inner : 0), odd_(ctx, all.size() > 2 ? rows * all[1].outer * all[1].inner : 0) {}
    T* after(size_t pass) { return (pass % 2 == 0 ? even_ : odd_).data(); }

   private:
    Scratch<T> even_, odd_;
  };

  // The passes of a sum, last block of axes first, so that later ones are over less.
  static std::vector<Pass> passes(const Node& node) {
    const auto& shape = node.list("shape");
    const auto& reduced = node.list("reduced");
    std::vector<Pass> all;
    int64_t inner = 1, outer = node.input_widths[0];
    for (size_t k = shape.size(); k > 0;) {
      int64_t block = 1;
      const bool flag = reduced[k - 1] != 0;
      // an axis of length one goes with either
      for (; k > 0 && ((reduced[k - 1] != 0) == flag || shape[k - 1] == 1); --k) block *= shape[k - 1];
      outer /= block;
      if (flag && block > 1) all.push_back({outer, block, inner});
      if (!flag) inner *= block;
    }
    return all;
  }

  static void sum(const Tile<T>& tile, int64_t rows, const T* x, T* y) {
    const std::vector<Pass> all = passes(tile.node);
    if (all.empty()) return combine_stub<T>(tile.ctx, rows * tile.node.width, T(1), x, T(0), nullptr, y, false);
    Between between(tile.ctx, rows, all);
    for (size_t k = 0; k < all.size(); ++k) {
      const Pass& p = all[k];
      const bool last = k + 1 == all.size();
      T* to = last ? y : between.after(k);
      sum_axis_stub<T>(tile.ctx, rows * p.outer, p.size, p.inner, last ? factor(tile.node) : T(1), x, to);
      x = to;
    }
  }
};

template <class T>
class ReduceNonlinear final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const Axis axis(node);
    axis.check(node, axis.outer * axis.inner);
    if (node.attribute("kind") < 0 || node.attribute("kind") >= kNumReductions) {
      throw std::invalid_argument("reduce_nonlinear (" + node.name + "): expected kind in [0, " + std::to_string(kNumReductions) + "), got " +
                                  std::to_string(node.attribute("kind")) + ".");
    }
    Storage storage{.keeps_input = {node.curved && kind(node) == Reduction::product}, .state_widths = {node.input_widths[0]}};
    if (node.curved) storage.state_widths.push_back(node.width);
    return storage;
  }

  bool is_curved(const Node& node) const override { return !is_piecewise_linear(kind(node)); }

  void forward(const Tile<T>& tile, T* y) const override {
    const Axis axis(tile.node);
    nonlinear_reduction_stub<T>(tile.ctx, kind(tile.node), static_cast<T>(tile.node.number("a")), tile.n * axis.outer, axis.size, axis.inner,
                                tile.x[0], y, tile.state[0]);
    if (tile.node.curved) combine_stub<T>(tile.ctx, tile.n * tile.node.width, T(1), y, T(0), nullptr, tile.state[1], false);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    const Axis axis(tile.node);
    weighted_sum_axis_stub<T>(tile.ctx, tile.V, tile.n * axis.outer, axis.size, axis.inner, tile.state[0], t_x[0], t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const Axis axis(tile.node);
    weighted_broadcast_axis_stub<T>(tile.ctx, tile.V, tile.n * axis.outer, axis.size, axis.inner, tile.state[0], g_y, g_x, accumulate);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const Axis axis(tile.node);
    reduction_second_order_stub<T>(tile.ctx, kind(tile.node), static_cast<T>(tile.node.number("a")), tile.V, tile.n * axis.outer, axis.size,
                                   axis.inner, tile.x[0], tile.state[1], tile.state[0], s.g_y, s.t_x[0], s.g_x[0]);
  }

 private:
  static Reduction kind(const Node& node) { return static_cast<Reduction>(node.attribute("kind")); }
};

template <class T>
class CumulativeSum final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    Axis(node).check(node, node.input_widths[0]);
    return {.keeps_input = {false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { sum(tile, tile.n, false, tile.x[0], y, false); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    sum(tile, tile.V * tile.n, false, t_x[0], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    sum(tile, tile.V * tile.n, true, g_y, g_x, accumulate);
  }

 private:
  static void sum(const Tile<T>& tile, int64_t rows, bool reverse, const T* in, T* out, bool accumulate) {
    const Axis axis(tile.node);
    cumulative_sum_stub<T>(tile.ctx, rows * axis.outer, axis.size, axis.inner, reverse, in, out, accumulate);
  }
};

INFL_REGISTER_RULE("reduce", Reduce)
INFL_REGISTER_RULE("reduce_nonlinear", ReduceNonlinear)
INFL_REGISTER_RULE("cumulative_sum", CumulativeSum)

}  // namespace
}  // namespace infl
