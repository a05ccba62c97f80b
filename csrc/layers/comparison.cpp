// comparison: y = 1 where x1 is in the relation `kind` to x2 (one of the activations greater ... not_equal), else 0; equal widths.
//
//   forward     y
//   jvp         t_y = 0
//   vjp_input   g_x = 0
//   parameters  none
//   tape        nothing
#include "kernels/arithmetic.h"

#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Comparison final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t kind = node.attribute("kind");
    if (kind < static_cast<int64_t>(Activation::greater) || kind > static_cast<int64_t>(Activation::not_equal)) {
      throw std::invalid_argument("comparison (" + node.name + "): expected kind of a comparison, got " + std::to_string(kind) + ".");
    }
    if (node.inputs.size() != 2 || node.input_widths[0] != node.width || node.input_widths[1] != node.width) {
      throw std::invalid_argument("comparison (" + node.name + "): expected two inputs of " + std::to_string(node.width) +
                                  " elements, got others; expand the smaller one first.");
    }
    return {.keeps_input = {false, false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override {
    const auto kind = static_cast<Activation>(tile.node.attribute("kind"));
    comparison_stub<T>(tile.ctx, kind, tile.n * tile.node.width, tile.x[0], tile.x[1], y);
  }

  void jvp(const Tile<T>& tile, const T* const* /*t_x*/, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    fill_zero<T>(tile.ctx, tile.V * tile.n * tile.node.width, t_y);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* /*g_y*/, const T* /*scale*/, T* g_x, bool accumulate) const override {
    if (!accumulate) fill_zero<T>(tile.ctx, tile.V * tile.n * tile.node.input_widths[i], g_x);
  }
};

INFL_REGISTER_RULE("comparison", Comparison)

}  // namespace
}  // namespace infl
