// attention: y = softmax(scale · q kᵀ + mask) v per head (kernels/attention.h has the formulas of all directions).
//
//   forward     P, y
//   jvp         t_y from t_q, t_k, t_v, t_mask: four products of L·S·E (F) a head and right-hand side
//   vjp_input   q and k: two products each, as both need g_S; v: one
//   vjp_params  of the mask: g_S summed over examples and the axes along which the mask is broadcast
//   second_order kernels/attention.h; curved if q, k, v or the mask has a tangent
//   per_example of the mask: dense
//   tape        q, k, v; P while it is not large beside them, else it is computed again block by block (and a mask that is an input is kept)
//
// Inputs q, k, v and, if the mask depends on the examples, mask; a mask that does not is slot 0, which may be differentiated.
// Attributes: heads, key_heads, queries L, keys S, features E, value_features F, causal, mask (0 none, 1 added to the scores, 2 zero hides);
// number scale; lists q, k, v, y: strides of head and row within an example, features being contiguous; mask: one
// offset a head, then the strides of row and column (0: broadcast).
#include "kernels/attention.h"
#include "common/scratch.h"
#include "layers/rule.h"

namespace infl {
namespace {

constexpr int kQuery = 0, kKey = 1, kValue = 2, kMask = 3;

template <class T>
class AttentionRule final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const Attention<T> a = shape(node);
    const int64_t kind = node.attribute("mask");
    const bool has_slot = node.has_slot(0);
    const std::string who = "attention (" + node.name + "): ";
    if (node.inputs.size() < 3 || node.inputs.size() > 4 || kind < 0 || kind > 2 || (kind != 0) != (node.inputs.size() == 4 || has_slot) ||
        (node.inputs.size() == 4 && has_slot)) {
      throw std::invalid_argument(who + "expected inputs q, k, v and a mask of kind 1 or 2 as fourth input or slot, or kind 0 and neither, got " +
                                  std::to_string(node.inputs.size()) + " inputs, kind " + std::to_string(kind) + ".");
    }
    if (kind == 2 && node.is_trainable(0)) throw std::invalid_argument(who + "expected a boolean mask to be a constant, got a parameter.");
    if (a.heads <= 0 || a.key_heads <= 0 || a.L <= 0 || a.S <= 0 || a.E <= 0 || a.F <= 0 || a.heads % a.key_heads != 0) {
      throw std::invalid_argument(who + "expected positive sizes and heads a multiple of key_heads, got " + std::to_string(a.heads) + " heads, " +
                                  std::to_string(a.key_heads) + " key heads.");
    }
    check(node, "q", a.heads, a.L, a.E, node.input_widths[kQuery]);
    check(node, "k", a.key_heads, a.S, a.E, node.input_widths[kKey]);
    check(node, "v", a.key_heads, a.S, a.F, node.input_widths[kValue]);
    check(node, "y", a.heads, a.L, a.F, node.width);
    if (kind != 0 && node.list("mask").size() != static_cast<size_t>(a.heads) + 2) {
      throw std::invalid_argument(who + "expected 'mask' to hold an offset for each of " + std::to_string(a.heads) + " heads and two strides, got " +
                                  std::to_string(node.list("mask").size()) + " numbers.");
    }
    const bool keep = keeps(a);
    Storage storage{.keeps_input = {true, true, true}, .state_widths = {}};
    if (node.inputs.size() == 4) storage.keeps_input.push_back(!keep && kind != 0);
    if (keep) storage.state_widths.push_back(a.heads * a.L * a.S);
    return storage;
  }

  bool is_curved(const Node& node) const override {
    return std::find(node.needs_tangent.begin(), node.needs_tangent.end(), true) != node.needs_tangent.end() || node.is_trainable(0);
  }

