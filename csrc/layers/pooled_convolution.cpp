// pooled_convolution: y = max_pool(φ(conv(x))), three nodes (node.parts; φ may be missing) that the plan made one. Products need the convolution only
// at the places i(o, q) that the pool chose, a quarter of them for windows of two by two:
//
//   jvp          t_y[o, q] = d[o, q] (conv(t_x, W) + conv(x, T_W) + t_b)[o, i(o, q)],  d = φ' there
//   vjp_input    g_x = convᵀ(g, W), where g is zero but for g[o, i(o, q)] += d[o, q] g_y[o, q]
//   vjp_params   the convolution's, of d ∘ g_y at the places alone
//   second_order the convolution's, of all of g
//   per_example  as vjp_params, or the convolution's where outer products are asked for
//   tape         the convolution's; i and d, and the places once more as the kernels read them
//
// Kernels for that are the CPU's (convolution_picks.h): only plans for the CPU have such nodes.
#include "layers/pooled_convolution.h"

#include <algorithm>

#include "kernels/convolution_picks.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"
#include "kernels/pooling.h"
#include "layers/convolution_shape.h"
#include "layers/pooling_windows.h"
#include "layers/rule.h"

namespace infl {
namespace {

constexpr int64_t kForwardBytes = 8 << 20;

template <class T>
class PooledConvolution final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const Node& inner = node.parts[0];
    for (size_t k = 1; k < node.parts.size(); ++k) part_rule(node, k).storage(node.parts[k]);  // checks
    Storage storage = part_rule(node, 0).storage(inner);
    const ConvolutionShape s(inner);
    storage.state_widths.push_back(node.width);
    if (has_activation(node)) storage.state_widths.push_back(node.width);
    storage.state_widths.push_back(s.images * pick_places_size<T>(s.conv, windows(Context{}, node)));
    if (node.needs_tangent[0]) storage.packed_size += pick_packed_size(s.conv);
    if (node.is_trainable(0)) storage.tangent_packed_size += pick_packed_size(s.conv);
    return storage;
  }

  bool is_curved(const Node& node) const override { return node.is_trainable(0) && node.needs_tangent[0]; }

  bool fuses_scale() const override { return true; }

  void pack(const Tile<T>& tile) const override {
    convolution(tile).pack(inner(tile));
    if (!tile.node.needs_tangent[0]) return;
    pick_pack_stub<T>(tile.ctx, ConvolutionShape(tile.node.parts[0]).conv, 1, tile.theta[0], 0, picked(tile));
  }

