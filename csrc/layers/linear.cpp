// linear: y[n, t, o] = Σ_i x[n, t, i] W[o, i] + b[o], for every position t = 1..width / features; W stored [O, I], or [I, O] if `transposed`.
//
//   jvp          t_y = t_x Wᵀ + x T_Wᵀ + 1 t_bᵀ              one product with two terms
//   vjp_input    g_x = g_y W
//   vjp_params   g_W += Σ_{n,t} g_y xᵀ,  g_b += Σ_{n,t} g_y
//   second_order S_x = g_y T_W,  S_W = Σ_{n,t} g_y t_xᵀ; curved if W is trained and x has a tangent
//   per_example  W: outer product of g_y and x;  b: dense g_y
//   tape         x if W is differentiated; W packed, both ways if x has a cotangent (each O·I elements, shared by all tiles)
//   sets         each of the three products is one batched call, with W as it lies
//   device       tangents of W are read where they lie: the vendor's product takes either storage, and a copy would move them twice more
//
//   prepared x packed both ways, as the right factor of W xᵀ and of the gradient; forward is then (W xᵀ)ᵀ with W where it lies
//
// With M = n·t rows the products cost 2 M·O·I operations each; nothing is spent on absent tangents or frozen parameters.
#include <algorithm>

#include "common/scratch.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/movement.h"
#include "layers/rule.h"

namespace infl {
namespace {

template <class T>
class Linear final : public Rule<T> {
 public:
  Storage storage(const Node& node) const override {
    const int64_t I = node.attribute("in_features"), O = node.attribute("out_features");
    if (I <= 0 || O <= 0 || node.input_widths[0] % I != 0 || node.width != node.input_widths[0] / I * O) {
      throw std::invalid_argument("linear (" + node.name + "): expected widths that are multiples of in_features = " + std::to_string(I) +
                                  " and out_features = " + std::to_string(O) + ", got " + std::to_string(node.input_widths[0]) + " and " +
                                  std::to_string(node.width) + ".");
    }
    Storage storage{.keeps_input = {node.is_trainable(0)},
                    .state_widths = {},
                    .packed_size = gemm_packed_size<T>(I, O) + (node.needs_tangent[0] ? gemm_packed_size<T>(O, I) : 0),
                    .tangent_packed_size = node.is_trainable(0) ? gemm_packed_size<T>(I, O) + (node.curved ? gemm_packed_size<T>(O, I) : 0) : 0,
                    .tangents_in_place = true};
    const bool transposed = node.attribute("transposed") != 0;
    storage.positions = node.width / O;
    if (node.width == O) storage.dense = {I, O, transposed ? 1 : I, transposed ? O : 1};
    return storage;
  }

  bool is_curved(const Node& node) const override { return node.is_trainable(0) && node.needs_tangent[0]; }

  bool fuses_scale() const override { return true; }

  bool takes_sets(const Node&) const override { return true; }

  int64_t prepared_size(const Node& node, int64_t n) const override {
    const int64_t I = node.attribute("in_features"), M = n * (node.input_widths[0] / I);
    return gemm_packed_size<T>(I, M) + (multiplies_prepared(node) ? gemm_packed_size<T>(M, I) : 0);
  }

  void prepare_input(const Tile<T>& tile, T* prepared) const override {
    const Shape s(tile);
    // as the right factor of W xᵀ [I, M], then of the gradient gᵀ x [M, I]
    gemm_pack_stub<T>(tile.ctx, 1, s.I, s.M, tile.x[0], 0, 1, s.I, prepared);
    if (multiplies_prepared(tile.node)) gemm_pack_stub<T>(tile.ctx, 1, s.M, s.I, tile.x[0], 0, s.I, 1, prepared + gemm_packed_size<T>(s.I, s.M));
  }

  void pack(const Tile<T>& tile) const override {
    const Shape s(tile);
    // as the right factor of x Wᵀ [I, O], then, where x has a cotangent, of g W [O, I]
    if (!tile.prepared) gemm_pack_stub<T>(tile.ctx, 1, s.I, s.O, tile.theta[0], 0, s.in_stride, s.out_stride, tile.packed);
    if (!tile.node.needs_tangent[0]) return;
    gemm_pack_stub<T>(tile.ctx, 1, s.O, s.I, tile.theta[0], 0, s.out_stride, s.in_stride, tile.packed + gemm_packed_size<T>(s.I, s.O));
  }

