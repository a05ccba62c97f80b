// affine:     y = a s ∘ x + b + c with numbers a, b and tensors s (slot 0), c (slot 1) that have no examples in them, each absent, constant or
//             trainable, broadcast over one example: normalised inputs, layer scale, bare biases, positional embeddings, gates
//   jvp         t_y = a (s ∘ t_x + t_s ∘ x) + t_c
//   vjp_input   g_x = a s ∘ g_y
//   vjp_params  g_s += a Σ_n g_y ∘ x, g_c += Σ_n g_y, both summed over what the slot is broadcast over
//   second_order S_x = a t_s ∘ g_y, S_s = a Σ_n g_y ∘ t_x; curved if s is trained and x has a tangent
//   per_example dense: the same without the sum over n; a slot repeated along leading axes leaves that sum to the factor (its positions)
//   tape        x if s is trainable
//
// broadcast:  y[n] = c for every example; no inputs, c as above (a class token)
//
// How a slot is broadcast: lists scale_shape and scale_strides (of one example, 0 = broadcast), integer scale_offset; likewise shift_…; without
// them the slot has an example's elements in order. A slot that only repeats along leading axes (a bias [C] under [T, C]) is read as it lies, with
// rows of C elements; any other is expanded to an example's width, once per linearisation (values) or product (tangents).
#include "common/scratch.h"
#include "kernels/arithmetic.h"
#include "kernels/elementwise.h"
#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

enum SlotRole : int { kScale = 0, kShift = 1 };

StridedMap slot_map(const Node& node, SlotRole role) {
  const std::string name = role == kScale ? "scale" : "shift";
  const auto offset = node.ints.find(name + "_offset");
  const auto shape = node.lists.find(name + "_shape"), strides = node.lists.find(name + "_strides");
  const bool given = shape != node.lists.end() && strides != node.lists.end();
  if (given && shape->second.size() != strides->second.size()) {
    throw std::invalid_argument(node.rule + " (" + node.name + "): expected as many strides as axes of the " + name + ", got " +
                                std::to_string(strides->second.size()) + " and " + std::to_string(shape->second.size()) + ".");
  }
  return {offset == node.ints.end() ? 0 : offset->second, given ? shape->second : std::vector<int64_t>{node.width},
          given ? strides->second : std::vector<int64_t>{1}};
}

// Both slots of a node as rows of `width` elements that are repeated `repeat` times in an example.
struct Broadcasting {
  int64_t repeat = 1, width = 0;
  StridedMap map[2];
  bool present[2] = {}, expanded[2] = {};

  explicit Broadcasting(const Node& node) : width(node.width) {
    int64_t period[2] = {0, 0};  // 0: not a run of the slot, once or repeated
    for (SlotRole role : {kScale, kShift}) {
      if (!node.has_slot(role)) continue;
      present[role] = true;
      const StridedMap& m = map[role] = slot_map(node, role);
      if (m.size != node.width || !m.fits(node.slot_sizes[role])) {
        throw std::invalid_argument(node.rule + " (" + node.name + "): expected slots that broadcast to " + std::to_string(node.width) +
                                    " elements, got one of " + std::to_string(m.size) + " from " + std::to_string(node.slot_sizes[role]) + ".");
      }
      if (m.rank == 0 || (m.rank == 1 && m.stride[0] == 1)) period[role] = node.width;
      if (m.rank == 2 && m.stride[0] == 0 && m.stride[1] == 1) period[role] = m.shape[1];
    }
    const int64_t common = period[present[kScale] ? kScale : kShift];
    const bool agree = common > 0 && (!present[kScale] || !present[kShift] || period[kScale] == period[kShift]);
    if (agree) {
      width = common;
      repeat = node.width / common;
    }
    for (SlotRole role : {kScale, kShift}) expanded[role] = present[role] && !agree && period[role] != node.width;
  }
};

