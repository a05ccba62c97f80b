// max_pool:  y[p, o] = max over the window of o of x[p, ·], for every plane p; the first of equals, as torch chooses
//   jvp         t_y[p, o] = t_x[p, i(p, o)] with i the place of the maximum
//   vjp_input   g_x[p, i(p, o)] += g_y[p, o]
//   tape        i, one number an output
//
// avg_pool:  y[p, o] = factor · (sum over the window of o of x[p, ·]) / (count[o_d] count[o_h] count[o_w])
//   jvp         the same of t_x
//   vjp_input   its transpose
//   tape        nothing
//
// A window is a product of one interval an axis; lists input [3], dilation [3] and, for each axis a and output coordinate, begin_a, end_a (within the
// input) and, of averages, count_a. So one rule serves strides, padding, ceil mode and adaptive pooling. The width is any number of planes.
#include "layers/pooling_windows.h"
#include "layers/rule.h"

namespace infl {
namespace {

void check_windows(const Node& node, bool counted) {
  const auto fail = [&node](const std::string& expected, const std::string& got) {
    throw std::invalid_argument(node.rule + " (" + node.name + "): expected " + expected + ", got " + got + ".");
  };
  for (const char* key : {"input", "dilation"}) {
    if (node.list(key).size() != 3) fail("three numbers in '" + std::string(key) + "'", std::to_string(node.list(key).size()));
    for (int64_t value : node.list(key)) {
      if (value <= 0) fail("positive numbers in '" + std::string(key) + "'", std::to_string(value));
    }
  }
  for (int a = 0; a < 3; ++a) {
    const std::string axis = std::to_string(a);
    const auto &begin = node.list("begin_" + axis), &end = node.list("end_" + axis);
    if (begin.size() != end.size() || begin.empty() || (counted && node.list("count_" + axis).size() != begin.size())) {
      fail("as many ends and counts as begins along axis " + axis, std::to_string(begin.size()) + " and " + std::to_string(end.size()));
    }
    for (size_t o = 0; o < begin.size(); ++o) {
      if (begin[o] < 0 || end[o] > node.list("input")[a] || (begin[o] >= end[o] && !counted)) {
        fail("windows within " + std::to_string(node.list("input")[a]) + " inputs along axis " + axis,
             std::to_string(begin[o]) + " to " + std::to_string(end[o]));
      }
      if (counted && node.list("count_" + axis)[o] <= 0) fail("positive counts", std::to_string(node.list("count_" + axis)[o]));
    }
  }
  const Windows w = pooling_windows(Context{}, node, counted);
  const int64_t planes = node.width / w.out_plane();
  if (node.width != planes * w.out_plane() || node.input_widths[0] != planes * w.in_plane()) {
    fail("widths that are equal multiples of " + std::to_string(w.in_plane()) + " and " + std::to_string(w.out_plane()),
         std::to_string(node.input_widths[0]) + " and " + std::to_string(node.width));
  }
  if (!counted && w.in_plane() >= int64_t{1} << 24) fail("planes of fewer than 2^24 elements", std::to_string(w.in_plane()));
}

template <class T>
class MaxPool final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    check_windows(node, false);
    return {.keeps_input = {false}, .state_widths = {node.width}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override {
    const Windows w = pooling_windows(tile.ctx, tile.node, false);
    max_pool_stub<T>(tile.ctx, w, planes(tile, w), tile.x[0], y, tile.state[0]);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    const Windows w = pooling_windows(tile.ctx, tile.node, false);
    plane_gather_stub<T>(tile.ctx, tile.V, planes(tile, w), w.in_plane(), w.out_plane(), tile.state[0], t_x[0], t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const Windows w = pooling_windows(tile.ctx, tile.node, false);
    plane_scatter_stub<T>(tile.ctx, tile.V, planes(tile, w), w.out_plane(), w.in_plane(), tile.state[0], g_y, g_x, accumulate);
  }

 private:
  static int64_t planes(const Tile<T>& tile, const Windows& w) { return tile.n * (tile.node.width / w.out_plane()); }
};

template <class T>
class AvgPool final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    check_windows(node, true);
    for (int64_t dilation : node.list("dilation")) {
      if (dilation != 1) throw std::invalid_argument("avg_pool (" + node.name + "): expected no dilation, got " + std::to_string(dilation) + ".");
    }
    return {.keeps_input = {false}, .state_widths = {}};
  }

  bool is_curved(const Node&) const override { return false; }

  void forward(const Tile<T>& tile, T* y) const override { mean(tile, 1, tile.x[0], y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>&, const T* /*scale*/, T* t_y) const override {
    mean(tile, tile.V, t_x[0], t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const Windows w = pooling_windows(tile.ctx, tile.node, true);
    window_spread_stub<T>(tile.ctx, w, tile.V * tile.n * (tile.node.width / w.out_plane()), factor(tile), g_y, g_x, accumulate);
  }

 private:
  static T factor(const Tile<T>& tile) { return static_cast<T>(tile.node.number("factor")); }

  static void mean(const Tile<T>& tile, int64_t V, const T* x, T* y) {
    const Windows w = pooling_windows(tile.ctx, tile.node, true);
    window_mean_stub<T>(tile.ctx, w, V * tile.n * (tile.node.width / w.out_plane()), factor(tile), x, y);
  }
};

INFL_REGISTER_RULE("max_pool", MaxPool)
INFL_REGISTER_RULE("avg_pool", AvgPool)

}  // namespace
}  // namespace infl