  void pack_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, T* packed) const override {
    if (tile.ctx.on_device()) return;
    const Shape s(tile);
    gemm_pack_stub<T>(tile.ctx, tile.V, s.I, s.O, t_theta.theta[0], t_theta.stride, s.in_stride, s.out_stride, packed);
    if (!tile.node.curved) return;
    packed += tile.V * gemm_packed_size<T>(s.I, s.O);
    gemm_pack_stub<T>(tile.ctx, tile.V, s.O, s.I, t_theta.theta[0], t_theta.stride, s.out_stride, s.in_stride, packed);
  }

  void forward(const Tile<T>& tile, T* y) const override {
    const Shape s(tile);
    if (tile.prepared) return forward_prepared(tile, s, y);
    Gemm<T> g = product(s, tile.sets, s.O, y);
    g.terms[0] = left(s, tile.x[0], s.I, tile.sets > 1 ? tile.x_stride[0] : 0);
    weights(tile, s.in_stride, s.out_stride, 0, g.terms[0]);
    g.bias = tile.theta[1];
    g.bias_batch = tile.node.is_trainable(1) ? tile.theta_stride : 0;
    gemm_stub<T>(tile.ctx, g);
  }

  void jvp(const Tile<T>& tile, const T* const* t_x, const ParameterTangents<T>& t_theta, const T* scale, T* t_y) const override {
    const Shape s(tile);
    Gemm<T> g = product(s, tile.V, s.O, t_y);
    if (t_x[0]) {
      g.terms[0] = left(s, t_x[0], s.I, s.M * s.I);
      g.terms[0].packed = tile.packed;
    }
    if (t_theta.theta[0]) {
      g.terms[1] = left(s, tile.x[0], s.I, 0);
      weight_tangents(tile, t_theta, s.I, s.O, s.in_stride, s.out_stride, 0, g.terms[1]);
    }
    g.bias = t_theta.theta[1];
    g.bias_batch = t_theta.stride;
    g.scale = scale;
    g.scale_ld = s.O;
    gemm_stub<T>(tile.ctx, g);
  }

  void vjp_input(const Tile<T>& tile, int /*i*/, const T* g_y, const T* scale, T* g_x, bool accumulate) const override {
    const Shape s(tile);
    Gemm<T> g = product(s, tile.V * tile.sets, s.I, g_x);
    g.terms[0] = left(s, g_y, s.O, s.M * s.O);
    weights(tile, s.out_stride, s.in_stride, gemm_packed_size<T>(s.I, s.O), g.terms[0]);
    g.accumulate = accumulate;
    if (tile.sets == 1) {
      g.scale = scale;
      g.scale_ld = s.I;
    }
    gemm_stub<T>(tile.ctx, g);
    if (tile.sets > 1 && scale) scale_stub<T>(tile.ctx, 1, tile.sets * s.M * s.I, scale, g_x, g_x, false);  // the epilogue's is the same for all V
  }

  void vjp_params(const Tile<T>& tile, const T* g_y, T* const* g_theta, int64_t stride) const override {
    const Shape s(tile);
    if (g_theta[0]) weight_gradient(tile, s, g_y, s.M * s.O, tile.x[0], tile.sets > 1 ? tile.x_stride[0] : 0, g_theta[0], stride, !tile.first);
    if (g_theta[1]) column_sum_stub<T>(tile.ctx, tile.V * tile.sets, s.M, s.O, g_y, g_theta[1], stride);
  }

  bool writes(const Node&, size_t k) const override { return k == 0; }

  bool descends(const Node&, size_t k) const override { return k == 0; }