template <class T>
class SlotRule : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const Broadcasting b(node);
    if (!node.inputs.empty() && node.input_widths[0] != node.width) {
      throw std::invalid_argument(node.rule + " (" + node.name + "): expected an input of " + std::to_string(node.width) + " elements, got " +
                                  std::to_string(node.input_widths[0]) + "; expand it first.");
    }
    Storage storage;
    storage.keeps_input.assign(node.inputs.size(), node.is_trainable(kScale));
    for (SlotRole role : {kScale, kShift}) {
      if (!b.expanded[role]) continue;
      storage.packed_size += node.width;
      if (node.is_trainable(role)) storage.tangent_packed_size += node.width;
    }
    return storage;
  }

  bool is_curved(const Node& node) const override { return node.is_trainable(kScale) && !node.inputs.empty() && node.needs_tangent[0]; }

  void pack(const Tile<T>& tile) const override {
    const Broadcasting b(tile.node);
    T* to = tile.packed;
    for (SlotRole role : {kScale, kShift}) {
      if (!b.expanded[role]) continue;
      strided_gather_stub<T>(tile.ctx, 1, b.map[role], tile.theta[role], 0, to, 0);
      to += tile.node.width;
    }
  }

  void pack_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, T* packed) const override {
    const Broadcasting b(tile.node);
    const int64_t width = tile.node.width, ld = this->storage(tile.node).tangent_packed_size;
    for (SlotRole role : {kScale, kShift}) {
      if (!b.expanded[role] || !tile.node.is_trainable(role)) continue;
      strided_gather_stub<T>(tile.ctx, tile.V, b.map[role], t_theta.theta[role], t_theta.stride, packed, ld);
      packed += width;
    }
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    const Broadcasting b(tile.node);
    for (SlotRole role : {kScale, kShift}) {
      if (b.present[role] && g_theta[role]) slot_gradient(tile, b, role, g_y, role == kScale ? tile.x[0] : nullptr, g_theta[role], stride);
    }
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& s) const override {
    const Broadcasting b(tile.node);
    const Tangent t = tangent(tile, b, s.t_theta, kScale);
    for (int64_t v = 0; v < tile.V; ++v) {
      T* to = s.g_x[0] + v * tile.n * tile.node.width;
      affine_stub<T>(tile.ctx, tile.n * b.repeat, b.width, factor(tile), t.rows + v * t.ld, T(0), nullptr, s.g_y, to, true);
    }
    slot_gradient(tile, b, kScale, s.t_x[0], s.g_y, s.g_theta[kScale], s.stride);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    const Node& node = tile.node;
    const Broadcasting b(node);
    const int64_t rows = tile.V * tile.n;
    for (SlotRole role : {kScale, kShift}) {
      if (!node.is_trainable(role)) continue;
      const T* whole = g_y;
      if (role == kScale) {
        T* product = factors.allocate(rows * node.width);
        scale_stub<T>(tile.ctx, tile.V, tile.n * node.width, tile.x[0], g_y, product, false);
        if (factor(tile) != T(1)) combine_stub<T>(tile.ctx, rows * node.width, factor(tile), product, T(0), nullptr, product, false);
        whole = product;
      }
      const int64_t size = node.slot_sizes[role];
      if (!b.expanded[role] && b.width == size) {
        factors.add({.slot = node.slots[role], .positions = b.repeat, .rows = size, .cols = 1, .row = whole});
        continue;
      }
      T* summed = factors.allocate(rows * size);
      strided_scatter_stub<T>(tile.ctx, rows, b.map[role], whole, node.width, summed, size, size, false);
      factors.add({.slot = node.slots[role], .positions = 1, .rows = size, .cols = 1, .row = summed});
    }
  }

  // g_slot += the sum over examples and what the slot is broadcast over of g [V, n, width] (null x), or of a g ∘ x.
  static void slot_gradient(const Tile<T>& tile, const Broadcasting& b, SlotRole role, const T* g, const T* x, T* g_slot, int64_t stride) {
    Scratch<T> whole(tile.ctx, b.expanded[role] ? tile.V * b.width : 0);  // before the sum over what the slot is broadcast over
    T* to = g_slot + b.map[role].offset;
    int64_t ld = stride;
    if (b.expanded[role]) {
      to = whole.data();
      ld = b.width;
      fill_zero<T>(tile.ctx, tile.V * b.width, to);
    }
    if (x) {
      column_dot_stub<T>(tile.ctx, tile.V, tile.n * b.repeat, b.width, factor(tile), g, x, to, ld);
    } else {
      column_sum_stub<T>(tile.ctx, tile.V, tile.n * b.repeat, b.width, g, to, ld);
    }
    if (b.expanded[role]) {
      strided_scatter_stub<T>(tile.ctx, tile.V, b.map[role], to, ld, g_slot, stride, tile.node.slot_sizes[role], true);
    }
  }

 protected:
  static T factor(const Tile<T>& tile) { return tile.node.inputs.empty() ? T(1) : static_cast<T>(tile.node.number("a")); }

  // The slot's values for rows of b.width elements, null if absent.
  static const T* value(const Tile<T>& tile, const Broadcasting& b, SlotRole role) {
    if (!b.present[role]) return nullptr;
    if (!b.expanded[role]) return tile.theta[role] + b.map[role].offset;
    return tile.packed + (role == kShift && b.expanded[kScale] ? tile.node.width : 0);
  }

  struct Tangent {
    const T* rows = nullptr;  // [V, b.width], ld apart; null: zero
    int64_t ld = 0;
  };

  Tangent tangent(const Tile<T>& tile, const Broadcasting& b, const ParameterTangents<T>& t_theta, SlotRole role) const {
    if (!b.present[role] || t_theta.theta[role] == nullptr) return {};
    if (!b.expanded[role]) return {t_theta.theta[role] + b.map[role].offset, t_theta.stride};
    const bool second = role == kShift && b.expanded[kScale] && tile.node.is_trainable(kScale);
    return {t_theta.packed + (second ? tile.node.width : 0), this->storage(tile.node).tangent_packed_size};
  }

  void slot_tangents(const Tile<T>& tile, const Broadcasting& b, const T* t_x, const ParameterTangents<T>& t_theta, T* t_y) const {
    const Tangent scale = tangent(tile, b, t_theta, kScale), shift = tangent(tile, b, t_theta, kShift);
    affine_tangent_stub<T>(tile.ctx, tile.V, tile.n * b.repeat, b.width, factor(tile), value(tile, b, kScale), t_x, scale.rows, scale.ld,
                           tile.node.inputs.empty() ? nullptr : tile.x[0], shift.rows, shift.ld, t_y);
  }
};

