// convolution: y[o, q] = Σ_{c, k} W[o, c, k] x[c, q stride + k dilation − padding] + b[o], in up to three spatial axes and with groups;
// `transposed`: the transpose of that map, applied to x. W and b as torch stores them.
//
// Attributes: in_channels, out_channels, groups, transposed; lists of three: input, output (sizes), kernel, stride, dilation, padding (low side; the
// high side, and a transposed convolution's output padding, follow from the sizes). A width that is several images is several images.
//
//   jvp          t_y = conv(t_x, W) + conv(x, T_W) + t_b    one product with two terms
//   vjp_input    g_x = convᵀ(g_y, W)
//   vjp_params   g_W += Σ_n Σ_q g_y[o, q] x[c, ...],  g_b += Σ_n Σ_q g_y
//   second_order S_x = convᵀ(g_y, T_W),  S_W = Σ_n Σ_q g_y[o, q] t_x[c, ...]; curved if W is trained and x has a tangent
//   per_example  W: outer products of g_y and the columns of x if there are few positions, else dense;  b: dense
//   tape         x if W is differentiated, prepared as the kernels read it unless `transposed`; W packed both ways, shared by all tiles, and once
//   more for values where products take Winograd's algorithm
//   sets         right-hand sides of a call with kernels of their own, packed by one launch before it; x is kept as it is, a shared one once
#include "kernels/convolution.h"

