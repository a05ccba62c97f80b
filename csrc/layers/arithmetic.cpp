// Arithmetic on two values of equal shape (an expansion, if any, comes before: layers/movement.cpp). No parameters.
//
// add:      y = a x1 + b x2 (numbers a, b)         t_y = a t_x1 + b t_x2                    tape: nothing
// multiply: y = x1 ∘ x2                            t_y = x2 ∘ t_x1 + x1 ∘ t_x2              tape: each factor if the other has a tangent
// extremum: y = max(x1, x2), min if `minimum`      t_y = w ∘ t_x1 + (1 − w) ∘ t_x2          tape: w, 1/2 where they are equal
// where:    y = m ? x1 : x2, chosen and not multiplied, so that NaN in the other branch does not show; t_y likewise
//           m is input 0 (has_mask) or slot 0 (one example's, constant); then the branches that are values (has_first, has_second), the
//           others are numbers a and b; the derivative by m is 0                              tape: m
//
// vjp_input is the coefficient of t_xi times g_y; the same value may stand on both sides.
// second_order, of multiply: S_x1 = g_y ∘ t_x2, S_x2 = g_y ∘ t_x1; curved if both have tangents.
#include "kernels/arithmetic.h"

#include <algorithm>

#include "kernels/elementwise.h"
#include "layers/rule.h"

namespace infl {
namespace {

void expect_equal_widths(const Node& node) {
  if (node.inputs.size() != 2 || node.input_widths[0] != node.width || node.input_widths[1] != node.width) {
    throw std::invalid_argument(node.rule + " (" + node.name + "): expected two inputs of " + std::to_string(node.width) +
                                " elements, got others; expand the smaller one first.");
  }
}

template <class T>
class Add final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    expect_equal_widths(node);
    return {.keeps_input = {false, false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { combine(tile, tile.n * tile.node.width, tile.x, y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    combine(tile, tile.V * tile.n * tile.node.width, t_x, t_y);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    combine_stub<T>(tile.ctx, tile.V * tile.n * tile.node.width, coefficient(tile, i), g_y, T(0), nullptr, g_x, accumulate);
  }

 private:
  static T coefficient(const Tile<T>& tile, int i) { return static_cast<T>(tile.node.number(i == 0 ? "a" : "b")); }

  static void combine(const Tile<T>& tile, int64_t size, const T* const* x, T* y) {
    const T a = coefficient(tile, 0), b = coefficient(tile, 1);
    if (x[0] == nullptr) {
      combine_stub<T>(tile.ctx, size, b, x[1], T(0), nullptr, y, false);
    } else {
      combine_stub<T>(tile.ctx, size, a, x[0], b, x[1], y, false);
    }
  }
};

template <class T>
class Multiply final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    expect_equal_widths(node);
    return {.keeps_input = {node.needs_tangent[1], node.needs_tangent[0]}, .state_widths = {}};
  }

  bool is_curved(const Node& node) const override { return node.needs_tangent[0] && node.needs_tangent[1]; }

  void forward(const Tile<T>& tile, T* y) const override { scale_stub<T>(tile.ctx, 1, tile.n * tile.node.width, tile.x[0], tile.x[1], y, false); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    const int64_t size = tile.n * tile.node.width;
    if (t_x[0] && t_x[1]) {
      product_tangent_stub<T>(tile.ctx, tile.V, size, tile.x[1], t_x[0], tile.x[0], t_x[1], t_y);
    } else {
      const int i = t_x[0] ? 0 : 1;
      scale_stub<T>(tile.ctx, tile.V, size, tile.x[1 - i], t_x[i], t_y, false);
    }
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.x[1 - i], g_y, g_x, accumulate);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    for (int i : {0, 1}) scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, s.g_y, s.t_x[1 - i], s.g_x[i], true);
  }
};

template <class T>
class Extremum final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    expect_equal_widths(node);
    node.attribute("minimum");
    return {.keeps_input = {false, false}, .state_widths = {node.width}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override {
    const T sign = tile.node.attribute("minimum") != 0 ? T(-1) : T(1);
    extremum_stub<T>(tile.ctx, tile.n * tile.node.width, sign, tile.x[0], tile.x[1], y, tile.state[0]);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    blend_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], t_x[0], t_x[1], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    blend_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], i == 0 ? g_y : nullptr, i == 0 ? nullptr : g_y, g_x, accumulate);
  }
};

template <class T>
class Where final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const Operands o(node);
    const bool equal = std::all_of(node.input_widths.begin(), node.input_widths.end(), [&](int64_t width) { return width == node.width; });
    const bool counted = static_cast<int64_t>(node.inputs.size()) == o.count;
    if (!counted || !equal || (o.mask < 0 && (!node.has_slot(0) || node.slot_sizes[0] != node.width))) {
      throw std::invalid_argument("where (" + node.name + "): expected a mask and branches of " + std::to_string(node.width) +
                                  " elements, got others; expand the smaller one first.");
    }
    if (node.is_trainable(0)) throw std::invalid_argument("where (" + node.name + "): expected a constant mask in slot 0, got a trained one.");
    Storage storage;
    storage.keeps_input.assign(node.inputs.size(), false);
    if (o.mask >= 0) storage.keeps_input[o.mask] = true;
    return storage;
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override {
    choose(tile, 1, tile.x, static_cast<T>(tile.node.number("a")), static_cast<T>(tile.node.number("b")), y, false);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    choose(tile, tile.V, t_x, T(0), T(0), t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const T* branches[3] = {nullptr, nullptr, nullptr};
    branches[i] = g_y;  // for the mask, which may depend on parameters as a comparison does: neither branch, hence zero
    choose(tile, tile.V, branches, T(0), T(0), g_x, accumulate);
  }

 private:
  // Places of mask and branches among the inputs, −1 where they are a slot or a number.
  struct Operands {
    explicit Operands(const Node& node) {
      if (node.attribute("has_mask") != 0) mask = count++;
      if (node.attribute("has_first") != 0) first = count++;
      if (node.attribute("has_second") != 0) second = count++;
    }
    int count = 0, mask = -1, first = -1, second = -1;
  };

  static void choose(const Tile<T>& tile, int64_t V, const T* const* x, T a, T b, T* out, bool accumulate) {
    const Operands o(tile.node);
    const T* mask = o.mask >= 0 ? tile.x[o.mask] : tile.theta[0];
    where_stub<T>(tile.ctx, V, tile.n, tile.node.width, mask, o.mask >= 0 ? tile.node.width : 0, o.first >= 0 ? x[o.first] : nullptr, a,
                  o.second >= 0 ? x[o.second] : nullptr, b, out, accumulate);
  }
};

INFL_REGISTER_RULE("add", Add)
INFL_REGISTER_RULE("multiply", Multiply)
INFL_REGISTER_RULE("extremum", Extremum)
INFL_REGISTER_RULE("where", Where)

}  // namespace
}  // namespace infl
