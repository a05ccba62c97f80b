// resize: y[p] = (A_0 ⊗ A_1 ⊗ A_2) x[p] for every plane p: nearest, linear and cubic interpolation of up to three axes, which is linear in x.
//   jvp         t_y = A t_x
//   vjp_input   g_x = Aᵀ g_y, as a sum for each input
//   slot 0      the weights of A_0, A_1, A_2 and of their transposes, one after another (constant)
//   tape        nothing
//
// An axis is a band: lists input [3], output [3] and, for each axis a and output coordinate, begin_a and end_a of the inputs that it reads;
// back_begin_a and back_end_a are the same of the transpose. The width is any number of planes.
#include "kernels/resize.h"

#include "layers/rule.h"

namespace infl {
namespace {

std::string list_name(const char* prefix, int axis) { return prefix + std::to_string(axis); }

// Weights of a direction: of forward axes, or of transposed ones.
int64_t num_weights(const Node& node, bool back) {
  int64_t total = 0;
  for (int a = 0; a < 3; ++a) {
    const auto &begin = node.list(list_name(back ? "back_begin_" : "begin_", a)), &end = node.list(list_name(back ? "back_end_" : "end_", a));
    for (size_t o = 0; o < begin.size(); ++o) total += end[o] - begin[o];
  }
  return total;
}

int64_t plane(const Node& node, const char* side) {
  const auto& sizes = node.list(side);
  return sizes[0] * sizes[1] * sizes[2];
}

void check(const Node& node) {
  const auto fail = [&node](const std::string& expected, const std::string& got) {
    throw std::invalid_argument("resize (" + node.name + "): expected " + expected + ", got " + got + ".");
  };
  for (const char* key : {"input", "output"}) {
    if (node.list(key).size() != 3) fail("three sizes in '" + std::string(key) + "'", std::to_string(node.list(key).size()));
    for (int64_t size : node.list(key)) {
      if (size <= 0) fail("positive sizes in '" + std::string(key) + "'", std::to_string(size));
    }
  }
  for (int a = 0; a < 3; ++a) {
    for (bool back : {false, true}) {
      const int64_t in = node.list(back ? "output" : "input")[a], out = node.list(back ? "input" : "output")[a];
      const auto &begin = node.list(list_name(back ? "back_begin_" : "begin_", a)), &end = node.list(list_name(back ? "back_end_" : "end_", a));
      if (static_cast<int64_t>(begin.size()) != out || static_cast<int64_t>(end.size()) != out) {
        fail(std::to_string(out) + " bands along axis " + std::to_string(a), std::to_string(begin.size()) + " and " + std::to_string(end.size()));
      }
      for (size_t o = 0; o < begin.size(); ++o) {
        if (begin[o] < 0 || end[o] < begin[o] || end[o] > in) {
          fail("bands within " + std::to_string(in) + " inputs along axis " + std::to_string(a),
               std::to_string(begin[o]) + " to " + std::to_string(end[o]));
        }
      }
    }
  }
  const int64_t planes = node.width / plane(node, "output");
  if (node.width != planes * plane(node, "output") || node.input_widths[0] != planes * plane(node, "input")) {
    fail("widths that are equal multiples of " + std::to_string(plane(node, "input")) + " and " + std::to_string(plane(node, "output")),
         std::to_string(node.input_widths[0]) + " and " + std::to_string(node.width));
  }
  const int64_t weights = num_weights(node, false) + num_weights(node, true);
  if (!node.has_slot(0) || node.is_trainable(0) || node.slot_sizes[0] != weights) {
    fail(std::to_string(weights) + " constant weights in slot 0", node.has_slot(0) ? std::to_string(node.slot_sizes[0]) : "none");
  }
}

template <class T>
class Resize final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    check(node);
    return {.keeps_input = {false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { run(tile, false, tile.n, tile.x[0], y, false); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    run(tile, false, tile.V * tile.n, t_x[0], t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    run(tile, true, tile.V * tile.n, g_y, g_x, accumulate);
  }

 private:
  static void run(const Tile<T>& tile, bool back, int64_t rows, const T* from, T* to, bool accumulate) {
    const Node& node = tile.node;
    ResizeAxis<T> axes[3];
    const T* weight = tile.theta[0] + (back ? num_weights(node, false) : 0);
    for (int a = 0; a < 3; ++a) {
      const std::string begins = list_name(back ? "back_begin_" : "begin_", a), ends = list_name(back ? "back_end_" : "end_", a);
      const auto &begin = node.list(begins), &end = node.list(ends);
      axes[a] = {node.list(back ? "output" : "input")[a], node.list(back ? "input" : "output")[a], node.list_on(tile.ctx, begins),
                 node.list_on(tile.ctx, ends), weight};
      for (size_t o = 0; o < begin.size(); ++o) weight += end[o] - begin[o];
    }
    resize_stub<T>(tile.ctx, axes, rows * (node.width / plane(node, "output")), from, to, accumulate);
  }
};

INFL_REGISTER_RULE("resize", Resize)

}  // namespace
}  // namespace infl
