// A block of threads takes one right-hand side and a run of tiles of 8 to 32 examples, each through all layers, tangents up and cotangents down:
//
//   t_l  = (W_l t_{l−1} + T_l x_{l−1} + t_b) φ'_l        both terms in the same registers
//   z    = H t_L                                          a warp for each example
//   G_l += Σ_n g_l x_{l−1}ᵀ,   g_{l−1} = (W_lᵀ g_l) φ'_{l−1}
//
// Between layers tangents and cotangents stay in shared memory, as elements of the multiplication (rounded once): features down, [feature][example],
// as left factor of the next product; cotangents besides [example][feature], as left factor of the weight gradient. Weights, their tangents and the
// kept activations come through registers, a step of 8 or 16 terms ahead of what is multiplied, into two panels in turn, so that a step has one
// barrier; columns are taken 128 at a time. A bias gradient is the product of the (rounded) cotangents with ones.
//
// Counted, a tile of R examples and one right-hand side, w = Σ inputs · outputs: 8 R w operations (4 R of the first layer), for 5 w elements: W
// twice, its tangent, the gradient written and read again (added up by a second launch in the order of the runs, or by the tile that follows). With
// 32 examples that is 51 operations for 4 bytes, and all of it lies in L2, which serves a few times what memory does: 8-128-128-1 has 71 KB of each.
// State (x and φ', twice) is read by every right-hand side: R (inputs + outputs) elements a layer.
//
// At most 99 KB of shared memory (mlp_shared_bytes). Registers are not capped (at 128 a thread the compiler spills up to 850 bytes), so a processor
// has one block of 256 threads (large tiles) or two of 128.
#include "kernels/mlp.h"

#include "kernels/cuda/mma.h"
#include "kernels/cuda/tile.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kCols = 128;  // of a product at a time

// Elements between rows of panels beyond a multiple of 32.
template <class Tile>
constexpr int kPad = Tile::kColumnPad;
template <class T, int kRows, int kTileRows, int kTileCols>
constexpr int kPad<RegisterTile<T, kRows, kCols, kTileRows, kTileCols>> = kVectorWidth<T>;

__host__ __device__ constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