  // W by blocks of rows whose gradient stays in the cache. vjp_input reads W packed, as it was before the step.
  void descend(const Tile<T>& tile, size_t /*k*/, const T* g_y, const Descent<T>& descent, const Moved<T>& moved, int64_t begin) const override {
    const Shape s(tile);
    Gemm<T> p = gradient_product(s, 1, g_y, 0, tile.x[0], 0);
    const int64_t rows = p.M, cols = p.N, M = s.M;
    Scratch<T> packed(tile.ctx, tile.prepared && !s.transposed ? 0 : gemm_packed_size<T>(M, cols));
    p.terms[0].packed = packed.data();
    if (tile.prepared && !s.transposed) {
      p.terms[0].packed = tile.prepared + gemm_packed_size<T>(s.I, M);
    } else {
      gemm_pack_stub<T>(tile.ctx, 1, M, cols, p.terms[0].b, 0, cols, 1, packed.data());
    }
    const int64_t block = tile.ctx.num_threads > 1 ? rows : rows_of_a_block(rows, cols);
    Scratch<T> gradient(tile.ctx, block * cols);
    p.c = gradient.data();
    for (int64_t r = 0; r < rows; r += block) {
      p.M = std::min(block, rows - r);
      gemm_stub<T>(tile.ctx, p);
      infl::descend<T>(tile.ctx, begin + r * cols, p.M * cols, descent, gradient.data(), moved);
      p.terms[0].a += block;
    }
  }

  void second_order(const Tile<T>& tile, const SecondOrder<T>& order) const override {
    const Shape s(tile);
    Gemm<T> g = product(s, tile.V, s.I, order.g_x[0]);
    g.terms[0] = left(s, order.g_y, s.O, 0);
    weight_tangents(tile, order.t_theta, s.O, s.I, s.out_stride, s.in_stride, tile.V * gemm_packed_size<T>(s.I, s.O), g.terms[0]);
    g.accumulate = true;
    gemm_stub<T>(tile.ctx, g);
    weight_gradient(tile, s, order.g_y, 0, order.t_x[0], s.M * s.I, order.g_theta[0], order.stride, true);
  }

  void per_example(const Tile<T>& tile, const T* g_y, FactorSink<T>& factors) const override {
    const Shape s(tile);
    const int64_t positions = tile.node.width / s.O;
    if (tile.node.is_trainable(0)) {
      Factor<T> f{.slot = tile.node.slots[0], .positions = positions};
      f.rows = s.transposed ? s.I : s.O;
      f.cols = s.transposed ? s.O : s.I;
      f.row = s.transposed ? tile.x[0] : g_y;
      f.col = s.transposed ? g_y : tile.x[0];
      f.row_has_v = !s.transposed;
      f.col_has_v = s.transposed;
      factors.add(f);
    }
    if (tile.node.is_trainable(1)) {
      factors.add({.slot = tile.node.slots[1], .positions = positions, .rows = s.O, .cols = 1, .row = g_y});
    }
  }

 private:
  struct Shape {
    explicit Shape(const Tile<T>& tile)
        : I(tile.node.attribute("in_features")),
          O(tile.node.attribute("out_features")),
          M(tile.n * (tile.node.width / O)),
          transposed(tile.node.attribute("transposed") != 0),
          out_stride(transposed ? 1 : I),
          in_stride(transposed ? O : 1) {}
    int64_t I, O, M;  // M rows: examples times positions
    bool transposed;
    int64_t out_stride, in_stride;  // of W
  };

  static Gemm<T> product(const Shape& s, int64_t V, int64_t N, T* c) {
    Gemm<T> g;
    g.V = V;
    g.M = s.M;
    g.N = N;
    g.c = c;
    g.c_batch = s.M * N;
    g.ldc = N;
    return g;
  }

  // g_W = or += Σ g xᵀ over rows, g [V, M, O] and x [V, M, I]; a batch stride of 0: the same for all right-hand sides.
  static void weight_gradient(const Tile<T>& tile, const Shape& s, const T* g, int64_t g_batch, const T* x, int64_t x_batch, T* out, int64_t stride,
                              bool accumulate) {
    Gemm<T> p = gradient_product(s, tile.V * tile.sets, g, g_batch, x, x_batch);
    p.c = out;
    p.c_batch = stride;
    p.accumulate = accumulate;
    gemm_stub<T>(tile.ctx, p);
  }

