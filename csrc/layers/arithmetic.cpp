// add:     y = a x1 + b x2, two values of equal shape (residual connections)
//   jvp         t_y = a t_x1 + b t_x2
//   vjp_input   g_x1 = a g_y, g_x2 = b g_y
//
// affine:  y = a scale ∘ x + b + shift with constants (numbers a, b; arrays of one example's shape, slots 0 and 1, each may be absent)
//   jvp         t_y = a scale ∘ t_x
//   vjp_input   g_x = a scale ∘ g_y
//
// Neither keeps anything on the tape.
#include "kernels/elementwise.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Add final : public Rule<T> {
 public:
  Storage storage(const Node&) const override { return {.keeps_input = {false, false}, .state_widths = {}}; }

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
class Affine final : public Rule<T> {
 public:
  Storage storage(const Node&) const override { return {.keeps_input = {false}, .state_widths = {}}; }

  void forward(const Tile<T>& tile, T* y) const override {
    const Node& node = tile.node;
    affine_stub<T>(tile.ctx, tile.n, node.width, static_cast<T>(node.number("a")), tile.theta[0], static_cast<T>(node.number("b")), tile.theta[1],
                   tile.x[0], y, false);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    multiply(tile, t_x[0], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    multiply(tile, g_y, g_x, accumulate);
  }

 private:
  static void multiply(const Tile<T>& tile, const T* in, T* out, bool accumulate) {
    const Node& node = tile.node;
    affine_stub<T>(tile.ctx, tile.V * tile.n, node.width, static_cast<T>(node.number("a")), tile.theta[0], T(0), nullptr, in, out, accumulate);
  }
};

INFL_REGISTER_RULE("add", Add)
INFL_REGISTER_RULE("affine", Affine)

}  // namespace
}  // namespace infl
