// activation: y = φ(x), elementwise; attributes kind, a, b (math/activations.h).
//
//   forward     y = φ(x), d = φ'(x)
//   jvp         t_y = d ∘ t_x
//   vjp_input   g_x = d ∘ g_y
//   tape        d [N, width]
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
    return {.keeps_input = {false}, .state_widths = {node.width}, .derivative = 0};
  }

  void forward(const Tile<T>& tile, T* y) const override {
    const Node& node = tile.node;
    activation_stub<T>(tile.ctx, static_cast<Activation>(node.attribute("kind")), static_cast<T>(node.number("a")), static_cast<T>(node.number("b")),
                       tile.n * node.width, tile.x[0], y, tile.state[0]);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], t_x[0], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], g_y, g_x, accumulate);
  }
};

INFL_REGISTER_RULE("activation", ActivationRule)

}  // namespace
}  // namespace infl
