// activation: y = φ(x), elementwise; attributes kind, a, b (math/activations.h).
//
//   forward      y = φ(x), d = φ'(x)
//   jvp          t_y = d ∘ t_x
//   vjp_input    g_x = d ∘ g_y
//   second_order S_x = φ''(x) ∘ g_y ∘ t_x; not curved where φ is piecewise linear
//   tape         d [N, width]; φ''(x), if curved
#include "kernels/elementwise.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class ActivationRule final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    if (node.attribute("kind") < 0 || node.attribute("kind") >= kNumActivations) {
      throw std::invalid_argument("activation (" + node.name + "): expected kind in [0, " + std::to_string(kNumActivations) + "), got " +
                                  std::to_string(node.attribute("kind")) + ".");
    }
    Storage storage{.keeps_input = {false}, .state_widths = {node.width}, .derivative = 0};
    if (node.curved) storage.state_widths.push_back(node.width);
    return storage;
  }

  bool is_curved(const Node& node) const override { return !is_piecewise_linear(kind(node)); }

  void forward(const Tile<T>& tile, T* y) const override {
    const Node& node = tile.node;
    const T a = static_cast<T>(node.number("a")), b = static_cast<T>(node.number("b"));
    const int64_t size = tile.n * node.width;
    activation_stub<T>(tile.ctx, kind(node), a, b, size, tile.x[0], y, tile.state[0]);
    if (node.curved) second_derivative_stub<T>(tile.ctx, kind(node), a, b, size, tile.x[0], tile.state[1]);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], t_x[0], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], g_y, g_x, accumulate);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    add_scaled_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[1], s.g_y, s.t_x[0], s.g_x[0]);
  }

 private:
  static Activation kind(const Node& node) { return static_cast<Activation>(node.attribute("kind")); }
};

INFL_REGISTER_RULE("activation", ActivationRule)

}  // namespace
}  // namespace infl
