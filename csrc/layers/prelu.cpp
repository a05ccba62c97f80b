// prelu: y = x for x > 0, else w x; w (slot 0) one number or one for each channel: x is [channels, inner] of one example, `channels` = 1 for one.
//
//   jvp         t_y = d ∘ t_x + t_w ∘ m              d = y'(x), m = min(x, 0)
//   vjp_input   g_x = d ∘ g_y
//   vjp_params  g_w += Σ_n Σ_inner g_y ∘ m
//   second_order S_x = h ∘ t_w, S_w = Σ_n Σ_inner h ∘ t_x with h = g_y where x <= 0, else 0; curved if w is trained and x has a tangent
//   per_example dense: the same without the sum over n
//   tape        d; m if w is trainable; if curved, 1 where x <= 0
#include "common/scratch.h"
#include "kernels/arithmetic.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Prelu final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t channels = node.attribute("channels");
    if (channels <= 0 || node.width % channels != 0 || !node.has_slot(0) || node.slot_sizes[0] != channels) {
      throw std::invalid_argument("prelu (" + node.name + "): expected a width that is a multiple of channels = " + std::to_string(channels) +
                                  " and as many weights, got " + std::to_string(node.width) + ".");
    }
    Storage storage{.keeps_input = {false}, .state_widths = {node.width}, .packed_size = node.width};
    if (node.is_trainable(0)) {
      storage.state_widths.push_back(node.width);
      storage.tangent_packed_size = node.width;
      if (node.curved) storage.state_widths.push_back(node.width);
    } else {
      storage.derivative = 0;
    }
    return storage;
  }

  bool is_curved(const Node& node) const override { return node.is_trainable(0) && node.needs_tangent[0]; }

  void pack(const Tile<T>& tile) const override { strided_gather_stub<T>(tile.ctx, 1, weight_map(tile.node), tile.theta[0], 0, tile.packed, 0); }

  void pack_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, T* packed) const override {
    strided_gather_stub<T>(tile.ctx, tile.V, weight_map(tile.node), t_theta.theta[0], t_theta.stride, packed, tile.node.width);
  }

  void forward(const Tile<T>& tile, T* y) const override {
    prelu_stub<T>(tile.ctx, tile.n, tile.node.width, tile.packed, tile.x[0], y, tile.state[0], tile.node.is_trainable(0) ? tile.state[1] : nullptr);
    if (tile.node.curved)
      activation_stub<T>(tile.ctx, Activation::less_equal, T(0), T(0), tile.n * tile.node.width, tile.x[0], tile.state[2], nullptr);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    const int64_t width = tile.node.width;
    if (t_theta.theta[0] == nullptr) {
      scale_stub<T>(tile.ctx, tile.V, tile.n * width, tile.state[0], t_x[0], t_y, false);
      return;
    }
    affine_tangent_stub<T>(tile.ctx, tile.V, tile.n, width, T(1), nullptr, nullptr, t_theta.packed, width, tile.state[1], nullptr, 0, t_y);
    if (t_x[0]) scale_stub<T>(tile.ctx, tile.V, tile.n * width, tile.state[0], t_x[0], t_y, true);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    scale_stub<T>(tile.ctx, tile.V, tile.n * tile.node.width, tile.state[0], g_y, g_x, accumulate);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    if (g_theta[0]) weight_gradient(tile, g_y, tile.state[1], g_theta[0], stride);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const int64_t width = tile.node.width, size = tile.n * width;
    Scratch<T> below(tile.ctx, size);  // h
    scale_stub<T>(tile.ctx, 1, size, tile.state[2], s.g_y, below.data(), false);
    for (int64_t v = 0; v < tile.V; ++v) {
      affine_stub<T>(tile.ctx, tile.n, width, T(1), s.t_theta.packed + v * width, T(0), nullptr, below.data(), s.g_x[0] + v * size, true);
    }
    weight_gradient(tile, s.t_x[0], below.data(), s.g_theta[0], s.stride);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    const Node& node = tile.node;
    if (!node.is_trainable(0)) return;
    const int64_t rows = tile.V * tile.n, size = node.slot_sizes[0];
    T* product = factors.allocate(rows * node.width);
    scale_stub<T>(tile.ctx, tile.V, tile.n * node.width, tile.state[1], g_y, product, false);
    T* summed = factors.allocate(rows * size);
    strided_scatter_stub<T>(tile.ctx, rows, weight_map(node), product, node.width, summed, size, size, false);
    factors.add({.slot = node.slots[0], .positions = 1, .rows = size, .cols = 1, .row = summed});
  }

 private:
  // g_w += Σ g ∘ x over examples and a channel, g [V, n, width], x [n, width].
  static void weight_gradient(const Tile<T>& tile, const T* g, const T* x, T* g_w, int64_t stride) {
    const int64_t width = tile.node.width;
    Scratch<T> whole(tile.ctx, tile.V * width);  // before the sum over a channel
    fill_zero<T>(tile.ctx, tile.V * width, whole.data());
    column_dot_stub<T>(tile.ctx, tile.V, tile.n, width, T(1), g, x, whole.data(), width);
    strided_scatter_stub<T>(tile.ctx, tile.V, weight_map(tile.node), whole.data(), width, g_w, stride, tile.node.slot_sizes[0], true);
  }

  // An example's elements -> their weights.
  static StridedMap weight_map(const Node& node) {
    const int64_t channels = node.attribute("channels");
    return {0, {channels, node.width / channels}, {1, 0}};
  }
};

INFL_REGISTER_RULE("prelu", Prelu)

}  // namespace
}  // namespace infl