#include "common/scratch.h"
#include "kernels/convolution_weights.h"
#include "kernels/movement.h"
#include "layers/convolution_shape.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class ConvolutionRule final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    check(node);
    const ConvolutionShape s(node);
    Storage storage{.keeps_input = {node.is_trainable(0) && s.transposed}, .state_widths = {}};
    if (prepares(node, s)) storage.state_widths = {s.images * convolution_prepared_size<T>(node, s)};
    storage.packed_size = packed_both(s);
    if (takes_winograd(s.conv)) storage.packed_size += convolution_packed_size(s.direct(), s.transposed);
    if (node.is_trainable(0)) storage.tangent_packed_size = convolution_packed_size(s.conv, s.transposed);
    if (node.curved) storage.tangent_packed_size += convolution_packed_size(s.conv, !s.transposed);
    storage.positions = s.positions();
    storage.factor_size = s.factor_size();
    return storage;
  }

  bool is_curved(const Node& node) const override { return node.is_trainable(0) && node.needs_tangent[0]; }

  bool fuses_scale() const override { return true; }

  bool takes_sets(const Node&) const override { return true; }

  void pack(const Tile<T>& tile) const override {
    const ConvolutionShape s(tile.node);
    convolution_pack_stub<T>(tile.ctx, s.conv, false, 1, tile.theta[0], 0, tile.packed);
    convolution_pack_stub<T>(tile.ctx, s.conv, true, 1, tile.theta[0], 0, tile.packed + convolution_packed_size(s.conv, false));
    if (takes_winograd(s.conv)) convolution_pack_stub<T>(tile.ctx, s.direct(), s.transposed, 1, tile.theta[0], 0, tile.packed + packed_both(s));
  }

  void pack_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, T* packed) const override {
    const ConvolutionShape s(tile.node);
    convolution_pack_stub<T>(tile.ctx, s.conv, s.transposed, tile.V, t_theta.theta[0], t_theta.stride, packed);
    if (!tile.node.curved) return;
    packed += tile.V * convolution_packed_size(s.conv, s.transposed);
    convolution_pack_stub<T>(tile.ctx, s.conv, !s.transposed, tile.V, t_theta.theta[0], t_theta.stride, packed);
  }

  void forward(const Tile<T>& tile, T* y) const override {
    const ConvolutionShape s(tile.node);
    if (tile.sets > 1) return forward_sets(s, tile, y);
    ConvolutionProduct<T> p = product(s, tile, s.transposed, 1, y);
    if (prepares(tile.node, s))
      convolution_prepare_stub<T>(tile.ctx, s.conv, p.n, tile.x[0], convolution_prepared_size<T>(tile.node, s), tile.state[0]);
    p.bias = tile.theta[1];
    if (takes_winograd(s.conv)) {
      p.terms[0] = {.in = tile.x[0], .packed = tile.packed + packed_both(s)};
    } else {
      p.terms[0] = input(s, tile);
      p.terms[0].packed = packed(s, tile, s.transposed);
    }
    convolution_product_stub<T>(tile.ctx, s.direct(), p);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* scale, T* t_y) const override {
    const ConvolutionShape s(tile.node);
    ConvolutionProduct<T> p = product(s, tile, s.transposed, tile.V, t_y);
    if (t_x[0]) p.terms[0] = {t_x[0], tile.n * tile.node.input_widths[0], 0, packed(s, tile, s.transposed), 0};
    if (t_theta.theta[0]) {
      p.terms[1] = input(s, tile);
      p.terms[1].packed = t_theta.packed;
      p.terms[1].packed_batch = convolution_packed_size(s.conv, s.transposed);
    }
    p.bias = t_theta.theta[1];
    p.bias_batch = t_theta.stride;
    p.scale = scale;
    convolution_product_stub<T>(tile.ctx, s.conv, p);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* scale, T* g_x, bool accumulate) const override {
    const ConvolutionShape s(tile.node);
    ConvolutionProduct<T> p = product(s, tile, !s.transposed, tile.V * tile.sets, g_x);
    p.terms[0] = {.in = g_y, .in_batch = tile.n * tile.node.width};
    p.scale = scale;
    p.scales_each = tile.sets > 1;
    p.accumulate = accumulate;
    if (tile.sets > 1) return multiply_sets(s.conv, tile, p);
    p.terms[0].packed = packed(s, tile, !s.transposed);
    convolution_product_stub<T>(tile.ctx, s.conv, p);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    const ConvolutionShape s(tile.node);
    const int64_t n = tile.n * s.images;
    if (g_theta[0]) weights(s, tile, g_y, tile.n * tile.node.width, nullptr, n, g_theta[0], stride, 0);
    if (g_theta[1]) channel_sum_stub<T>(tile.ctx, tile.V * tile.sets, n, s.out_channels, s.out_plane, g_y, n, g_theta[1], stride, 0);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& order) const override {
    const ConvolutionShape s(tile.node);
    ConvolutionProduct<T> p = product(s, tile, !s.transposed, tile.V, order.g_x[0]);
    p.terms[0] = {order.g_y, 0, false, order.t_theta.packed + tile.V * convolution_packed_size(s.conv, s.transposed),
                  convolution_packed_size(s.conv, !s.transposed)};
    p.accumulate = true;
    convolution_product_stub<T>(tile.ctx, s.conv, p);
    weights(s, tile, order.g_y, 0, order.t_x[0], tile.n * s.images, order.g_theta[0], order.stride, 0);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    const ConvolutionShape s(tile.node);
    const int64_t n = tile.n, V = tile.V;
    if (tile.node.is_trainable(0)) {
      // A position's outer product takes the columns of x and the cotangent; all positions of an example must cost less than their sum does.
      const int64_t size = s.conv.weight_size(), cols = s.conv.x_channels * s.conv.taps(), positions = s.positions();
      const bool few = positions <= kFewPositions && 2 * positions * (cols + V * s.out_channels) <= V * size;
      const bool outer = factors.form() == FactorForm::for_products ? s.multiplies_outer_products() : few || factors.form() == FactorForm::outer;
      if (s.conv.groups == 1 && !s.transposed && outer) {
        T* col = factors.allocate(n * positions * cols);
        convolution_columns_stub<T>(tile.ctx, s.conv, n * s.images, tile.state[0], convolution_prepared_size<T>(tile.node, s), col);
        const T* row = g_y;
        if (s.out_plane > 1) {
          T* turned = factors.allocate(V * n * positions * s.out_channels);
          convolution_columns_stub<T>(tile.ctx, s.pixels(), V * n * s.images, g_y, 0, turned);
          row = turned;
        }
        factors.add({.slot = tile.node.slots[0], .positions = positions, .rows = s.out_channels, .cols = cols, .row = row, .col = col});
      } else {
        T* sums = factors.allocate(V * n * size);
        fill_zero<T>(tile.ctx, V * n * size, sums);
        weights(s, tile, g_y, n * tile.node.width, nullptr, s.images, sums, n * size, size);
        factors.add({.slot = tile.node.slots[0], .positions = 1, .rows = size, .cols = 1, .row = sums});
      }
    }
    if (tile.node.is_trainable(1)) {
      const T* row = g_y;
      if (s.images * s.out_plane > 1) {
        T* sums = factors.allocate(V * n * s.out_channels);
        fill_zero<T>(tile.ctx, V * n * s.out_channels, sums);
        channel_sum_stub<T>(tile.ctx, V, n * s.images, s.out_channels, s.out_plane, g_y, s.images, sums, n * s.out_channels, s.out_channels);
        row = sums;
      }
      factors.add({.slot = tile.node.slots[1], .positions = 1, .rows = s.out_channels, .cols = 1, .row = row});
    }
  }

 private:
  static constexpr int64_t kFewPositions = 4;

  static void check(const Node& node) {
    const auto fail = [&node](const std::string& expected, const std::string& got) {
      throw std::invalid_argument("convolution (" + node.name + "): expected " + expected + ", got " + got + ".");
    };
    for (const char* key : {"input", "output", "kernel", "stride", "dilation", "padding"}) {
      if (node.list(key).size() != 3) fail("three numbers in '" + std::string(key) + "'", std::to_string(node.list(key).size()));
      for (int64_t value : node.list(key)) {
        if (value <= 0 && std::string(key) != "padding") fail("positive numbers in '" + std::string(key) + "'", std::to_string(value));
      }
    }
    const int64_t in = node.attribute("in_channels"), out = node.attribute("out_channels"), groups = node.attribute("groups");
    if (in <= 0 || out <= 0 || groups <= 0 || in % groups != 0 || out % groups != 0) {
      fail("channels that are multiples of groups = " + std::to_string(groups), std::to_string(in) + " and " + std::to_string(out));
    }
    const ConvolutionShape s(node);
    const int64_t in_width = in * (s.transposed ? s.conv.y_plane() : s.conv.x_plane()), out_width = out * s.out_plane;
    if (s.images <= 0 || node.width != s.images * out_width || node.input_widths[0] != s.images * in_width) {
      fail("widths that are equal multiples of " + std::to_string(in_width) + " and " + std::to_string(out_width),
           std::to_string(node.input_widths[0]) + " and " + std::to_string(node.width));
    }
  }

  static ConvolutionProduct<T> product(const ConvolutionShape& s, const Tile<T>& tile, bool up, int64_t V, T* out) {
    ConvolutionProduct<T> p;
    p.up = up;
    p.V = V;
    p.n = tile.n * s.images;
    p.out = out;
    return p;
  }

  // x is multiplied in every product, by the kernel's tangent and by the cotangent.
  static bool prepares(const Node& node, const ConvolutionShape& s) { return node.is_trainable(0) && !s.transposed; }

  static ConvolutionTerm<T> input(const ConvolutionShape& s, const Tile<T>& tile) {
    if (prepares(tile.node, s)) return {.in = tile.state[0], .prepared = convolution_prepared_size<T>(tile.node, s)};
    return {.in = tile.x[0]};
  }

  // Elements of W packed both ways for products; W for values comes after them where it is packed otherwise.
  static int64_t packed_both(const ConvolutionShape& s) { return convolution_packed_size(s.conv, false) + convolution_packed_size(s.conv, true); }

  static const T* packed(const ConvolutionShape& s, const Tile<T>& tile, bool up) {
    return tile.packed + (up ? convolution_packed_size(s.conv, false) : 0);
  }

  // y of several sets, each with a kernel of its own.
  static void forward_sets(const ConvolutionShape& s, const Tile<T>& tile, T* y) {
    const int64_t apart = tile.x_stride[0];
    if (prepares(tile.node, s)) copy<T>(tile.ctx, (apart == 0 ? 1 : tile.sets) * tile.n * tile.node.input_widths[0], tile.x[0], tile.state[0]);
    ConvolutionProduct<T> p = product(s, tile, s.transposed, tile.sets, y);
    p.terms[0] = {.in = tile.x[0], .in_batch = apart};
    p.bias = tile.theta[1];
    p.bias_batch = tile.node.is_trainable(1) ? tile.theta_stride : 0;
    multiply_sets(s.direct(), tile, p);
  }

  // A product of one term, with the kernels of all sets packed for it.
  static void multiply_sets(const Convolution& c, const Tile<T>& tile, ConvolutionProduct<T>& p) {
    const bool own = tile.node.is_trainable(0);
    const int64_t num = own ? tile.sets : 1, size = convolution_packed_size(c, p.up);
    Scratch<T> packed(tile.ctx, num * size);
    convolution_pack_stub<T>(tile.ctx, c, p.up, num, tile.theta[0], own ? tile.theta_stride : 0, packed.data());
    p.terms[0].packed = packed.data();
    p.terms[0].packed_batch = own ? size : 0;
    convolution_product_stub<T>(tile.ctx, c, p);
  }

  // The kernel's gradient from g (a batch stride of 0: shared by the right-hand sides) and t_x, or the node's input without it, one for each `images`
  // images.
  static void weights(const ConvolutionShape& s, const Tile<T>& tile, const T* g, int64_t g_batch, const T* t_x, int64_t images, T* out,
                      int64_t batch, int64_t example) {
    const int64_t n = tile.n * s.images, V = tile.V * tile.sets;
    const bool own = t_x || (tile.sets > 1 && tile.x_stride[0] != 0);
    const int64_t x_batch = own ? tile.n * tile.node.input_widths[0] : 0;
    if (s.transposed) {
      convolution_weights_stub<T>(tile.ctx, s.conv, V, n, g, g_batch, 0, t_x ? t_x : tile.x[0], x_batch, images, out, batch, example);
    } else {
      const int64_t prepared = t_x || tile.sets > 1 ? 0 : convolution_prepared_size<T>(tile.node, s);
      convolution_weights_stub<T>(tile.ctx, s.conv, V, n, t_x ? t_x : tile.state[0], x_batch, prepared, g, g_batch, images, out, batch, example);
    }
  }
};

INFL_REGISTER_RULE("convolution", ConvolutionRule)

}  // namespace
}  // namespace infl