  static Gemm<T> gradient_product(const Shape& s, int64_t V, const T* g, int64_t g_batch, const T* x, int64_t x_batch) {
    const int64_t rows = s.transposed ? s.I : s.O, cols = s.transposed ? s.O : s.I;
    Gemm<T> p;
    p.V = V;
    p.M = rows;
    p.N = cols;
    p.ldc = cols;
    GemmTerm<T>& term = p.terms[0];
    // The parameter's rows come from g as stored [O, I], from x as stored [I, O].
    term.K = s.M;
    term.a = s.transposed ? x : g;
    term.a_row = 1;
    term.a_col = rows;
    term.a_batch = s.transposed ? x_batch : g_batch;
    term.b = s.transposed ? g : x;
    term.b_row = cols;
    term.b_col = 1;
    term.b_batch = s.transposed ? g_batch : x_batch;
    return p;
  }

  // Rows of W, a multiple of the product's register tile, of which gradient, values and moments take half of a core's second-level cache.
  static int64_t rows_of_a_block(int64_t rows, int64_t cols) {
    constexpr int64_t kBytes = 512 << 10, kTile = 12;
    const int64_t most = std::max<int64_t>(1, kBytes / (4 * cols * static_cast<int64_t>(sizeof(T))) / kTile) * kTile;
    const int64_t blocks = (rows + most - 1) / most;
    return ((rows + blocks - 1) / blocks + kTile - 1) / kTile * kTile;
  }

  // Whether the gradient has the input as its right factor.
  static bool multiplies_prepared(const Node& node) { return node.is_trainable(0) && node.attribute("transposed") == 0; }

  // y = (W xᵀ)ᵀ + b: the weights are read where they lie, once, and need no packing.
  static void forward_prepared(const Tile<T>& tile, const Shape& s, T* y) {
    Scratch<T> transposed(tile.ctx, s.O * s.M);
    Gemm<T> g;
    g.M = s.O;
    g.N = g.ldc = s.M;
    g.c = transposed.data();
    g.terms[0].K = s.I;
    g.terms[0].a = tile.theta[0];
    g.terms[0].a_row = s.out_stride;
    g.terms[0].a_col = s.in_stride;
    g.terms[0].packed = tile.prepared;
    gemm_stub<T>(tile.ctx, g);
    strided_gather_stub<T>(tile.ctx, 1, StridedMap(0, {s.M, s.O}, {1, s.M}), transposed.data(), 0, y, 0);
    if (tile.theta[1]) affine_stub<T>(tile.ctx, s.M, s.O, T(1), nullptr, T(0), tile.theta[1], y, y, false);
  }

  // W as the right factor: for one set what `pack` put at `packed`, of several as it lies, element (k, n) at k · row + n · col.
  static void weights(const Tile<T>& tile, int64_t row, int64_t col, int64_t packed, GemmTerm<T>& term) {
    if (tile.sets == 1) {
      term.packed = tile.packed + packed;
      return;
    }
    term.b = tile.theta[0];
    term.b_row = row;
    term.b_col = col;
    term.b_batch = tile.node.is_trainable(0) ? tile.theta_stride : 0;
  }

  // Tangents of W as the right factor [K, N]: what `pack_tangents` put at `packed`, or on a device as they lie.
  static void weight_tangents(const Tile<T>& tile, const ParameterTangents<T>& t_theta, int64_t K, int64_t N, int64_t row, int64_t col,
                              int64_t packed, GemmTerm<T>& term) {
    if (!tile.ctx.on_device()) {
      term.packed = t_theta.packed + packed;
      term.packed_batch = gemm_packed_size<T>(K, N);
      return;
    }
    term.b = t_theta.theta[0];
    term.b_row = row;
    term.b_col = col;
    term.b_batch = t_theta.stride;
  }

  static GemmTerm<T> left(const Shape&, const T* a, int64_t K, int64_t batch) {
    GemmTerm<T> term;
    term.K = K;
    term.a = a;
    term.a_row = K;
    term.a_batch = batch;
    return term;
  }
};

INFL_REGISTER_RULE("linear", Linear)

}  // namespace
}  // namespace infl
