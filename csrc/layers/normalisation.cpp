// layer_norm: every group of an example by its own mean and deviation, then an affine map by channel,
//     y = w ∘ x̂ + b,   x̂ = (x − mean) rstd,   rstd = 1 / sqrt(variance + eps)
//
//   An example is [groups, size]; attribute `centre` 0: mean is taken as 0 and variance as the mean square (RMS norm). Element e of group g is
//   of channel (g mod channel_groups) · channels + e / (size / channels), so one rule serves
//     layer and RMS norm      channel_groups 1, channels = size
//     group norm [C, L]       channel_groups = groups G, channels C/G, size C/G · L
//     instance norm [C, L]    channel_groups C, channels 1, size L
//   slots: weight, bias, each [channel_groups · channels], each may be absent, constant or trained
//
//   jvp          t_y = w ∘ t_x̂ + x̂ ∘ t_w + t_b,   t_x̂ = rstd (t_x − mean(t_x) − x̂ mean(x̂ ∘ t_x))
//   vjp_input    g_x = rstd (g_x̂ − mean(g_x̂) − x̂ mean(x̂ ∘ g_x̂)),   g_x̂ = w ∘ g_y
//   vjp_params   g_w += Σ g_y ∘ x̂,   g_b += Σ g_y
//   second_order S_x: kernels/normalisation.h,   S_w = Σ g_y ∘ t_x̂; curved if x has a tangent
//   per_example  dense: the same sums over one example
//   tape         x̂ [N, width], rstd [N, groups]
//
// batch_norm: evaluation mode, y = (x − mean_c) rstd_c w_c + b_c; an example is [fold, channels, run].
//   slots: weight, bias, running mean and variance, each [channels]; the first two as above, the others constants; rstd as above
//
//   jvp          t_y = rstd w ∘ t_x + x̂ ∘ t_w + t_b
//   vjp_input    g_x = rstd w ∘ g_y
//   second_order S_x = rstd t_w ∘ g_y,   S_w = rstd Σ g_y ∘ t_x; curved if the weight is trained and x has a tangent
//   vjp_params, per_example   as layer_norm
//   tape         x̂ [N, width] if the weight is trained, else nothing; rstd and rstd w, packed
//
// sets: rows of all in one call each, which find their weights by their number; where both are trained and x is not shared
//
// Both take an activation that follows or precedes as a factor of the pass that writes (fuses_scale).
#include "kernels/normalisation.h"

#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "layers/rule.h"

namespace infl {
namespace {

[[noreturn]] void refuse(const Node& node, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(node.rule + " (" + node.name + "): expected " + expected + ", got " + got + ".");
}

// Both norms: an affine map by channel of x̂ = `x_hat` over rows of an example.
template <class T>
void channel_vjp_params(const Tile<T>& tile, const ChannelMap& map, int64_t rows, const T* x_hat, const T* g_y, T* const* g_theta, int64_t stride) {
  // Right-hand sides share x̂, sets do not.
  const ChannelGradients<T> out{g_theta[0], g_theta[1], stride, stride, true};
  channel_gradient_stub<T>(tile.ctx, map, tile.V, tile.sets, tile.n * rows, g_y, x_hat, out);
}

// Whether rows of several sets find all of their operands by their number.
bool has_own_operands(const Node& node) {
  return node.needs_tangent[0] && (node.is_trainable(0) || !node.has_slot(0)) && (node.is_trainable(1) || !node.has_slot(1));
}

template <class T>
void channel_per_example(const Tile<T>& tile, const ChannelMap& map, int64_t rows, const T* x_hat, const T* g_y, FactorSink<T>& factors) {
  const int64_t channels = map.total();
  ChannelGradients<T> out{nullptr, nullptr, tile.n * channels, channels, false};
  const T* bias = g_y;
  if (tile.node.is_trainable(0)) out.w = factors.allocate(tile.V * tile.n * channels);
  if (tile.node.is_trainable(1) && tile.node.width != channels) bias = out.b = factors.allocate(tile.V * tile.n * channels);
  if (out.w || out.b) channel_gradient_stub<T>(tile.ctx, map, tile.V, tile.n, rows, g_y, x_hat, out);
  if (tile.node.is_trainable(0)) factors.add({.slot = tile.node.slots[0], .rows = channels, .row = out.w});
  if (tile.node.is_trainable(1)) factors.add({.slot = tile.node.slots[1], .rows = channels, .row = bias});
}

template <class T>
class LayerNorm final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t groups = node.attribute("groups"), size = node.attribute("size");
    const int64_t channels = node.attribute("channels"), channel_groups = node.attribute("channel_groups");
    if (groups <= 0 || size <= 0 || groups * size != node.width || node.width != node.input_widths[0]) {
      refuse(node, "widths of groups * size = " + std::to_string(groups) + " * " + std::to_string(size),
             std::to_string(node.input_widths[0]) + " and " + std::to_string(node.width));
    }
    if (channels <= 0 || size % channels != 0 || channel_groups <= 0 || groups % channel_groups != 0) {
      refuse(node, "channels that divide size = " + std::to_string(size) + " and channel_groups that divide groups = " + std::to_string(groups),
             std::to_string(channels) + " and " + std::to_string(channel_groups));
    }
    if (!(node.number("eps") >= 0)) refuse(node, "eps >= 0", std::to_string(node.number("eps")));
    if (node.slots.size() != 2) refuse(node, "two slots (weight and bias, −1 where absent)", std::to_string(node.slots.size()));
    return {.keeps_input = {false}, .state_widths = {node.width, groups}};
  }