  void pack_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, T* packed) const override {
    convolution(tile).pack_tangents(inner(tile), t_theta, packed);
    if (!tile.node.is_trainable(0)) return;
    const ConvolutionShape s(tile.node.parts[0]);
    pick_pack_stub<T>(tile.ctx, s.conv, tile.V, t_theta.theta[0], t_theta.stride, packed + tile.V * inner_tangent_packed_size(tile));
  }

  // A share of the examples at a time, which bounds what the whole convolution takes for a moment.
  void forward(const Tile<T>& tile, T* y) const override {
    const Node& node = tile.node;
    const std::vector<int64_t> widths = storage(node).state_widths;
    const int64_t example = 3 * node.parts[0].width * static_cast<int64_t>(sizeof(T));
    const int64_t share = std::clamp<int64_t>(kForwardBytes / example, 1, std::max<int64_t>(tile.n, 1));
    for (int64_t begin = 0; begin < tile.n; begin += share) {
      const T* x = tile.x[0] + begin * node.input_widths[0];
      std::vector<T*> state;
      for (size_t k = 0; k < widths.size(); ++k) state.push_back(tile.state[k] + begin * widths[k]);
      Tile<T> part = tile;
      part.n = std::min(share, tile.n - begin);
      part.x = &x;
      part.state = state.data();
      forward_share(part, y + begin * node.width);
    }
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* scale, T* t_y) const override {
    const Node& node = tile.node;
    const Windows w = windows(tile.ctx, node);
    const T* d = has_activation(node) ? factor(tile) : nullptr;
    const ConvolutionShape s(node.parts[0]);
    ConvolutionProduct<T> p;
    p.V = tile.V;
    p.n = tile.n * s.images;
    p.out = t_y;
    if (t_x[0]) p.terms[0] = {t_x[0], tile.n * node.input_widths[0], 0, picked(tile), 0};
    if (t_theta.theta[0]) {
      const T* packed = t_theta.packed + tile.V * inner_tangent_packed_size(tile);
      p.terms[1] = {tile.state[0], 0, convolution_prepared_size<T>(node.parts[0], s), packed, pick_packed_size(s.conv)};
    }
    p.bias = t_theta.theta[1];
    p.bias_batch = t_theta.stride;
    p.scale = d ? d : scale;
    pick_product_stub<T>(tile.ctx, s.conv, w, places(tile), p);
    if (d && scale) scale_stub<T>(tile.ctx, tile.V, tile.n * node.width, scale, t_y, t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* scale, T* g_x, bool accumulate) const override {
    const Node& node = tile.node;
    const ConvolutionShape s(node.parts[0]);
    ConvolutionProduct<T> p;
    p.up = true;
    p.V = tile.V;
    p.n = tile.n * s.images;
    p.terms[0] = {g_y, tile.n * node.width, 0, tile.packed + convolution_packed_size(s.conv, false), 0};
    p.scale = scale;
    p.out = g_x;
    p.accumulate = accumulate;
    p.picked = windows(tile.ctx, node).out_plane();
    p.places = index(tile);
    p.factor = has_activation(node) ? factor(tile) : nullptr;
    convolution_product_stub<T>(tile.ctx, s.conv, p);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    const int64_t images = tile.n * ConvolutionShape(tile.node.parts[0]).images;
    add_gradients(tile, g_y, images, g_theta[0], stride, 0, g_theta[1], stride, 0);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& order) const override {
    Scratch<T> g(tile.ctx, tile.n * tile.node.parts[0].width);
    spread(tile, 1, order.g_y, g.data());
    SecondOrder<T> whole = order;
    whole.g_y = g.data();
    convolution(tile).second_order(inner(tile), whole);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    const Node& node = tile.node;
    if (factors.form() == FactorForm::outer ||
        (factors.form() == FactorForm::for_products && ConvolutionShape(node.parts[0]).multiplies_outer_products())) {
      T* g = factors.allocate(tile.V * tile.n * node.parts[0].width);
      spread(tile, tile.V, g_y, g);
      return convolution(tile).per_example(inner(tile), g, factors);
    }
    const ConvolutionShape s(node.parts[0]);
    const auto sums = [&](size_t k, int64_t size) -> T* {
      if (!node.is_trainable(k)) return nullptr;
      T* zero = factors.allocate(tile.V * tile.n * size);
      fill_zero<T>(tile.ctx, tile.V * tile.n * size, zero);
      factors.add({.slot = node.slots[k], .positions = 1, .rows = size, .cols = 1, .row = zero});
      return zero;
    };
    const int64_t size = s.conv.weight_size(), channels = s.out_channels;
    T *weights = sums(0, size), *bias = sums(1, channels);
    add_gradients(tile, g_y, s.images, weights, tile.n * size, size, bias, tile.n * channels, channels);
  }

 private:
  void forward_share(const Tile<T>& tile, T* y) const {
    const Node& node = tile.node;
    const Context& ctx = tile.ctx;
    const int64_t size = tile.n * node.parts[0].width;
    const Windows w = windows(ctx, node);
    const int64_t num = planes(tile, w);
    Scratch<T> whole(ctx, size);
    convolution(tile).forward(inner(tile), whole.data());
    if (!has_activation(node)) {
      max_pool_stub<T>(ctx, w, num, whole.data(), y, index(tile));
    } else if (pools_first(node)) {
      Scratch<T> taken(ctx, tile.n * node.width);
      max_pool_stub<T>(ctx, w, num, whole.data(), taken.data(), index(tile));
      activate(tile, tile.n * node.width, taken.data(), y, factor(tile));
    } else {
      Scratch<T> after(ctx, size), derivative(ctx, size);
      activate(tile, size, whole.data(), after.data(), derivative.data());
      max_pool_stub<T>(ctx, w, num, after.data(), y, index(tile));
      plane_gather_stub<T>(ctx, 1, num, w.in_plane(), w.out_plane(), index(tile), derivative.data(), factor(tile));
    }
    const ConvolutionShape s(node.parts[0]);
    pick_places_stub<T>(ctx, s.conv, w, tile.n * s.images, index(tile), places(tile));
  }

  // max φ(z) = φ(max z) of a φ that never falls: a quarter of the elements is left for it. Where it is constant the pool may choose another of
  // equals, whose derivative is 0 like theirs.
  static bool pools_first(const Node& node) {
    const Activation kind = activation(node);
    return kind == Activation::relu || kind == Activation::hardtanh;
  }

  static Activation activation(const Node& node) { return static_cast<Activation>(node.parts[1].attribute("kind")); }

  static void activate(const Tile<T>& tile, int64_t size, const T* x, T* y, T* derivative) {
    const Node& part = tile.node.parts[1];
    const T a = static_cast<T>(part.number("a")), b = static_cast<T>(part.number("b"));
    activation_stub<T>(tile.ctx, activation(tile.node), a, b, size, x, y, derivative);
  }

  static bool has_activation(const Node& node) { return node.parts.size() == 3; }
  static const Rule<T>& part_rule(const Node& node, size_t k) { return *find_rule<T>(node.parts[k].rule); }
  static const Rule<T>& convolution(const Tile<T>& tile) { return part_rule(tile.node, 0); }
  static Windows windows(const Context& ctx, const Node& node) { return pooling_windows(ctx, node.parts.back(), false); }
  static int64_t planes(const Tile<T>& tile, const Windows& w) { return tile.n * (tile.node.width / w.out_plane()); }

  // What the convolution's rule sees of the tile.
  static Tile<T> inner(const Tile<T>& tile) {
    Tile<T> part{tile.ctx, tile.node.parts[0], tile.V, tile.n};
    part.x = tile.x;
    part.state = tile.state;
    part.theta = tile.theta;
    part.packed = tile.packed;
    return part;
  }

  // States behind the convolution's.
  static T* index(const Tile<T>& tile) { return tile.state[tile.node.is_trainable(0) ? 1 : 0]; }
  static T* factor(const Tile<T>& tile) { return tile.state[tile.node.is_trainable(0) ? 2 : 1]; }
  static T* places(const Tile<T>& tile) { return tile.state[(tile.node.is_trainable(0) ? 2 : 1) + (has_activation(tile.node) ? 1 : 0)]; }

  // W as picks read it, behind what the convolution packs.
  static T* picked(const Tile<T>& tile) {
    const Convolution conv = ConvolutionShape(tile.node.parts[0]).conv;
    return tile.packed + convolution_packed_size(conv, false) + convolution_packed_size(conv, true);
  }

  static int64_t inner_tangent_packed_size(const Tile<T>& tile) { return convolution(tile).storage(tile.node.parts[0]).tangent_packed_size; }

  // The gradients by W and b (null: not wanted), one for each `images` images; of the right-hand sides and of those `batch` and `example` apart.
  static void add_gradients(const Tile<T>& tile, const T* g_y, int64_t images, T* weights, int64_t batch, int64_t example, T* bias,
                            int64_t bias_batch, int64_t bias_example) {
    const Node& node = tile.node;
    const ConvolutionShape s(node.parts[0]);
    const Windows w = windows(tile.ctx, node);
    const bool activated = has_activation(node);
    const int64_t n = tile.n * s.images, size = tile.n * node.width;
    Scratch<T> scaled(tile.ctx, activated ? tile.V * size : 0);
    if (activated) scale_stub<T>(tile.ctx, tile.V, size, factor(tile), g_y, scaled.data(), false);
    const T* g = activated ? scaled.data() : g_y;
    if (weights) {
      pick_weights_stub<T>(tile.ctx, s.conv, w, places(tile), tile.V, n, tile.state[0], convolution_prepared_size<T>(node.parts[0], s), g, images,
                           weights, batch, example);
    }
    if (bias) channel_sum_stub<T>(tile.ctx, tile.V, n, s.out_channels, w.out_plane(), g, images, bias, bias_batch, bias_example);
  }

  // g [V, n, width of the convolution] from g_y.
  static void spread(const Tile<T>& tile, int64_t V, const T* g_y, T* g) {
    const Windows w = windows(tile.ctx, tile.node);
    const bool activated = has_activation(tile.node);
    const int64_t size = tile.n * tile.node.width;
    Scratch<T> scaled(tile.ctx, activated ? V * size : 0);
    if (activated) scale_stub<T>(tile.ctx, V, size, factor(tile), g_y, scaled.data(), false);
    plane_scatter_stub<T>(tile.ctx, V, planes(tile, w), w.out_plane(), w.in_plane(), index(tile), activated ? scaled.data() : g_y, g, false);
  }
};

INFL_REGISTER_RULE("pooled_convolution", PooledConvolution)

}  // namespace

template <class T>
bool pools_convolution(const Node& convolution, const Node& pool) {
  const ConvolutionShape s(convolution);
  return !s.transposed && takes_picks<T>(s.conv, pooling_windows(Context{}, pool, false));
}

template bool pools_convolution<float>(const Node&, const Node&);
template bool pools_convolution<double>(const Node&, const Node&);

}  // namespace infl