__device__ inline float decoded(float x) { return x; }
__device__ inline double decoded(double x) { return x; }
__device__ inline float decoded(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
__device__ inline float decoded(uint16_t bits) { return decoded(static_cast<uint32_t>(bits) << 16); }

// Places in shared memory, in bytes.
template <class Tile>
struct Layout {
  using T = typename Tile::Value;
  using Element = typename Tile::Element;
  static constexpr int kRows = Tile::kRows, kStep = 64 / sizeof(T);
  static constexpr int kLeft = kRows + kPad<Tile>, kRight = kCols + kPad<Tile>;  // row strides of panels
  static_assert(2 * kStep >= kRows, "a tile of kept activations takes the room of both right panels");

  int width, stride, bytes;
  int tangents[2], cotangents, outputs, left, right;

  __host__ __device__ explicit Layout(int widest) : width(round_up(widest, 32)), stride(width + kPad<Tile>), bytes(0) {
    const auto take = [this](int count, int size) {
      const int at = bytes;
      bytes += round_up(count * size, 16);
      return at;
    };
    for (int& buffer : tangents) buffer = take(width * kLeft, sizeof(Element));
    cotangents = take(kRows * stride, sizeof(Element));
    // The outputs, in full, become the first cotangents in place where an element is as wide.
    outputs = sizeof(Element) == sizeof(T) ? cotangents : take(kRows * stride, sizeof(T));
    left = take(2 * kStep * kLeft, sizeof(Element));
    right = take(2 * kStep * kRight, sizeof(Element));
  }
};

// One term of a product: the left factor lies in shared memory, features down, or is x [kRows, K] in memory; the right one is in memory.
template <class T, class Element>
struct Term {
  const Element* resident = nullptr;
  const T* x = nullptr;
  const T* right = nullptr;
  int k_stride = 0, c_stride = 0, K = 0;
};

template <class Tile>
struct Worker {
  using T = typename Tile::Value;
  using Element = typename Tile::Element;
  using Places = Layout<Tile>;
  using ProductTerm = Term<T, Element>;
  static constexpr int kRows = Tile::kRows, kThreads = Tile::kThreads, kStep = Places::kStep;
  static constexpr int kLeft = Places::kLeft, kRight = Places::kRight;
  static constexpr int kLeftOfThread = (kRows * kStep + kThreads - 1) / kThreads, kRightOfThread = kCols * kStep / kThreads;

  const Mlp<T>& p;
  const int stride;
  Element *tangents, *next;  // features down: those of the layer in hand, and of the one after
  Element* cotangents;
  T* outputs;
  Element *left, *right;
  int turn = 0;  // which panels come next
  int64_t v = 0, first = 0;
  int count = 0;  // of the tile: examples [first, first + count)
  Tile tile;
  T next_left[kLeftOfThread], next_right[kRightOfThread];

  __device__ Worker(const Mlp<T>& problem, unsigned char* memory, const Places& places)
      : p(problem),
        stride(places.stride),
        tangents(reinterpret_cast<Element*>(memory + places.tangents[0])),
        next(reinterpret_cast<Element*>(memory + places.tangents[1])),
        cotangents(reinterpret_cast<Element*>(memory + places.cotangents)),
        outputs(reinterpret_cast<T*>(memory + places.outputs)),
        left(reinterpret_cast<Element*>(memory + places.left)),
        right(reinterpret_cast<Element*>(memory + places.right)) {}

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  // Whether the running thread, or its warp where a warp multiplies together, has none of `columns` columns.
  __device__ static bool is_idle(int columns) {
    if constexpr (requires { Tile::kOfWarpAcross; }) {
      return thread() / kWarp % (kCols / Tile::kOfWarpAcross) * Tile::kOfWarpAcross >= columns;
    } else {
      return Tile::col(0) >= columns;
    }
  }

  // A step's elements of the right factor for columns [c0, C), and of the left one; zero outside. Neighbouring threads read along the unit stride.
  __device__ void fetch(const ProductTerm& term, int k0, int c0, int C) {
    const bool along_columns = term.c_stride == 1;
    INFL_UNROLL(16)
    for (int i = 0; i < kRightOfThread; ++i) {
      const int at = thread() + i * kThreads;
      const int k = k0 + (along_columns ? at / kCols : at % kStep), c = c0 + (along_columns ? at % kCols : at / kStep);
      next_right[i] = k < term.K && c < C ? term.right[k * term.k_stride + c * term.c_stride] : T(0);
    }
    if (term.resident != nullptr) return;
    INFL_UNROLL(4)
    for (int i = 0; i < kLeftOfThread; ++i) {
      const int at = thread() + i * kThreads, k = k0 + at % kStep, n = at / kStep;
      next_left[i] = n < count && k < term.K ? term.x[int64_t{n} * term.K + k] : T(0);
    }
  }

  __device__ void keep(const ProductTerm& term) {
    const bool along_columns = term.c_stride == 1;
    Element* to = right + turn * kStep * kRight;
    INFL_UNROLL(16)
    for (int i = 0; i < kRightOfThread; ++i) {
      const int at = thread() + i * kThreads;
      const int k = along_columns ? at / kCols : at % kStep, c = along_columns ? at % kCols : at / kStep;
      to[k * kRight + c] = Tile::element(next_right[i]);
    }
    if (term.resident != nullptr) return;
    to = left + turn * kStep * kLeft;
    INFL_UNROLL(4)
    for (int i = 0; i < kLeftOfThread; ++i) {
      const int at = thread() + i * kThreads;
      if (at < kRows * kStep) to[at % kStep * kLeft + at / kStep] = Tile::element(next_left[i]);
    }
  }

  // The tile's columns c0.. of C: the sum over terms of left · right. The panel that a step fills is not the one that slower threads still multiply.
  __device__ void product(const ProductTerm& one, const ProductTerm& two, int c0, int C) {
    tile.clear();
    const bool idle = is_idle(C - c0);
    ProductTerm term = one.K > 0 ? one : two;
    bool more = one.K > 0 && two.K > 0;
    if (term.K == 0) return;
    fetch(term, 0, c0, C);
    for (int k0 = 0;;) {
      keep(term);
      __syncthreads();
      const Element* const from = term.resident != nullptr ? term.resident + k0 * kLeft : left + turn * kStep * kLeft;
      k0 += kStep;
      const bool ends = k0 >= term.K && !more;
      if (k0 >= term.K && more) {
        term = two;
        more = false;
        k0 = 0;
      }
      if (!ends) fetch(term, k0, c0, C);
      if (!idle) tile.template add<kStep>(from, kLeft, right + turn * kStep * kRight, kRight);
      turn ^= 1;
      if (ends) return;
    }
  }

  // body(example, feature, sum) for the running thread's elements of columns c0..c0 + 127.
  template <class Body>
  __device__ void each(int c0, const Body& body) {
    INFL_UNROLL(8)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      INFL_UNROLL(8)
      for (int j = 0; j < Tile::kTileCols; ++j) body(Tile::row(i), c0 + Tile::col(j), tile.sum[i][j]);
    }
  }

  // φ' where there is one; zero for examples and features that the tile has not, whatever was summed for them.
  __device__ T scaled(const T* scale, int n, int c, int width, T value) const {
    if (n >= count || c >= width) return T(0);
    return scale != nullptr ? value * scale[(first + n) * width + c] : value;
  }

  __device__ void swap() {
    Element* const before = tangents;
    tangents = next;
    next = before;
  }

  // The tangents of all layers; the last one's into `outputs`.
  __device__ void push() {
    const T* const flat = p.v + v * p.P;
    for (int l = 0; l < p.depth; ++l) {
      const MlpLayer<T>& layer = p.layers[l];
      ProductTerm of_input, of_weight;
      if (l > 0) of_input = {tangents, nullptr, layer.weight, layer.in_stride, layer.out_stride, layer.inputs};
      if (layer.weight_at >= 0) {
        of_weight = {nullptr, layer.x + first * layer.inputs, flat + layer.weight_at, layer.in_stride, layer.out_stride, layer.inputs};
      }
      const T* const bias = layer.bias_at >= 0 ? flat + layer.bias_at : nullptr;
      const bool last = l + 1 == p.depth;
      const int width = layer.outputs, padded = round_up(width, kStep);
      for (int c0 = 0; c0 < width; c0 += kCols) {
        product(of_input, of_weight, c0, width);
        each(c0, [&](int n, int c, T sum) {
          if (c >= padded) return;
          const T value = scaled(layer.scale, n, c, width, bias != nullptr && c < width ? sum + bias[c] : sum);
          if (last) {
            outputs[n * stride + c] = value;
          } else {
            next[c * kLeft + n] = Tile::element(value);
          }
        });
      }
      // What a product with terms would wait for: a layer of which the bias alone is trained, below all others, has none.
      if (l == 0) __syncthreads();
      swap();
    }
    __syncthreads();
  }

  // Outputs ↔ memory, [V, N, C].
  __device__ void read_outputs() {
    const int C = p.layers[p.depth - 1].outputs;
    const T* const from = p.g + (v * p.N + first) * C;
    for (int at = thread(); at < count * C; at += kThreads) outputs[at / C * stride + at % C] = from[at];
    __syncthreads();
  }
  __device__ void write_outputs() {
    const int C = p.layers[p.depth - 1].outputs;
    T* const to = p.t_out + (v * p.N + first) * C;
    for (int at = thread(); at < count * C; at += kThreads) to[at] = outputs[at / C * stride + at % C];
  }

  // outputs <- H outputs.
  __device__ void multiply_hessian() {
    const OutputHessian<T>& h = p.hessian;
    const int C = p.layers[p.depth - 1].outputs, positions = static_cast<int>(h.positions);
    if (h.shape != HessianShape::softmax) {
      for (int at = thread(); at < count * C; at += kThreads) {
        const int64_t n = first + at / C;
        const T weight = h.scale * (h.weights != nullptr ? h.weights[n] : T(1));
        outputs[at / C * stride + at % C] *= h.shape == HessianShape::diagonal ? weight * h.state[n * C + at % C] : weight;
      }
      __syncthreads();
      return;
    }
    // p ∘ (x − p·x), the most probable class m left out of the sum: next to p_m ≈ 1 the others would lose their digits, and the product does not see
    // a constant added to x, so that x_m counts as zero.
    const int classes = C / positions, apart = h.classes_innermost ? 1 : positions, lane = thread() % kWarp;
    for (int line = thread() / kWarp; line < count * positions; line += kThreads / kWarp) {
      const int64_t n = first + line / positions;
      const int position = line % positions, at_first = h.classes_innermost ? position * classes : position;
      const T* const probability = h.state + n * C + at_first;
      T* const x = outputs + line / positions * stride + at_first;
      T top = -1;
      int m = 0;
      for (int k = lane; k < classes; k += kWarp) {
        if (probability[k * apart] > top) {
          top = probability[k * apart];
          m = k;
        }
      }
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, top, step);
        const int at = __shfl_xor_sync(0xffffffffu, m, step);
        if (other > top || (other == top && at < m)) {
          top = other;
          m = at;
        }
      }
      const T shift = x[m * apart];
      T dot = 0;
      for (int k = lane; k < classes; k += kWarp) dot += probability[k * apart] * (x[k * apart] - shift);
      dot = warp_sum(dot);
      __syncwarp();  // from here on no lane reads of x but what is its own
      const T weight = h.scale * (h.weights != nullptr ? h.weights[n * positions + position] : T(1));
      for (int k = lane; k < classes; k += kWarp) x[k * apart] = weight * (probability[k * apart] * ((x[k * apart] - shift) - dot));
    }
    __syncthreads();
  }

  // The cotangents of all layers from those in `outputs`, and the gradients: written, or added to what the tile before has left in `sums`.
  __device__ void pull(T* sums, bool add) {
    {
      const MlpLayer<T>& layer = p.layers[p.depth - 1];
      const int padded = round_up(layer.outputs, kStep);
      for (int at = thread(); at < kRows * padded; at += kThreads) {
        const int n = at / padded, c = at % padded;
        const bool inside = n < count && c < layer.outputs;
        const Element value = Tile::element(scaled(layer.scale, n, c, layer.outputs, inside ? outputs[n * stride + c] : T(0)));
        cotangents[n * stride + c] = value;
        tangents[c * kLeft + n] = value;
      }
    }
    for (int l = p.depth - 1; l >= 0; --l) {
      const MlpLayer<T>& layer = p.layers[l];
      __syncthreads();
      if (layer.bias_at >= 0) {
        for (int c = thread(); c < layer.outputs; c += kThreads) {
          T sum = 0;
          for (int n = 0; n < kRows; ++n) sum += decoded(cotangents[n * stride + c]);
          put(sums[layer.bias_at + c], sum, add);
        }
      }
      if (layer.weight_at >= 0) weight_gradient(layer, sums + layer.weight_at, add);
      if (l == 0) return;
      const T* const scale = p.layers[l - 1].scale;
      const ProductTerm of_output = {tangents, nullptr, layer.weight, layer.out_stride, layer.in_stride, layer.outputs};
      const int width = layer.inputs, padded = round_up(width, kStep);
      for (int c0 = 0; c0 < width; c0 += kCols) {
        product(of_output, {}, c0, width);
        each(c0, [&](int n, int c, T sum) {
          if (c >= padded) return;
          const Element value = Tile::element(scaled(scale, n, c, width, sum));
          cotangents[n * stride + c] = value;
          next[c * kLeft + n] = value;
        });
      }
      swap();
    }
  }

  __device__ static void put(T& to, T value, bool add) { to = add ? to + value : value; }

  // Rows are outputs, kRows at a time; the sum runs over the tile's examples.
  __device__ void weight_gradient(const MlpLayer<T>& layer, T* to, bool add) {
    const T* const x = layer.x + first * layer.inputs;
    for (int c0 = 0; c0 < layer.inputs; c0 += kCols) {
      for (int at = thread(); at < kRows * kCols; at += kThreads) {
        const int n = at / kCols, c = c0 + at % kCols;
        right[n * kRight + at % kCols] = Tile::element(n < count && c < layer.inputs ? x[int64_t{n} * layer.inputs + c] : T(0));
      }
      __syncthreads();
      const bool idle = is_idle(layer.inputs - c0);
      for (int o = 0; o < layer.outputs; o += kRows) {
        tile.clear();
        if (!idle) tile.template add<kRows>(cotangents + o, stride, right, kRight);
        each(c0, [&](int row, int c, T sum) {
          if (o + row < layer.outputs && c < layer.inputs) put(to[(o + row) * layer.out_stride + c * layer.in_stride], sum, add);
        });
      }
      __syncthreads();
    }
  }
};

