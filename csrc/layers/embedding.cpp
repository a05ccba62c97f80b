// embedding: y[n, t, :] = W[x[n, t], :], W (slot 0) of `rows` rows; x holds indices as numbers of T. Row `padding` (−1: none) is read like any
// other and takes no derivative.
//
//   jvp         t_y[n, t] = t_W[x[n, t]], 0 at the padding
//   vjp_input   none: indices have no tangent
//   vjp_params  g_W[x[n, t]] += g_y[n, t]
//   per_example row scatter: indices x, rows g_y as they lie (per_example/factor.h)
//   tape        x
//   sets        one gather, one scatter
#include "kernels/embedding.h"

#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Embedding final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t rows = node.attribute("rows"), padding = node.attribute("padding"), T_ = node.input_widths[0];
    if (rows <= 0 || T_ <= 0 || node.width % T_ != 0 || !node.has_slot(0) || node.slot_sizes[0] != rows * (node.width / T_)) {
      throw std::invalid_argument("embedding (" + node.name + "): expected a table of " + std::to_string(rows) + " rows of width / indices = " +
                                  std::to_string(node.width) + " / " + std::to_string(T_) + " elements in slot 0, got another.");
    }
    if (padding < -1 || padding >= rows) {
      throw std::invalid_argument("embedding (" + node.name + "): expected padding in [-1, " + std::to_string(rows) + "), got " +
                                  std::to_string(padding) + ".");
    }
    if (node.needs_tangent[0]) {
      throw std::invalid_argument("embedding (" + node.name + "): expected indices that depend on no trained parameter, got such; freeze it.");
    }
    return {.keeps_input = {node.is_trainable(0)}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  bool takes_sets(const Node&) const override { return true; }

  void forward(const Tile<T>& tile, T* y) const override {
    const int64_t positions = tile.n * tile.node.input_widths[0];
    check_indices_stub<T>(tile.ctx, positions, tile.x[0], tile.node.attribute("rows"), false, tile.node.name.c_str());
    row_gather_stub<T>(tile.ctx, tile.sets, positions, cols(tile), tile.x[0], -1, tile.theta[0], tile.theta_stride, y);
  }

  void jvp(const Tile<T>& tile, const T* const* /*t_x*/, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    row_gather_stub<T>(tile.ctx, tile.V, tile.n * tile.node.input_widths[0], cols(tile), tile.x[0], tile.node.attribute("padding"), t_theta.theta[0],
                       t_theta.stride, t_y);
  }

  // The indices have no tangent: never asked for.
  void vjp_input(const Tile<T>&, int, const T*, const T*, T*, bool) const override {}

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    if (g_theta[0] == nullptr) return;
    row_scatter_stub<T>(tile.ctx, tile.V * tile.sets, tile.n * tile.node.input_widths[0], cols(tile), tile.x[0], 0, tile.node.attribute("padding"),
                        g_y, g_theta[0], stride);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    if (!tile.node.is_trainable(0)) return;
    Factor<T> f{.slot = tile.node.slots[0], .positions = tile.node.input_widths[0], .rows = tile.node.attribute("rows"), .cols = cols(tile)};
    f.index = tile.x[0];
    f.skip = tile.node.attribute("padding");
    f.col = g_y;
    f.row_has_v = false;
    f.col_has_v = true;
    factors.add(f);
  }

 private:
  static int64_t cols(const Tile<T>& tile) { return tile.node.width / tile.node.input_widths[0]; }
};

INFL_REGISTER_RULE("embedding", Embedding)

}  // namespace
}  // namespace infl