  bool is_curved(const Node& node) const override { return node.needs_tangent[0]; }

  bool fuses_scale() const override { return true; }

  bool takes_sets(const Node& node) const override { return has_own_operands(node); }

  void forward(const Tile<T>& tile, T* y) const override {
    layer_norm_stub<T>(tile.ctx, map(tile), rows(tile), centre(tile), static_cast<T>(tile.node.number("eps")), tile.x[0], tile.theta[0],
                       tile.theta[1], y, tile.state[0], tile.state[1]);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* scale, T* t_y) const override {
    const ChannelTangents<T> t{t_theta.theta[0], t_theta.theta[1], t_theta.stride};
    if (t_x[0]) {
      layer_norm_jvp_stub<T>(tile.ctx, map(tile), tile.V, rows(tile), centre(tile), tile.state[0], tile.state[1], tile.theta[0], t_x[0], t, scale,
                             t_y);
    } else {
      channel_affine_stub<T>(tile.ctx, map(tile), tile.V, rows(tile), nullptr, nullptr, tile.state[0], t, scale, t_y, false);
    }
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* scale, T* g_x, bool accumulate) const override {
    layer_norm_vjp_stub<T>(tile.ctx, map(tile), tile.V, rows(tile), centre(tile), tile.state[0], tile.state[1], tile.theta[0], g_y, scale, g_x,
                           accumulate);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    channel_vjp_params(tile, map(tile), tile.node.attribute("groups"), tile.state[0], g_y, g_theta, stride);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const ChannelMap m = map(tile);
    Scratch<T> moved(tile.ctx, tile.V * tile.n * tile.node.width);  // t_x̂
    layer_norm_jvp_stub<T>(tile.ctx, m, tile.V, rows(tile), centre(tile), tile.state[0], tile.state[1], nullptr, s.t_x[0], {}, nullptr, moved.data());
    layer_norm_second_order_stub<T>(tile.ctx, m, tile.V, rows(tile), centre(tile), tile.state[0], tile.state[1], tile.theta[0], s.g_y, s.t_x[0],
                                    moved.data(), {s.t_theta.theta[0], nullptr, s.t_theta.stride}, s.g_x[0]);
    if (s.g_theta[0] == nullptr) return;
    const ChannelGradients<T> out{s.g_theta[0], nullptr, s.stride, 0, true};
    channel_gradient_stub<T>(tile.ctx, m, tile.V, 1, rows(tile), moved.data(), s.g_y, out);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    channel_per_example(tile, map(tile), tile.node.attribute("groups"), tile.state[0], g_y, factors);
  }

 private:
  static ChannelMap map(const Tile<T>& tile) {
    const int64_t channels = tile.node.attribute("channels");
    ChannelMap m{tile.node.attribute("channel_groups"), channels, tile.node.attribute("size") / channels};
    if (tile.sets > 1) m.rows_of_set = tile.n * tile.node.attribute("groups");
    m.set_stride = tile.theta_stride;
    return m;
  }
  static int64_t rows(const Tile<T>& tile) { return tile.sets * tile.n * tile.node.attribute("groups"); }
  static bool centre(const Tile<T>& tile) { return tile.node.attribute("centre") != 0; }
};

