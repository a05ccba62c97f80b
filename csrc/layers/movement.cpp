// Rules that move elements and compute nothing: t_y is made from t_x as y is from x, and the vjp sends each cotangent back to where its element
// came from. No parameters; nothing on the tape but the indices of select_axis.
//
// strided:     y[i] = x[offset + Σ_k i_k strides_k], i over `shape` (both of one example): slices, permutations, expansions, flips, windows
// concat:      y = [x_1 | ... | x_k] along one axis: `outer` blocks, each of width(x_k) / outer elements of every input in turn
// gather:      y[j] = x[index_j] with one index map for all examples; −1 gives `fill`: padding, rolls, constant indices, triangles
// select_axis: y[o, j, i] = x[o, k, i] with k from the second input, [outer, count, inner] indices of each example under strides: torch.gather,
//              x[arange(N), idx]; indices count from the end if negative (`from_end`: whether they may)
#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Strided final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const auto &shape = node.list("shape"), &strides = node.list("strides");
    if (shape.size() != strides.size()) {
      throw std::invalid_argument("strided (" + node.name + "): expected as many strides as axes, got " + std::to_string(strides.size()) + " and " +
                                  std::to_string(shape.size()) + ".");
    }
    const StridedMap map = map_of(node);
    if (map.size != node.width || !map.fits(node.input_widths[0])) {
      throw std::invalid_argument("strided (" + node.name + "): expected a map of " + std::to_string(node.width) + " elements into " +
                                  std::to_string(node.input_widths[0]) + ", got one of " + std::to_string(map.size) + " or beyond.");
    }
    return {.keeps_input = {false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { gather(tile, tile.n, tile.x[0], y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    gather(tile, tile.V * tile.n, t_x[0], t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const int64_t width = tile.node.input_widths[0];
    strided_scatter_stub<T>(tile.ctx, tile.V * tile.n, map_of(tile.node), g_y, tile.node.width, g_x, width, width, accumulate);
  }

 private:
  static StridedMap map_of(const Node& node) { return {node.attribute("offset"), node.list("shape"), node.list("strides")}; }

  static void gather(const Tile<T>& tile, int64_t rows, const T* x, T* y) {
    strided_gather_stub<T>(tile.ctx, rows, map_of(tile.node), x, tile.node.input_widths[0], y, tile.node.width);
  }
};

template <class T>
class Concat final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t outer = node.attribute("outer");
    int64_t sum = 0;
    for (int64_t width : node.input_widths) {
      if (outer <= 0 || width % outer != 0) {
        throw std::invalid_argument("concat (" + node.name + "): expected input widths that are multiples of outer = " + std::to_string(outer) +
                                    ", got " + std::to_string(width) + ".");
      }
      sum += width;
    }
    if (sum != node.width) {
      throw std::invalid_argument("concat (" + node.name + "): expected inputs of " + std::to_string(node.width) + " elements together, got " +
                                  std::to_string(sum) + ".");
    }
    return {.keeps_input = std::vector<bool>(node.inputs.size(), false), .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { join(tile, tile.n, tile.x, y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    join(tile, tile.V * tile.n, t_x, t_y);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const Node& node = tile.node;
    const int64_t outer = node.attribute("outer"), ld = node.width / outer, part = node.input_widths[i] / outer;
    int64_t begin = 0;
    for (int k = 0; k < i; ++k) begin += node.input_widths[k] / outer;
    copy_rows_stub<T>(tile.ctx, tile.V * tile.n * outer, part, g_y + begin, ld, g_x, part, accumulate);
  }

 private:
  static void join(const Tile<T>& tile, int64_t rows, const T* const* x, T* y) {
    const Node& node = tile.node;
    const int64_t outer = node.attribute("outer"), ld = node.width / outer;
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      const int64_t part = node.input_widths[k] / outer;
      copy_rows_stub<T>(tile.ctx, rows * outer, part, x[k], part, y, ld, false);
      y += part;
    }
  }
};

template <class T>
class Gather final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const auto& index = node.list("index");
    node.number("fill");
    const bool inside = std::all_of(index.begin(), index.end(), [&](int64_t i) { return i >= -1 && i < node.input_widths[0]; });
    if (static_cast<int64_t>(index.size()) != node.width || !inside) {
      throw std::invalid_argument("gather (" + node.name + "): expected " + std::to_string(node.width) + " indices in [-1, " +
                                  std::to_string(node.input_widths[0]) + "), got " + std::to_string(index.size()) + " or some outside.");
    }
    return {.keeps_input = {false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { gather(tile, tile.n, static_cast<T>(tile.node.number("fill")), tile.x[0], y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    gather(tile, tile.V * tile.n, T(0), t_x[0], t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const int64_t width = tile.node.input_widths[0];
    const int64_t* inverse = tile.node.derived_on(tile.ctx, "inverse of index", [&] { return inverse_of_index(tile.node.list("index"), width); });
    index_scatter_stub<T>(tile.ctx, tile.V * tile.n, width, inverse, inverse + width + 1, g_y, tile.node.width, g_x, width, accumulate);
  }

 private:
  static void gather(const Tile<T>& tile, int64_t rows, T fill, const T* x, T* y) {
    index_gather_stub<T>(tile.ctx, rows, tile.node.width, tile.node.list_on(tile.ctx, "index"), fill, x, tile.node.input_widths[0], y,
                         tile.node.width);
  }
};

template <class T>
class SelectAxis final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const AxisSelection s = selection(node);
    node.attribute("from_end");
    if (node.needs_tangent[1]) {
      throw std::invalid_argument("select_axis (" + node.name + "): expected indices that depend on no trained parameter, got such; freeze it.");
    }
    const int64_t last = (s.outer - 1) * s.index_outer + (s.count - 1) * s.index_count + (s.inner - 1) * s.index_inner;
    if (s.outer * s.length * s.inner != node.input_widths[0] || s.outer * s.count * s.inner != node.width || last >= s.index_width) {
      throw std::invalid_argument("select_axis (" + node.name + "): expected outer · length · inner = " + std::to_string(node.input_widths[0]) +
                                  ", outer · count · inner = " + std::to_string(node.width) + " and index strides within " +
                                  std::to_string(s.index_width) + ", got other sizes.");
    }
    return {.keeps_input = {false, true}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override {
    const AxisSelection s = selection(tile.node);
    check_indices_stub<T>(tile.ctx, tile.n * s.index_width, tile.x[1], s.length, tile.node.attribute("from_end") != 0, tile.node.name.c_str());
    select_axis_stub<T>(tile.ctx, 1, tile.n, s, tile.x[1], tile.x[0], y);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    select_axis_stub<T>(tile.ctx, tile.V, tile.n, selection(tile.node), tile.x[1], t_x[0], t_y);
  }

  // Input 1 holds indices: no parameter influences it, so only input 0 is asked for.
  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    select_axis_transposed_stub<T>(tile.ctx, tile.V, tile.n, selection(tile.node), tile.x[1], g_y, g_x, accumulate);
  }

 private:
  static AxisSelection selection(const Node& node) {
    AxisSelection s;
    s.outer = node.attribute("outer");
    s.length = node.attribute("length");
    s.count = node.attribute("count");
    s.inner = node.attribute("inner");
    s.index_outer = node.attribute("index_outer");
    s.index_count = node.attribute("index_count");
    s.index_inner = node.attribute("index_inner");
    s.index_width = node.input_widths[1];
    return s;
  }
};

INFL_REGISTER_RULE("strided", Strided)
INFL_REGISTER_RULE("concat", Concat)
INFL_REGISTER_RULE("gather", Gather)
INFL_REGISTER_RULE("select_axis", SelectAxis)

}  // namespace
}  // namespace infl