  void forward(const Tile<T>& tile, T* y) const override { attention_forward_stub<T>(tile.ctx, Arguments(tile, 1).a, y); }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    attention_jvp_stub<T>(tile.ctx, Arguments(tile, tile.V).a, tangents(tile, t_x, t_theta), t_y);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    AttentionCotangents<T> g;
    g.accumulate = accumulate;
    (i == kQuery ? g.q : i == kKey ? g.k : i == kValue ? g.v : g.mask) = g_x;
    if (i == kMask) {
      g.mask_size = g.mask_example = tile.node.input_widths[kMask];
      g.mask_stride = tile.n * g.mask_example;
    }
    attention_vjp_stub<T>(tile.ctx, Arguments(tile, tile.V).a, g_y, g);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    if (g_theta[0] == nullptr) return;
    AttentionCotangents<T> g;
    g.accumulate = true;
    g.mask = g_theta[0];
    g.mask_stride = stride;
    attention_vjp_stub<T>(tile.ctx, Arguments(tile, tile.V).a, g_y, g);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const Node& node = tile.node;
    AttentionCotangents<T> g{s.g_x[kQuery], s.g_x[kKey], s.g_x[kValue]};
    g.accumulate = true;
    if (node.inputs.size() == 4) {
      g.mask = s.g_x[kMask];
      g.mask_size = g.mask_example = node.input_widths[kMask];
      g.mask_stride = tile.n * g.mask_example;
    } else if (node.has_slot(0)) {
      g.mask = s.g_theta[0];
      g.mask_stride = s.stride;
    }
    Attention<T> a = attention(tile, tile.V);
    Scratch<T> scratch(tile.ctx, attention_second_order_scratch_size(tile.ctx, a));
    a.scratch = scratch.data();
    attention_second_order_stub<T>(tile.ctx, a, s.g_y, tangents(tile, s.t_x, s.t_theta), g);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    if (!tile.node.is_trainable(0)) return;
    AttentionCotangents<T> g;
    g.mask_size = g.mask_example = tile.node.slot_sizes[0];
    g.mask_stride = tile.n * g.mask_size;
    g.mask = factors.allocate(tile.V * g.mask_stride);
    attention_vjp_stub<T>(tile.ctx, Arguments(tile, tile.V).a, g_y, g);
    factors.add({.slot = tile.node.slots[0], .positions = 1, .rows = g.mask_size, .cols = 1, .row = g.mask});
  }

 private:
  static bool keeps(const Attention<T>& a) { return attention_keeps_probabilities(a.heads, a.key_heads, a.L, a.S, a.E, a.F); }

  static Attention<T> shape(const Node& node) {
    Attention<T> a;
    a.heads = node.attribute("heads");
    a.key_heads = node.attribute("key_heads");
    a.L = node.attribute("queries");
    a.S = node.attribute("keys");
    a.E = node.attribute("features");
    a.F = node.attribute("value_features");
    a.scale = static_cast<T>(node.number("scale"));
    a.causal = node.attribute("causal") != 0;
    a.mask_is_boolean = node.attribute("mask") == 2;
    return a;
  }

  // Heads and rows tile the value: every element belongs to one of them.
  static void check(const Node& node, const char* key, int64_t heads, int64_t rows, int64_t features, int64_t width) {
    const auto& strides = node.list(key);
    const bool heads_outside = strides.size() == 2 && strides[1] == features && (heads == 1 || strides[0] == rows * features);
    const bool rows_outside = strides.size() == 2 && strides[0] == features && (rows == 1 || strides[1] == heads * features);
    if ((!heads_outside && !rows_outside) || width != heads * rows * features) {
      throw std::invalid_argument("attention (" + node.name + "): expected '" + key + "' to be the strides of " + std::to_string(heads) +
                                  " heads and " + std::to_string(rows) + " rows of " + std::to_string(features) + " features that cover " +
                                  std::to_string(width) + " elements, got others.");
    }
  }

  static HeadStrides strides(const Node& node, const char* key, int64_t width) {
    const auto& list = node.list(key);
    return {width, list[0], list[1]};
  }

  // The kernel's arguments, and the memory that they point to.
  struct Arguments {
    Arguments(const Tile<T>& tile, int64_t V) : a(attention(tile, V)), scratch(tile.ctx, attention_scratch_size(tile.ctx, a)) {
      a.scratch = scratch.data();
    }
    Attention<T> a;
    Scratch<T> scratch;
  };

  static Attention<T> attention(const Tile<T>& tile, int64_t V) {
    const Node& node = tile.node;
    Attention<T> a = shape(node);
    a.V = V;
    a.n = tile.n;
    a.q_at = strides(node, "q", node.input_widths[kQuery]);
    a.k_at = strides(node, "k", node.input_widths[kKey]);
    a.v_at = strides(node, "v", node.input_widths[kValue]);
    a.o_at = strides(node, "y", node.width);
    a.q = tile.x[kQuery];
    a.k = tile.x[kKey];
    a.v = tile.x[kValue];
    if (node.attribute("mask") != 0) {
      const auto& list = node.list("mask");
      const bool is_input = node.inputs.size() == 4;
      a.mask = is_input ? tile.x[kMask] : tile.theta[0];
      a.mask_at = {is_input ? node.input_widths[kMask] : 0, node.list_on(tile.ctx, "mask"), list[list.size() - 2], list[list.size() - 1]};
    }
    if (keeps(a)) a.p = tile.state[0];
    return a;
  }

  static AttentionTangents<T> tangents(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta) {
    const Node& node = tile.node;
    AttentionTangents<T> t{t_x[kQuery], t_x[kKey], t_x[kValue]};
    if (node.inputs.size() == 4) {
      t.mask = t_x[kMask];
      t.mask_stride = tile.n * node.input_widths[kMask];
    } else if (node.has_slot(0)) {
      t.mask = t_theta.theta[0];
      t.mask_stride = t_theta.stride;
    }
    return t;
  }
};

INFL_REGISTER_RULE("attention", AttentionRule)

}  // namespace
}  // namespace infl