template <class T>
class BatchNorm final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t channels = node.attribute("channels"), run = node.attribute("run");
    if (channels <= 0 || run <= 0 || node.width % (channels * run) != 0 || node.width != node.input_widths[0]) {
      refuse(node, "widths that are a multiple of channels * run = " + std::to_string(channels) + " * " + std::to_string(run),
             std::to_string(node.input_widths[0]) + " and " + std::to_string(node.width));
    }
    if (!(node.number("eps") >= 0)) refuse(node, "eps >= 0", std::to_string(node.number("eps")));
    if (!node.has_slot(2) || !node.has_slot(3) || node.is_trainable(2) || node.is_trainable(3)) {
      refuse(node, "four slots, the running mean and variance constants", "other slots");
    }
    Storage storage{.keeps_input = {false}, .state_widths = {}, .packed_size = 2 * channels};
    if (node.is_trainable(0)) storage.state_widths.push_back(node.width);
    return storage;
  }

  bool is_curved(const Node& node) const override { return node.is_trainable(0) && node.needs_tangent[0]; }

  bool fuses_scale() const override { return true; }

  bool takes_sets(const Node& node) const override { return has_own_operands(node); }

  void pack(const Tile<T>& tile) const override { pack_weights(tile, 1, tile.packed); }

  void forward(const Tile<T>& tile, T* y) const override {
    if (tile.sets == 1) return normalise(tile, map(tile), tile.packed, y);
    Scratch<T> rstd(tile.ctx, map(tile).channels);
    pack_weights(tile, 0, rstd.data());
    normalise(tile, map_of_sets(tile, tile.theta_stride), rstd.data(), y);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* scale, T* t_y) const override {
    const ChannelMap m = map(tile);
    channel_affine_stub<T>(tile.ctx, m, tile.V, tile.n * rows(tile), tile.packed + m.channels, t_x[0], x_hat(tile),
                           {t_theta.theta[0], t_theta.theta[1], t_theta.stride}, scale, t_y, false);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* scale, T* g_x, bool accumulate) const override {
    const ChannelMap m = map(tile);
    if (tile.sets == 1) {
      channel_affine_stub<T>(tile.ctx, m, tile.V, tile.n * rows(tile), tile.packed + m.channels, g_y, nullptr, {}, scale, g_x, accumulate);
      return;
    }
    Scratch<T> packed(tile.ctx, (1 + tile.sets) * m.channels);
    pack_weights(tile, tile.sets, packed.data());
    channel_affine_stub<T>(tile.ctx, map_of_sets(tile, m.channels), 1, tile.sets * tile.n * rows(tile), packed.data() + m.channels, g_y, nullptr, {},
                           scale, g_x, accumulate);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    channel_vjp_params(tile, map(tile), rows(tile), x_hat(tile), g_y, g_theta, stride);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const ChannelMap m = map(tile);
    const int64_t count = tile.n * rows(tile);
    Scratch<T> moved(tile.ctx, m.channels), sums(tile.ctx, tile.V * m.channels);  // rstd t_w, Σ g_y ∘ t_x
    channel_gradient_stub<T>(tile.ctx, m, tile.V, 1, count, s.t_x[0], s.g_y, {sums.data(), nullptr, m.channels, 0, false});
    for (int64_t v = 0; v < tile.V; ++v) {
      scale_stub<T>(tile.ctx, 1, m.channels, tile.packed, sums.data() + v * m.channels, s.g_theta[0] + v * s.stride, true);
      scale_stub<T>(tile.ctx, 1, m.channels, tile.packed, s.t_theta.theta[0] + v * s.t_theta.stride, moved.data(), false);
      channel_affine_stub<T>(tile.ctx, m, 1, count, moved.data(), s.g_y, nullptr, {}, nullptr, s.g_x[0] + v * tile.n * tile.node.width, true);
    }
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    channel_per_example(tile, map(tile), rows(tile), x_hat(tile), g_y, factors);
  }

 private:
  static void pack_weights(const Tile<T>& tile, int64_t num, T* packed) {
    batch_norm_pack_stub<T>(tile.ctx, map(tile).channels, static_cast<T>(tile.node.number("eps")), tile.theta[3], num, tile.theta[0],
                            tile.theta_stride, packed);
  }
  static void normalise(const Tile<T>& tile, const ChannelMap& m, const T* rstd, T* y) {
    batch_norm_stub<T>(tile.ctx, m, tile.sets * tile.n * rows(tile), tile.x[0], tile.theta[2], rstd, tile.theta[0], tile.theta[1], y, x_hat(tile));
  }
  static ChannelMap map(const Tile<T>& tile) { return {1, tile.node.attribute("channels"), tile.node.attribute("run")}; }
  static ChannelMap map_of_sets(const Tile<T>& tile, int64_t stride) {
    ChannelMap m = map(tile);
    m.rows_of_set = tile.n * rows(tile);
    m.set_stride = stride;
    return m;
  }
  static int64_t rows(const Tile<T>& tile) { return tile.node.width / map(tile).size(); }
  static T* x_hat(const Tile<T>& tile) { return tile.node.is_trainable(0) ? tile.state[0] : nullptr; }
};

INFL_REGISTER_RULE("layer_norm", LayerNorm)
INFL_REGISTER_RULE("batch_norm", BatchNorm)

}  // namespace
}  // namespace infl