// Run s of right-hand side v: block v · slices + s, which leaves its sums in row v · slices + s of `sums` [V · slices, P].
template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(Tile::kThreads) mlp_kernel(const Mlp<T> p, int width, int64_t slices, int64_t tiles, T* sums) {
  INFL_DYNAMIC_SHARED(unsigned char, memory);
  Worker<Tile> worker(p, memory, Layout<Tile>(width));
  worker.v = blockIdx.x / slices;
  const int64_t slice = blockIdx.x % slices, begin = slice * tiles / slices, end = (slice + 1) * tiles / slices;
  for (int64_t i = begin; i < end; ++i) {
    worker.first = i * Tile::kRows;
    worker.count = static_cast<int>(p.N - worker.first < Tile::kRows ? p.N - worker.first : Tile::kRows);
    if (p.v != nullptr) {
      worker.push();
    } else {
      worker.read_outputs();
    }
    if (p.t_out != nullptr) {
      worker.write_outputs();
    } else {
      if (p.v != nullptr) worker.multiply_hessian();
      worker.pull(sums + int64_t{blockIdx.x} * p.P, i > begin);
    }
    __syncthreads();
  }
}

// out[v, at] = Σ_s sums[v, s, at] for the parameters that the chain differentiates. A block takes 32 of one right-hand side; its warps take runs in
// turn and are added up in order.
constexpr int kWarps = 8;

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) sum_slices_kernel(const Mlp<T> p, int64_t slices, const T* sums) {
  __shared__ T partial[kWarps][kWarp];
  const int64_t blocks = (p.P + kWarp - 1) / kWarp, v = blockIdx.x / blocks, at = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bool differentiated = false;
  for (int l = 0; l < p.depth; ++l) {
    const MlpLayer<T>& layer = p.layers[l];
    const int64_t in_weight = at - layer.weight_at, in_bias = at - layer.bias_at;
    differentiated = differentiated || (layer.weight_at >= 0 && in_weight >= 0 && in_weight < int64_t{layer.inputs} * layer.outputs) ||
                     (layer.bias_at >= 0 && in_bias >= 0 && in_bias < layer.outputs);
  }
  differentiated = differentiated && at < p.P;
  T sum = 0;
  if (differentiated) {
    for (int64_t s = warp; s < slices; s += kWarps) sum += sums[(v * slices + s) * p.P + at];
  }
  partial[warp][threadIdx.x % kWarp] = sum;
  __syncthreads();
  if (warp > 0 || !differentiated) return;
  for (int k = 1; k < kWarps; ++k) sum += partial[k][threadIdx.x];
  p.out[v * p.P + at] = sum;
}

