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
//
// Rows of a table (position embeddings, relative position biases): slot 2 for the scale, slot 3 for the shift holds the numbers of the rows, the same
// for all examples; then it is these rows, integer scale_cols elements each, that are broadcast. Row scale_padding (−1: none) takes no derivative.
// A product reads and writes no other rows; of one example the gradient is a row scatter.
#include "common/scratch.h"
#include "kernels/arithmetic.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

enum SlotRole : int { kScale = 0, kShift = 1 };
constexpr int kRows = 2;  // of a role's rows: the slot so far behind its own

std::string name_of(SlotRole role) { return role == kScale ? "scale" : "shift"; }

// The rows of a table that a slot is read by; none: it is read as it lies.
struct TableRows {
  int64_t count = 0, cols = 0, padding = -1;
  int64_t size() const { return count * cols; }

  TableRows() = default;
  TableRows(const Node& node, SlotRole role) {
    const size_t numbers = kRows + role;
    if (!node.has_slot(numbers)) return;
    count = node.slot_sizes[numbers];
    cols = node.attribute(name_of(role) + "_cols");
    padding = node.attribute(name_of(role) + "_padding");
    if (node.is_trainable(numbers) || cols <= 0 || node.slot_sizes[role] % cols != 0) {
      throw std::invalid_argument(node.rule + " (" + node.name + "): expected constant numbers of rows and a table of whole rows, got " +
                                  std::to_string(node.slot_sizes[role]) + " elements in rows of " + std::to_string(cols) + ".");
    }
  }
};

StridedMap slot_map(const Node& node, SlotRole role) {
  const std::string name = name_of(role);
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
  TableRows rows[2];
  bool present[2] = {}, expanded[2] = {};

  explicit Broadcasting(const Node& node) : width(node.width) {
    int64_t period[2] = {0, 0};  // 0: not a run of the slot, once or repeated
    for (SlotRole role : {kScale, kShift}) {
      if (!node.has_slot(role)) continue;
      present[role] = true;
      const StridedMap& m = map[role] = slot_map(node, role);
      rows[role] = TableRows(node, role);
      const int64_t read = rows[role].count > 0 ? rows[role].size() : node.slot_sizes[role];
      if (m.size != node.width || !m.fits(read)) {
        throw std::invalid_argument(node.rule + " (" + node.name + "): expected slots that broadcast to " + std::to_string(node.width) +
                                    " elements, got one of " + std::to_string(m.size) + " from " + std::to_string(read) + ".");
      }
      if (rows[role].count > 0) continue;
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
      if (b.rows[role].count > 0) {
        const int64_t rows = tile.node.slot_sizes[role] / b.rows[role].cols;
        check_indices_stub<T>(tile.ctx, b.rows[role].count, tile.theta[kRows + role], rows, false, tile.node.name.c_str());
      }
      expand(tile, b, role, 1, -1, tile.theta[role], 0, to, 0);
      to += tile.node.width;
    }
  }

  void pack_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, T* packed) const override {
    const Broadcasting b(tile.node);
    const int64_t width = tile.node.width, ld = this->storage(tile.node).tangent_packed_size;
    for (SlotRole role : {kScale, kShift}) {
      if (!b.expanded[role] || !tile.node.is_trainable(role)) continue;
      expand(tile, b, role, tile.V, b.rows[role].padding, t_theta.theta[role], t_theta.stride, packed, ld);
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
      if (const TableRows& table = b.rows[role]; table.count > 0) {
        T *met = factors.allocate(rows * table.size()), *index = factors.allocate(tile.n * table.count);
        strided_scatter_stub<T>(tile.ctx, rows, b.map[role], whole, node.width, met, table.size(), table.size(), false);
        copy_rows_stub<T>(tile.ctx, tile.n, table.count, tile.theta[kRows + role], 0, index, table.count, false);
        Factor<T> f{.slot = node.slots[role], .positions = table.count, .rows = size / table.cols, .cols = table.cols};
        f.index = index;
        f.skip = table.padding;
        f.col = met;
        f.row_has_v = false;
        f.col_has_v = true;
        factors.add(f);
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
    if (!b.expanded[role]) return;
    if (const TableRows& table = b.rows[role]; table.count > 0) {
      Scratch<T> met(tile.ctx, tile.V * table.size());
      strided_scatter_stub<T>(tile.ctx, tile.V, b.map[role], to, ld, met.data(), table.size(), table.size(), false);
      row_scatter_stub<T>(tile.ctx, tile.V, table.count, table.cols, tile.theta[kRows + role], 0, table.padding, met.data(), g_slot, stride);
    } else {
      strided_scatter_stub<T>(tile.ctx, tile.V, b.map[role], to, ld, g_slot, stride, tile.node.slot_sizes[role], true);
    }
  }

 protected:
  // V slots `from_ld` apart to an example's width each, `to_ld` apart; a table's row `skip` as zeros.
  static void expand(const Tile<T>& tile, const Broadcasting& b, SlotRole role, int64_t V, int64_t skip, const T* from, int64_t from_ld, T* to,
                     int64_t to_ld) {
    const TableRows& table = b.rows[role];
    if (table.count == 0) return strided_gather_stub<T>(tile.ctx, V, b.map[role], from, from_ld, to, to_ld);
    Scratch<T> picked(tile.ctx, V * table.size());
    row_gather_stub<T>(tile.ctx, V, table.count, table.cols, tile.theta[kRows + role], skip, from, from_ld, picked.data());
    strided_gather_stub<T>(tile.ctx, V, b.map[role], picked.data(), table.size(), to, to_ld);
  }

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
    if (!node.inputs.empty() || node.has_slot(kScale) || !node.has_slot(kShift)) {
      throw std::invalid_argument("broadcast (" + node.name + "): expected no inputs and slots that begin with {-1, slot}, got others.");
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
