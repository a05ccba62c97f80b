// identity: y = x. Does nothing, in every direction: the rule to copy for a new operator.
//
//   forward     y   = x
//   jvp         t_y = t_x
//   vjp_input   g_x = g_y
//   parameters  none
//   tape        nothing
#include "kernels/elementwise.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Identity final : public Rule<T> {
 public:
  // Nothing of the forward pass is needed later: no input kept, no state.
  Storage storage(const Node&) const override { return {.keeps_input = {false}, .state_widths = {}}; }

  // Linear in everything: no second_order.
  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override {
    combine_stub<T>(tile.ctx, tile.n * tile.node.width, T(1), tile.x[0], T(0), nullptr, y, false);
  }

  // All V right-hand sides at once. An operator with several inputs checks each t_x[i] for null (zero).
  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    combine_stub<T>(tile.ctx, tile.V * tile.n * tile.node.width, T(1), t_x[0], T(0), nullptr, t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    combine_stub<T>(tile.ctx, tile.V * tile.n * tile.node.width, T(1), g_y, T(0), nullptr, g_x, accumulate);
  }
};

INFL_REGISTER_RULE("identity", Identity)

}  // namespace
}  // namespace infl
