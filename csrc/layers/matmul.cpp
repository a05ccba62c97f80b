// matmul: y[e] = A[e] B[e] for every batch entry e of an example, A [M, K] and B [K, N]; either may be a slot, the same for all examples.
//
//   jvp          t_y = t_A B + A t_B        one product with two terms
//   vjp_input    g_A = g_y Bᵀ,  g_B = Aᵀ g_y, summed over the batch axes along which the operand is broadcast
//   vjp_params   the same for the slot, summed over examples
//   second_order S_A = g_y t_Bᵀ,  S_B = t_Aᵀ g_y; curved if both operands have tangents
//   per_example  dense, M·K (K·N) elements an example
//   tape         both operands; of a slot's partner only if the slot is differentiated
//
// Attributes: M, K, N; slot_operand (−1 none, 0 A, 1 B: inputs and slots then hold one operand each); lists batch (sizes) and a, b, c: strides
// of A, B and y within an example, one per batch axis (0: broadcast), then row and column. So transposed and permuted operands cost no copy; one of
// the two strides of a matrix must be 1. With E batch entries all directions cost 2 E·M·K·N operations per term.
#include "kernels/batched_matmul.h"

#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Matmul final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int slot = static_cast<int>(node.attribute("slot_operand"));
    const size_t num_values = slot < 0 ? 2 : 1;
    if (slot < -1 || slot > 1 || node.inputs.size() != num_values || node.slots.size() != 2 - num_values) {
      throw std::invalid_argument("matmul (" + node.name + "): expected two operands, the slot being " + std::to_string(slot) + ", got " +
                                  std::to_string(node.inputs.size()) + " inputs and " + std::to_string(node.slots.size()) + " slots.");
    }
    const int64_t M = node.attribute("M"), K = node.attribute("K"), N = node.attribute("N");
    const auto& batch = node.list("batch");
    if (batch.size() > kMaxBatchAxes) {
      throw std::invalid_argument("matmul (" + node.name + "): expected at most " + std::to_string(kMaxBatchAxes) + " batch axes, got " +
                                  std::to_string(batch.size()) + ".");
    }
    check(node, "a", M, K, slot == 0 ? node.slot_sizes[0] : node.input_widths[0]);
    check(node, "b", K, N, slot == 1 ? node.slot_sizes[0] : node.input_widths[slot == 0 ? 0 : 1]);
    check(node, "c", M, N, node.width);
    if (slot < 0) return {.keeps_input = {true, true}, .state_widths = {}};
    return {.keeps_input = {node.is_trainable(0)}, .state_widths = {}};
  }

  bool is_curved(const Node& node) const override {
    return node.needs_tangent[0] && (slot_operand(node) < 0 ? node.needs_tangent[1] : node.is_trainable(0));
  }

  void forward(const Tile<T>& tile, T* y) const override {
    BatchedMatmul<T> p = product(tile, 1, y);
    p.a[0] = primal(tile, 0);
    p.b[0] = primal(tile, 1);
    batched_matmul_stub<T>(tile.ctx, p);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* /*scale*/, T* t_y) const override {
    BatchedMatmul<T> p = product(tile, tile.V, t_y);
    for (int side = 0; side < 2; ++side) {
      const MatrixView<const T> moving = tangent(tile, side, t_x, t_theta);
      if (moving.data == nullptr) continue;
      p.a[side] = side == 0 ? moving : primal(tile, 0);
      p.b[side] = side == 0 ? primal(tile, 1) : moving;
    }
    batched_matmul_stub<T>(tile.ctx, p);
  }

  void vjp_input(const Tile<T>& tile, int i, const T* g_y, const T* /*scale*/, T* g_x, bool accumulate) const override {
    const int side = slot_operand(tile.node) == 0 ? 1 : i;
    MatrixView<T> target = view(tile, side, g_x);
    target.v_stride = tile.n * target.n_stride;
    cotangent(tile, side, output(tile, g_y), primal(tile, 1 - side), target, accumulate);
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    if (g_theta[0] == nullptr) return;
    const int side = slot_operand(tile.node);
    MatrixView<T> target = view(tile, side, g_theta[0]);
    target.v_stride = stride;
    cotangent(tile, side, output(tile, g_y), primal(tile, 1 - side), target, true);
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& order) const override {
    MatrixView<const T> g = output(tile, order.g_y);
    g.v_stride = 0;
    for (int side = 0; side < 2; ++side) {
      const Source s(tile.node, side);
      MatrixView<T> target = view(tile, side, s.is_slot ? order.g_theta[0] : order.g_x[s.index]);
      target.v_stride = s.is_slot ? order.stride : tile.n * target.n_stride;
      cotangent(tile, side, g, tangent(tile, 1 - side, order.t_x, order.t_theta), target, true);
    }
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    const int side = slot_operand(tile.node);
    if (side < 0 || !tile.node.is_trainable(0)) return;
    const int64_t size = tile.node.slot_sizes[0];
    T* g = factors.allocate(tile.V * tile.n * size);
    MatrixView<T> target = view(tile, side, g);
    target.n_stride = size;
    target.v_stride = tile.n * size;
    cotangent(tile, side, output(tile, g_y), primal(tile, 1 - side), target, false);
    factors.add({.slot = tile.node.slots[0], .positions = 1, .rows = size, .cols = 1, .row = g});
  }

 private:
  // Where an operand comes from.
  struct Source {
    Source(const Node& node, int side) : is_slot(slot_operand(node) == side), index(slot_operand(node) < 0 ? side : 0) {}
    bool is_slot;
    int index;
  };

  static int slot_operand(const Node& node) { return static_cast<int>(node.attribute("slot_operand")); }

  static int64_t operand_size(const Node& node, const char* key, int64_t rows, int64_t cols) {
    const auto &batch = node.list("batch"), &strides = node.list(key);
    int64_t size = rows * cols;
    for (size_t axis = 0; axis < batch.size(); ++axis) size *= strides[axis] != 0 ? batch[axis] : 1;
    return size;
  }

  // Each element of the operand is read exactly once per broadcast entry: as many as the value has, the last of them at its end.
  static void check(const Node& node, const char* key, int64_t rows, int64_t cols, int64_t width) {
    const auto &batch = node.list("batch"), &strides = node.list(key);
    bool valid = strides.size() == batch.size() + 2 && rows > 0 && cols > 0;
    if (valid) {
      const int64_t row = strides[batch.size()], col = strides[batch.size() + 1];
      valid = row >= 0 && col >= 0 && (row == 1 || col == 1 || rows == 1 || cols == 1);
      int64_t last = (rows - 1) * row + (cols - 1) * col;
      for (size_t axis = 0; axis < batch.size(); ++axis) {
        valid = valid && batch[axis] > 0 && strides[axis] >= 0;
        last += (batch[axis] - 1) * strides[axis];
      }
      valid = valid && last + 1 == operand_size(node, key, rows, cols) && last + 1 == width;
    }
    if (!valid) {
      throw std::invalid_argument("matmul (" + node.name + "): expected '" + key + "' to hold the strides of " + std::to_string(rows) + " by " +
                                  std::to_string(cols) + " matrices that cover " + std::to_string(width) +
                                  " elements with a row or column stride of 1, got others.");
    }
  }

  template <class P>
  static MatrixView<P> view(const Tile<T>& tile, int side, P* data) {
    const Source s(tile.node, side);
    const auto& strides = tile.node.list(side == 0 ? "a" : "b");
    const size_t axes = strides.size() - 2;
    return {data, 0, s.is_slot ? 0 : tile.node.input_widths[s.index], strides.data(), strides[axes], strides[axes + 1]};
  }

  static MatrixView<const T> primal(const Tile<T>& tile, int side) {
    const Source s(tile.node, side);
    return view(tile, side, s.is_slot ? tile.theta[0] : tile.x[s.index]);
  }

  // Without data where the operand has none.
  static MatrixView<const T> tangent(const Tile<T>& tile, int side, const T* const* t_x, const ParameterTangents<T>& t_theta) {
    const Source s(tile.node, side);
    MatrixView<const T> found = view(tile, side, s.is_slot ? t_theta.theta[0] : t_x[s.index]);
    found.v_stride = s.is_slot ? t_theta.stride : tile.n * found.n_stride;
    return found;
  }

  template <class P>
  static MatrixView<P> output(const Tile<T>& tile, P* data) {
    const auto& strides = tile.node.list("c");
    const size_t axes = strides.size() - 2;
    return {data, tile.n * tile.node.width, tile.node.width, strides.data(), strides[axes], strides[axes + 1]};
  }

  static BatchedMatmul<T> shape(const Tile<T>& tile, int64_t V) {
    BatchedMatmul<T> p;
    p.V = V;
    p.n = tile.n;
    p.num_axes = static_cast<int>(tile.node.list("batch").size());
    p.batch = tile.node.list("batch").data();
    p.M = tile.node.attribute("M");
    p.K = tile.node.attribute("K");
    p.N = tile.node.attribute("N");
    return p;
  }

  static BatchedMatmul<T> product(const Tile<T>& tile, int64_t V, T* c) {
    BatchedMatmul<T> p = shape(tile, V);
    p.c = output(tile, c);
    return p;
  }

  // The cotangent of A: g Bᵀ, or of B: Aᵀ g, with the other operand B or A.
  static void cotangent(const Tile<T>& tile, int side, const MatrixView<const T>& g, const MatrixView<const T>& other, const MatrixView<T>& target,
                        bool accumulate) {
    BatchedMatmul<T> p = shape(tile, tile.V);
    if (side == 0) {
      std::swap(p.K, p.N);
      p.a[0] = g;
      p.b[0] = other.transposed();
    } else {
      std::swap(p.M, p.K);
      p.a[0] = other.transposed();
      p.b[0] = g;
    }
    p.c = target;
    p.accumulate = accumulate;
    batched_matmul_stub<T>(tile.ctx, p);
  }
};

INFL_REGISTER_RULE("matmul", Matmul)

}  // namespace
}  // namespace infl