template <class Tile, class T>
void run(const Context& ctx, const Mlp<T>& p, int width, const MlpTiling& tiling, T* sums) {
  launch(ctx, "mlp", &mlp_kernel<Tile>, dim3(static_cast<unsigned>(p.V * tiling.slices)), dim3(Tile::kThreads), Layout<Tile>(width).bytes, p, width,
         tiling.slices, tiling.tiles, sums);
}

template <class T>
void mlp(const Context& ctx, const Mlp<T>& p) {
  if (p.V == 0 || p.N == 0) return;
  int width = 0;
  for (int l = 0; l < p.depth; ++l) width = std::max(width, p.layers[l].outputs);
  const MlpTiling tiling = mlp_tiling<T>(p.V, p.N, width);
  const bool in_slices = p.t_out == nullptr && tiling.slices > 1;
  Buffer<T> slices(ctx, in_slices ? p.V * tiling.slices * p.P : 0);
  T* const sums = in_slices ? slices.data() : p.out;
  if constexpr (sizeof(T) == sizeof(double)) {
    tiling.rows == 16 ? run<MmaTile<Float64, 16, kCols, 1, 4>>(ctx, p, width, tiling, sums)
                      : run<MmaTile<Float64, 8, kCols, 1, 4>>(ctx, p, width, tiling, sums);
  } else if (ctx.precision == Precision::tf32) {
    tiling.rows == 32 ? run<MmaTile<Tf32, 32, kCols, 2, 4>>(ctx, p, width, tiling, sums)
                      : run<MmaTile<Tf32, 16, kCols, 1, 4>>(ctx, p, width, tiling, sums);
  } else if (ctx.precision == Precision::bfloat16) {
    tiling.rows == 32 ? run<MmaTile<Bfloat16, 32, kCols, 2, 4>>(ctx, p, width, tiling, sums)
                      : run<MmaTile<Bfloat16, 16, kCols, 1, 4>>(ctx, p, width, tiling, sums);
  } else {
    tiling.rows == 32 ? run<RegisterTile<T, 32, kCols, 4, 4>>(ctx, p, width, tiling, sums)
                      : run<RegisterTile<T, 16, kCols, 4, 4>>(ctx, p, width, tiling, sums);
  }
  if (!in_slices) return;
  const int64_t blocks = p.V * ceil_div(p.P, kWarp);
  launch(ctx, "mlp", &sum_slices_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarp), 0, p, tiling.slices, slices.data());
}

INFL_REGISTER_CUDA(mlp_stub, mlp)

}  // namespace
}  // namespace cuda
}  // namespace infl
