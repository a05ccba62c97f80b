// softmax: y = p = exp(x) / Σ exp(x) over one axis of an example [outer, size, inner]; attribute log 1: y = log p.
//
//                softmax                       log_softmax
//   jvp          t_y = p ∘ (t_x − Σ p ∘ t_x)   t_y = t_x − Σ p ∘ t_x
//   vjp_input    g_x = p ∘ (g_y − Σ p ∘ g_y)   g_x = g_y − p Σ g_y
//   second_order S_x = p ∘ (w − Σ p ∘ w)       S_x = −(Σ g_y) p ∘ u,   u = t_x − Σ p ∘ t_x,  w = u ∘ (g_y − Σ p ∘ g_y)
//   parameters   none
//   tape         p [N, width]
#include "kernels/softmax.h"

#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Softmax final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t outer = node.attribute("outer"), size = node.attribute("size"), inner = node.attribute("inner");
    if (outer <= 0 || size <= 0 || inner <= 0 || outer * size * inner != node.width || node.width != node.input_widths[0]) {
      throw std::invalid_argument("softmax (" + node.name + "): expected widths of outer * size * inner = " + std::to_string(outer) + " * " +
                                  std::to_string(size) + " * " + std::to_string(inner) + ", got " + std::to_string(node.input_widths[0]) + " and " +
                                  std::to_string(node.width) + ".");
    }
    return {.keeps_input = {false}, .state_widths = {node.width}};
  }

  bool is_curved(const Node&) const override { return true; }

  void forward(const Tile<T>& tile, T* y) const override {
    const Node& node = tile.node;
    softmax_stub<T>(tile.ctx, tile.n * node.attribute("outer"), node.attribute("size"), node.attribute("inner"), is_log(tile), tile.x[0], y,
                    tile.state[0]);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    multiply(tile, is_log(tile) ? SoftmaxProduct::log_tangent : SoftmaxProduct::softmax, t_x[0], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    multiply(tile, is_log(tile) ? SoftmaxProduct::log_cotangent : SoftmaxProduct::softmax, g_y, g_x, accumulate);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const Node& node = tile.node;
    softmax_second_order_stub<T>(tile.ctx, is_log(tile), tile.V, tile.n * node.attribute("outer"), node.attribute("size"), node.attribute("inner"),
                                 tile.state[0], s.g_y, s.t_x[0], s.g_x[0]);
  }

 private:
  static bool is_log(const Tile<T>& tile) { return tile.node.attribute("log") != 0; }
  static void multiply(const Tile<T>& tile, SoftmaxProduct part, const T* in, T* out, bool accumulate) {
    const Node& node = tile.node;
    softmax_product_stub<T>(tile.ctx, part, tile.V, tile.n * node.attribute("outer"), node.attribute("size"), node.attribute("inner"), tile.state[0],
                            in, out, accumulate);
  }
};

INFL_REGISTER_RULE("softmax", Softmax)

}  // namespace
}  // namespace infl