template <class T>
class Affine final : public SlotRule<T> {
 public:
  void forward(const Tile<T>& tile, T* y) const override {
    const Broadcasting b(tile.node);
    affine_stub<T>(tile.ctx, tile.n * b.repeat, b.width, this->factor(tile), this->value(tile, b, kScale), static_cast<T>(tile.node.number("b")),
                   this->value(tile, b, kShift), tile.x[0], y, false);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    this->slot_tangents(tile, Broadcasting(tile.node), t_x[0], t_theta, t_y);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const Broadcasting b(tile.node);
    affine_stub<T>(tile.ctx, tile.V * tile.n * b.repeat, b.width, this->factor(tile), this->value(tile, b, kScale), T(0), nullptr, g_y, g_x,
                   accumulate);
  }
};

template <class T>
class Broadcast final : public SlotRule<T> {
 public:
  Storage storage(const Node& node) const override {
    if (!node.inputs.empty() || node.slots.size() != 2 || node.has_slot(kScale) || !node.has_slot(kShift)) {
      throw std::invalid_argument("broadcast (" + node.name + "): expected no inputs and the slots {-1, slot}, got others.");
    }
    return SlotRule<T>::storage(node);
  }

  void forward(const Tile<T>& tile, T* y) const override {
    const Broadcasting b(tile.node);
    affine_tangent_stub<T>(tile.ctx, 1, tile.n * b.repeat, b.width, T(1), nullptr, nullptr, nullptr, 0, nullptr, this->value(tile, b, kShift), 0, y);
  }

  void jvp(const Tile<T>& tile, const T* const* /*t_x*/, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    this->slot_tangents(tile, Broadcasting(tile.node), nullptr, t_theta, t_y);
  }

  // No inputs: never asked for.
  void vjp_input(const Tile<T>&, int, const T*, const T*, T*, bool) const override {}
};

INFL_REGISTER_RULE("affine", Affine)
INFL_REGISTER_RULE("broadcast", Broadcast)

}  // namespace
}  // namespace infl
