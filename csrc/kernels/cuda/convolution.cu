// A product is one matrix product for each group and phase (convolution_geometry.h), [channels, inner · taps] by [inner · taps, positions of all
// images], whose right factor is never formed: the panel of a step in K is gathered from the input into shared memory, zeros where a tap is outside.
// Both terms run through the same registers, bias and scale are applied to them, so a product reads each term and the scale and writes its output
// once, and costs 2 · rows · inner · taps operations a position and term. A tile of 128 by 128 does 64 multiplications for every element that it
// loads, 64 by 64 half as many, and the tiles of one run of positions are neighbours in the grid, so that they find the input in the second-level
// cache.
//
// float32 in full multiplies in registers, all else on tensor cores (mma.h), eight warps a tile: what is gathered is rounded on its way to shared
// memory, once for the warps that share it. In 16 rows of K a thread gathers 8 elements of a tile of 128 by 128 while its warp issues 32 instructions
// of Tf32 or 16 of Bfloat16 and reads 48 or 24 words: at the rates of sm_80 Tf32 is bound by the tensor cores (512 cycles), Bfloat16 by
// them (256) and the instructions of the gathering about equally. Every tile leaves room for two blocks on a processor.
//
// Groups of at most four channels have nothing to gather for: a thread takes a position with all channels of the group, weights in shared memory, or
// (depthwise) in the caches, where up to four right-hand sides share what they share. 1 x 1 kernels of many channels are the vendor's products.
//
// Few channels in full precision. A row of K costs a warp about 12 instructions for every 32 elements that it gathers, whatever is made of them, and
// a tile of 32 by 128 about 50 for 32 positions, of which a layer of six channels (the first of LeNet, and the cotangent of its second) uses a fifth.
// Up to eight channels are therefore a thread's, with weights in shared memory: 8 multiplications, one load of x, two words of weights and the test
// of the edge, about 14 (counted, not measured); above, up to 16 rows are a tile of 16 by 128, about 30. So LeNet's first layer at 512 examples (28 x
// 28 positions, 25 taps) is 0.16 of 10^9 multiplications, a third of them by zeros, beside 9.6 MB written: bound by memory at the rates of sm_90, no
// longer by instructions. 64 channels of 3 x 3 on 32 x 32 (a ResNet's first stage) multiply 288 times for a byte that they read or write: bound by
// arithmetic.
//
// Packed weights are [group][inner channel][tap][row]: a step in K reads neighbouring rows.
#include "kernels/convolution.h"

#include "kernels/cuda/convolution_geometry.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/tile.h"
#include "kernels/movement.h"

namespace infl {
namespace cuda {
namespace {

// ---- Packing ---------------------------------------------------------------------------------------------------------------------------------

constexpr int kPackTile = 32, kPackRows = 8;

// out[b][j][i] = in[b][i][j], i < height, j < width, for `count` matrices in each of the kernels.
template <class T>
__global__ void transpose_kernel(int64_t count, int height, int width, const T* w, int64_t w_batch, T* packed, int64_t packed_batch) {
  __shared__ T tile[kPackTile][kPackTile + 1];
  const int down = (height + kPackTile - 1) / kPackTile, across = (width + kPackTile - 1) / kPackTile;
  const int64_t matrix = blockIdx.x / across / down, v = matrix / count, at = matrix % count * height * width;
  const int i0 = static_cast<int>(blockIdx.x / across % down) * kPackTile, j0 = static_cast<int>(blockIdx.x % across) * kPackTile;
  w += v * w_batch + at;
  packed += v * packed_batch + at;
  for (int k = threadIdx.y; k < kPackTile; k += kPackRows) {
    const int i = i0 + k, j = j0 + threadIdx.x;
    if (i < height && j < width) tile[k][threadIdx.x] = w[int64_t{i} * width + j];
  }
  __syncthreads();
  for (int k = threadIdx.y; k < kPackTile; k += kPackRows) {
    const int i = i0 + threadIdx.x, j = j0 + k;
    if (i < height && j < width) packed[int64_t{j} * height + i] = tile[threadIdx.x][k];
  }
}

// Downwards the rows of a group are transposed with what they are multiplied by; upwards the channels of each y with the taps.
template <class T>
void convolution_pack(const Context& ctx, const Convolution& c, bool up, int64_t num, const T* w, int64_t w_batch, T* packed) {
  const int64_t x_channels = c.x_channels / c.groups, taps = c.taps();
  const int64_t count = up ? c.y_channels : c.groups, height = up ? x_channels : c.y_channels / c.groups, width = up ? taps : x_channels * taps;
  if (num == 0) return;
  const int64_t blocks = num * count * ceil_div(height, kPackTile) * ceil_div(width, kPackTile);
  launch(ctx, "convolution_pack", &transpose_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kPackTile, kPackRows), 0, count,
         static_cast<int>(height), static_cast<int>(width), w, w_batch, packed, convolution_packed_size(c, up));
}

// ---- Products --------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Product {
  ConvolutionShape shape;
  int64_t V, images;     // images of each right-hand side
  int64_t scale_images;  // scale repeats after so many
  int num_terms = 0;
  ConvolutionTerm<T> terms[2];  // `prepared`: between images, also of those that are not
  const T* bias = nullptr;
  int64_t bias_batch = 0;
  const T* scale = nullptr;
  T* out = nullptr;
  bool accumulate = false, vectorised = false;
  int64_t row_tiles = 1, position_tiles = 1;

  Product(const ConvolutionShape& s, const ConvolutionProduct<T>& of)
      : shape(s), V(of.V), images(of.n), scale_images(of.scales_each ? of.V * of.n : of.n) {}

  int64_t blocks() const { return row_tiles * position_tiles * V * shape.groups * shape.phases(); }
};

// What a block computes; the first is what changes fastest.
struct Work {
  int64_t row_tile, v, group, position_tile;
  int phase;
};

template <class T>
__device__ Work work_of(const Product<T>& p, int64_t v_tiles) {
  int64_t b = blockIdx.x;
  Work work{};
  work.row_tile = b % p.row_tiles;
  b /= p.row_tiles;
  work.v = b % v_tiles;
  b /= v_tiles;
  work.group = b % p.shape.groups;
  b /= p.shape.groups;
  work.position_tile = b % p.position_tiles;
  work.phase = static_cast<int>(b / p.position_tiles);
  return work;
}

// Where an image of the output starts, and its scale.
struct Target {
  int64_t out, scale;
};

template <class T>
__device__ Target target_of(const Product<T>& p, int64_t v, int64_t image) {
  const int64_t at = v * p.images + image;
  return {at * p.shape.out_image, p.scale ? at % p.scale_images * p.shape.out_image : 0};
}

template <class T>
__device__ T finish(const Product<T>& p, const Target& target, int64_t at, const T* bias, T value) {
  if (p.accumulate) value += p.out[target.out + at];
  if (bias) value += *bias;
  if (p.scale) value *= p.scale[target.scale + at];
  return value;
}

template <class T>
__device__ const T* bias_of(const Product<T>& p, int64_t v, int64_t channel) {
  return p.bias ? p.bias + v * p.bias_batch + channel : nullptr;
}

// One step of K: for each of its rows where the input lies from a position, and where the weights.
struct Gather {
  int d, h, w, in, weights;  // weights < 0: no such row
};

// Rows of K of a step, and elements between rows of a panel.
template <class Tile>
constexpr int kStep = 16;
template <class T, int kRows, int kCols, int kTileRows, int kTileCols>
constexpr int kStep<RegisterTile<T, kRows, kCols, kTileRows, kTileCols>> = 8;

// A row of K as digits.
struct Counter {
  Place3 tap;
  int channel;
};

__device__ inline Counter counter_at(int k, int taps, const PhaseAxis* axes) { return {place_of(k % taps, axes[1].taps, axes[2].taps), k / taps}; }

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(Tile::kThreads, 2) product_kernel(const Product<T> p) {
  using Element = typename Tile::Element;
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kThreads = Tile::kThreads, kStep = cuda::kStep<Tile>;
  constexpr int kLeftPitch = kRows + Tile::kColumnPad, kRightPitch = kCols + Tile::kColumnPad;
  constexpr int kLeft = kStep * kRows / kThreads, kRight = kStep * kCols / kThreads;
  static_assert(kThreads % kRows == 0 && kThreads % kCols == 0 && kLeft > 0 && kRight > 0);
  alignas(16) __shared__ Element left[2][kStep][kLeftPitch];
  alignas(16) __shared__ Element right[2][kStep][kRightPitch];
  __shared__ Gather gather[2][kStep];
  __shared__ Counter counters[kStep], stride;
  __shared__ int64_t starts[2][kCols];
  __shared__ PhaseAxis axes[3];
  const ConvolutionShape& shape = p.shape;
  const Work work = work_of(p, p.V);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 3) axes[thread] = shape.axis(thread, work.phase);
  __syncthreads();
  const int count = outputs_of(axes);
  const int taps = axes[0].taps * axes[1].taps * axes[2].taps, K = shape.inner * taps;
  const int64_t first = work.position_tile * kCols, positions = p.images * count;
  if (first >= positions) return;
  const int row0 = static_cast<int>(work.row_tile) * kRows;
  const int height = shape.axes[1].in_size, width = shape.axes[2].in_size, depth = shape.axes[0].in_size;

  // The thread's column of the right panel: where the taps of its position start, in each term's input.
  const PhaseOutput output(first + thread % kCols, p.images, axes);
  const int d0 = output.inside ? output.start.d : -(1 << 30);  // no tap reaches from there
  const int h0 = output.start.h, w0 = output.start.w;
  for (int t = thread / kCols; t < 2; t += kThreads / kCols) {
    starts[t][thread % kCols] = work.v * p.terms[t].in_batch + output.image * p.terms[t].prepared + work.group * shape.inner * shape.in_plane +
                                (int64_t{output.inside ? d0 : 0} * height + h0) * width + w0;
  }

  // Threads below kStep count the rows of K, each its own in every step: (channel, tap) as digits, the step between them too.
  if (thread == 0 && taps > 0) stride = counter_at(kStep, taps, axes);
  const auto start_counting = [&] { counters[thread] = counter_at(thread, taps, axes); };
  const auto count_on = [&](Gather* to) {
    Counter at = counters[thread];
    Gather g{};
    g.d = at.tap.d * axes[0].shift;
    g.h = at.tap.h * axes[1].shift;
    g.w = at.tap.w * axes[2].shift;
    g.in = at.channel * shape.in_plane + (g.d * height + g.h) * width + g.w;
    const int k_d = axes[0].k_first + at.tap.d * axes[0].k_step, k_h = axes[1].k_first + at.tap.h * axes[1].k_step,
              k_w = axes[2].k_first + at.tap.w * axes[2].k_step;
    const int k = (k_d * shape.axes[1].kernel + k_h) * shape.axes[2].kernel + k_w;
    g.weights = at.channel < shape.inner ? (at.channel * shape.taps + k) * shape.rows : -1;
    to[thread] = g;
    at.tap.w += stride.tap.w;
    const bool carry_w = at.tap.w >= axes[2].taps;
    at.tap.w -= carry_w ? axes[2].taps : 0;
    at.tap.h += stride.tap.h + carry_w;
    const bool carry_h = at.tap.h >= axes[1].taps;
    at.tap.h -= carry_h ? axes[1].taps : 0;
    at.tap.d += stride.tap.d + carry_h;
    const bool carry_d = at.tap.d >= axes[0].taps;
    at.tap.d -= carry_d ? axes[0].taps : 0;
    at.channel += stride.channel + carry_d;
    counters[thread] = at;
  };

  const int steps = taps == 0 ? 0 : (K + kStep - 1) / kStep, total = steps * p.num_terms;
  T next_left[kLeft], next_right[kRight];
  const auto fetch = [&](int s) {
    const Gather* rows = gather[s & 1];
    const ConvolutionTerm<T>& term = p.terms[s >= steps ? 1 : 0];
    const T* in = term.in + starts[s >= steps ? 1 : 0][thread % kCols];
    const T* weights = term.packed + work.v * term.packed_batch + work.group * shape.inner * shape.taps * shape.rows;
    const int row = row0 + thread % kRows;
    INFL_UNROLL(8)
    for (int i = 0; i < kLeft; ++i) {
      const int from = rows[thread / kRows + i * (kThreads / kRows)].weights;
      next_left[i] = from >= 0 && row < shape.rows ? weights[from + row] : T(0);
    }
    INFL_UNROLL(8)
    for (int i = 0; i < kRight; ++i) {
      const Gather g = rows[thread / kCols + i * (kThreads / kCols)];
      const bool reads = g.weights >= 0 && static_cast<unsigned>(d0 + g.d) < static_cast<unsigned>(depth) &&
                         static_cast<unsigned>(h0 + g.h) < static_cast<unsigned>(height) &&
                         static_cast<unsigned>(w0 + g.w) < static_cast<unsigned>(width);
      next_right[i] = reads ? in[g.in] : T(0);
    }
  };
  const auto keep = [&](int s) {
    INFL_UNROLL(8)
    for (int i = 0; i < kLeft; ++i) left[s & 1][thread / kRows + i * (kThreads / kRows)][thread % kRows] = Tile::element(next_left[i]);
    INFL_UNROLL(8)
    for (int i = 0; i < kRight; ++i) right[s & 1][thread / kCols + i * (kThreads / kCols)][thread % kCols] = Tile::element(next_right[i]);
  };
  // Rows of K for step s, the terms one after the other.
  const auto plan = [&](int s) {
    if (thread >= kStep || s >= total) return;
    if (s == 0 || s == steps) start_counting();
    count_on(gather[s & 1]);
  };

  // While step s is multiplied, s + 1 is on its way from memory and the rows of s + 2 are counted.
  Tile tile;
  tile.clear();
  __syncthreads();
  plan(0);
  plan(1);
  __syncthreads();
  if (total > 0) {
    fetch(0);
    keep(0);
  }
  __syncthreads();
  for (int s = 0; s < total; ++s) {
    if (s + 1 < total) fetch(s + 1);
    plan(s + 2);
    tile.template add<kStep>(left[s & 1][0], kLeftPitch, right[s & 1][0], kRightPitch);
    if (s + 1 < total) keep(s + 1);
    __syncthreads();
  }

  const int64_t image0 = first / count;
  const int offset0 = static_cast<int>(first - image0 * count);
  constexpr int W = Tile::kWidth;
  INFL_UNROLL(8)
  for (int j = 0; j < Tile::kTileCols; ++j) {
    if (p.vectorised && j % W != 0) continue;
    if (first + Tile::col(j) >= positions) continue;
    const int offset = offset0 + Tile::col(j);
    const Target target = target_of(p, work.v, image0 + offset / count);
    const int pixel = pixel_of(shape, axes, place_of(offset % count, axes[1].outputs, axes[2].outputs));
    INFL_UNROLL(8)
    for (int i = 0; i < Tile::kTileRows; ++i) {
      const int row = row0 + Tile::row(i);
      if (row >= shape.rows) continue;
      const int64_t channel_out = work.group * shape.rows + row, at = channel_out * shape.out_plane + pixel;
      const T* bias = bias_of(p, work.v, channel_out);
      if (p.vectorised) {
        Vector<T, W> value;
        INFL_UNROLL(4)
        for (int k = 0; k < W; ++k) value.v[k] = finish(p, target, at + k, bias, tile.sum[i][j / W * W + k]);
        store<W>(p.out + target.out + at, value);
      } else {
        p.out[target.out + at] = finish(p, target, at, bias, tile.sum[i][j]);
      }
    }
  }
}

constexpr int kDirectThreads = 256;

// A thread a position of a group of one channel, for kSides right-hand sides.
template <class T, int kSides>
__global__ void __launch_bounds__(kDirectThreads, 2) direct_kernel(const Product<T> p) {
  __shared__ PhaseAxis axes[3];
  const ConvolutionShape& shape = p.shape;
  const Work work = work_of(p, (p.V + kSides - 1) / kSides);
  if (threadIdx.x < 3) axes[threadIdx.x] = shape.axis(static_cast<int>(threadIdx.x), work.phase);
  __syncthreads();
  const PhaseOutput output(work.position_tile * kDirectThreads + threadIdx.x, p.images, axes);
  if (!output.inside) return;
  const int64_t image = output.image, v0 = work.v * kSides;
  const int sides = p.V - v0 < kSides ? static_cast<int>(p.V - v0) : kSides;
  const int d0 = output.start.d, h0 = output.start.h, w0 = output.start.w;
  const int depth = shape.axes[0].in_size, height = shape.axes[1].in_size, width = shape.axes[2].in_size;
  T sum[kSides] = {};
  for (int t = 0; t < p.num_terms; ++t) {
    const ConvolutionTerm<T>& term = p.terms[t];
    const T* in = term.in + v0 * term.in_batch + image * term.prepared + work.group * shape.inner * shape.in_plane;
    const T* weights = term.packed + v0 * term.packed_batch + work.group * shape.inner * shape.taps;
    for (int c = 0; c < shape.inner; ++c) {
      for (int i = 0; i < axes[0].taps; ++i) {
        const int d = d0 + i * axes[0].shift;
        if (static_cast<unsigned>(d) >= static_cast<unsigned>(depth)) continue;
        for (int j = 0; j < axes[1].taps; ++j) {
          const int h = h0 + j * axes[1].shift;
          if (static_cast<unsigned>(h) >= static_cast<unsigned>(height)) continue;
          const int line = (c * depth + d) * height * width + h * width;
          const int k =
              ((axes[0].k_first + i * axes[0].k_step) * shape.axes[1].kernel + axes[1].k_first + j * axes[1].k_step) * shape.axes[2].kernel +
              axes[2].k_first;
          for (int l = 0; l < axes[2].taps; ++l) {
            const int w = w0 + l * axes[2].shift;
            if (static_cast<unsigned>(w) >= static_cast<unsigned>(width)) continue;
            const T* own = weights + c * shape.taps + k + l * axes[2].k_step;
            INFL_UNROLL(4)
            for (int b = 0; b < kSides; ++b) {
              if (b >= sides) continue;
              sum[b] += own[b * term.packed_batch] * in[b * term.in_batch + line + w];
            }
          }
        }
      }
    }
  }
  const int pixel = pixel_of(shape, axes, output.at);
  INFL_UNROLL(4)
  for (int b = 0; b < kSides; ++b) {
    if (b >= sides) continue;
    const Target target = target_of(p, v0 + b, image);
    const int64_t at = work.group * shape.out_plane + pixel;
    p.out[target.out + at] = finish(p, target, at, bias_of(p, v0 + b, work.group), sum[b]);
  }
}

constexpr int kFewRows = 8, kFewestRows = 4;
constexpr int64_t kSharedWeights = 16 << 10;  // bytes

// Of a run of as many input channels as fit.
template <class T>
int64_t few_rows_channels(const ConvolutionShape& s) {
  return std::min<int64_t>(s.inner, kSharedWeights / (int64_t{s.taps} * kFewRows * static_cast<int64_t>(sizeof(T))));
}

// A thread a position with all channels of the group, up to kRows, whose weights lie in shared memory, for `channels` of the input at a time.
template <class T, int kRows>
__global__ void __launch_bounds__(kDirectThreads, 2) few_rows_kernel(const Product<T> p, int channels) {
  INFL_DYNAMIC_SHARED(T, own);  // [channels][taps][kRows], zeros where the group has fewer rows
  __shared__ PhaseAxis axes[3];
  constexpr int W = kVectorWidth<T>;
  const ConvolutionShape& shape = p.shape;
  const Work work = work_of(p, p.V);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 3) axes[thread] = shape.axis(thread, work.phase);
  __syncthreads();
  const PhaseOutput output(work.position_tile * kDirectThreads + thread, p.images, axes);
  const bool inside = output.inside;
  const int64_t image = output.image;
  const int d0 = output.start.d, h0 = output.start.h, w0 = output.start.w;
  const int depth = shape.axes[0].in_size, height = shape.axes[1].in_size, width = shape.axes[2].in_size;
  T sum[kRows] = {};
  for (int t = 0; t < p.num_terms; ++t) {
    const ConvolutionTerm<T>& term = p.terms[t];
    const T* in = term.in + work.v * term.in_batch + image * term.prepared + work.group * shape.inner * shape.in_plane;
    const T* weights = term.packed + work.v * term.packed_batch + work.group * shape.inner * shape.taps * shape.rows;
    for (int first = 0; first < shape.inner; first += channels) {
      const int last = first + channels < shape.inner ? first + channels : shape.inner;
      __syncthreads();
      for (int i = thread; i < (last - first) * shape.taps * kRows; i += kDirectThreads) {
        const int k = first * shape.taps + i / kRows, row = i % kRows;
        own[i] = row < shape.rows ? weights[k * shape.rows + row] : T(0);
      }
      __syncthreads();
      if (!inside) continue;
      for (int c = first; c < last; ++c) {
        for (int i = 0; i < axes[0].taps; ++i) {
          const int d = d0 + i * axes[0].shift;
          if (static_cast<unsigned>(d) >= static_cast<unsigned>(depth)) continue;
          for (int j = 0; j < axes[1].taps; ++j) {
            const int h = h0 + j * axes[1].shift;
            if (static_cast<unsigned>(h) >= static_cast<unsigned>(height)) continue;
            const T* line = in + int64_t{c} * shape.in_plane + (d * height + h) * width;
            const int k =
                ((axes[0].k_first + i * axes[0].k_step) * shape.axes[1].kernel + axes[1].k_first + j * axes[1].k_step) * shape.axes[2].kernel +
                axes[2].k_first;
            const T* tap = own + ((c - first) * shape.taps + k) * kRows;
            for (int l = 0; l < axes[2].taps; ++l, tap += axes[2].k_step * kRows) {
              const int w = w0 + l * axes[2].shift;
              const T x = static_cast<unsigned>(w) < static_cast<unsigned>(width) ? line[w] : T(0);
              INFL_UNROLL(8)
              for (int r = 0; r < kRows; r += W) {
                const auto weight = load<W>(tap + r);
                INFL_UNROLL(4)
                for (int e = 0; e < W; ++e) sum[r + e] += weight.v[e] * x;
              }
            }
          }
        }
      }
    }
  }
  if (!inside) return;
  const int pixel = pixel_of(shape, axes, output.at);
  const Target target = target_of(p, work.v, image);
  INFL_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    if (r >= shape.rows) continue;
    const int64_t channel = work.group * shape.rows + r, at = channel * shape.out_plane + pixel;
    p.out[target.out + at] = finish(p, target, at, bias_of(p, work.v, channel), sum[r]);
  }
}

template <class Tile, class T>
bool fills(Product<T>& p, int64_t least) {
  p.row_tiles = ceil_div(p.shape.rows, Tile::kRows);
  p.position_tiles = ceil_div(p.images * p.shape.outputs(), Tile::kCols);
  return p.blocks() >= least;
}

template <class Tile, class T>
void run(const Context& ctx, Product<T>& p) {
  fills<Tile>(p, 0);
  launch(ctx, "convolution_product", &product_kernel<Tile>, dim3(static_cast<unsigned>(p.blocks())), dim3(Tile::kThreads), 0, p);
}

template <class T, int kSides>
void run_direct(const Context& ctx, Product<T>& p) {
  p.row_tiles = 1;
  p.position_tiles = ceil_div(p.images * p.shape.outputs(), kDirectThreads);
  const int64_t blocks = p.blocks() / p.V * ceil_div(p.V, kSides);
  launch(ctx, "convolution_product", &direct_kernel<T, kSides>, dim3(static_cast<unsigned>(blocks)), dim3(kDirectThreads), 0, p);
}

template <class T, int kRows>
void run_few_rows(const Context& ctx, Product<T>& p) {
  const int64_t channels = few_rows_channels<T>(p.shape), bytes = channels * p.shape.taps * kRows * static_cast<int64_t>(sizeof(T));
  p.row_tiles = 1;
  p.position_tiles = ceil_div(p.images * p.shape.outputs(), kDirectThreads);
  launch(ctx, "convolution_product", &few_rows_kernel<T, kRows>, dim3(static_cast<unsigned>(p.blocks())), dim3(kDirectThreads), bytes, p,
         static_cast<int>(channels));
}

// The largest of three tiles that leaves no processor without a block; `Low` for few rows.
template <class Low, class Large, class Middle, class Small>
void run_largest(const Context& ctx, Product<float>& p) {
  constexpr int64_t kProcessors = 132;
  if (p.shape.rows <= Low::kRows) return run<Low>(ctx, p);
  if (p.shape.rows > Middle::kRows && fills<Large>(p, kProcessors)) return run<Large>(ctx, p);
  if (fills<Middle>(p, kProcessors)) return run<Middle>(ctx, p);
  run<Small>(ctx, p);
}

template <class Kind>
void run_on_tensor_cores(const Context& ctx, Product<float>& p) {
  run_largest<MmaTile<Kind, 32, 128, 2, 4>, MmaTile<Kind, 128, 128, 2, 4>, MmaTile<Kind, 64, 128, 2, 4>, MmaTile<Kind, 64, 64, 2, 4>>(ctx, p);
}

void run_tiled(const Context& ctx, Product<float>& p) {
  if (ctx.precision == Precision::tf32) return run_on_tensor_cores<Tf32>(ctx, p);
  if (ctx.precision == Precision::bfloat16) return run_on_tensor_cores<Bfloat16>(ctx, p);
  using Lowest = RegisterTile<float, 16, 128, 4, 4>;
  if (p.shape.rows <= Lowest::kRows) return run<Lowest>(ctx, p);
  run_largest<RegisterTile<float, 32, 128, 4, 4>, RegisterTile<float, 128, 128, 8, 8>, RegisterTile<float, 64, 128, 4, 8>,
              RegisterTile<float, 64, 64, 4, 4>>(ctx, p);
}

void run_tiled(const Context& ctx, Product<double>& p) {
  if (p.shape.rows <= 32) return run<MmaTile<Float64, 32, 64, 2, 4>>(ctx, p);
  run<MmaTile<Float64, 64, 64, 2, 4>>(ctx, p);
}

// out = (out + bias) ∘ scale
template <class T>
struct Finish {
  Product<T> p;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t at = i % p.shape.out_image, image = i / p.shape.out_image % p.images, v = i / p.shape.out_image / p.images;
    Vector<T, W> value;
    const Target target = target_of(p, v, image);
    for (int k = 0; k < W; ++k) value.v[k] = finish(p, target, at + k, bias_of(p, v, (at + k) / p.shape.out_plane), T(0));
    store<W>(p.out + i, value);
  }
};

// A kernel of one tap that moves nothing is a product of matrices [rows, inner] and [inner, plane] for each image. All right-hand sides are one batch
// where they share the weights, else a call each, which is to be worth its launch (3 µs at 10^13 operations a second).
template <class T>
bool multiplies(const Product<T>& p) {
  constexpr int kChannels = 64;  // fewer do not pay for a second pass over the output
  constexpr int64_t kOperations = 30'000'000;
  const ConvolutionShape& s = p.shape;
  if (p.V > 1 && 2 * s.rows * s.inner * (p.images * s.out_plane) < kOperations) return false;
  bool in_place = s.taps == 1 && s.groups == 1 && s.rows >= kChannels && s.inner >= kChannels;
  for (const ConvolutionAxis& axis : s.axes) in_place = in_place && axis.stride == 1 && axis.padding == 0 && axis.in_size == axis.out_size;
  return in_place;
}

template <class T>
void multiply(const Context& ctx, Product<T>& p) {
  const ConvolutionShape& s = p.shape;
  for (int t = 0; t < p.num_terms; ++t) {
    MatrixProduct<T> m{.batch = p.images, .M = s.rows, .N = s.out_plane, .K = s.inner, .a_transposed = true, .accumulate = p.accumulate || t > 0};
    m.lda = s.rows;
    m.ldb = m.ldc = s.out_plane;
    m.b_batch = p.terms[t].prepared;
    m.c_batch = s.out_image;
    for (int64_t v = 0; v < p.V; ++v) {
      m.a = p.terms[t].packed + v * p.terms[t].packed_batch;
      m.b = p.terms[t].in + v * p.terms[t].in_batch;
      m.c = p.out + v * p.images * s.out_image;
      ctx.runtime->multiply(m, ctx.precision, ctx.stream);
    }
  }
  if (p.bias == nullptr && p.scale == nullptr) return;
  p.accumulate = true;
  const bool vectorised = s.out_image % kVectorWidth<T> == 0 && is_aligned({p.out});
  for_each<T>(ctx, "convolution_product", p.V * p.images * s.out_image, vectorised, Finish<T>{p});
}

template <class T>
void convolution_product(const Context& ctx, const Convolution& conv, const ConvolutionProduct<T>& given) {
  if (given.V == 0 || given.n == 0) return;
  Product<T> p(ConvolutionShape(conv, given.up), given);
  bool as_images = given.bias == nullptr || given.bias_batch == 0;  // right-hand sides that share the weights are images
  for (const ConvolutionTerm<T>& term : given.terms) {
    if (term.in == nullptr) continue;
    as_images = as_images && term.packed_batch == 0 && term.in_batch == given.n * p.shape.in_image;
    p.terms[p.num_terms] = term;
    if (term.prepared == 0) p.terms[p.num_terms].prepared = p.shape.in_image;
    ++p.num_terms;
  }
  if (as_images && given.V > 1) {
    p.images *= given.V;
    p.V = 1;
  }
  p.bias = given.bias;
  p.bias_batch = given.bias_batch;
  p.scale = given.scale;
  p.out = given.out;
  p.accumulate = given.accumulate;
  const ConvolutionShape& s = p.shape;
  p.vectorised = s.phases() == 1 && s.out_plane % kVectorWidth<T> == 0 && is_aligned({p.out});
  for (const ConvolutionAxis& axis : s.axes) p.vectorised = p.vectorised && (!s.up || axis.stride == 1);
  if (p.num_terms > 0 && multiplies(p)) return multiply(ctx, p);
  if (s.rows == 1) return p.V == 1 ? run_direct<T, 1>(ctx, p) : run_direct<T, 4>(ctx, p);
  if (few_rows_channels<T>(s) > 0) {
    if (s.rows <= kFewestRows) return run_few_rows<T, kFewestRows>(ctx, p);
    if (s.rows <= kFewRows && (std::is_same_v<T, double> || ctx.precision == Precision::full)) return run_few_rows<T, kFewRows>(ctx, p);
  }
  run_tiled(ctx, p);
}

template <class T>
void convolution_prepare(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t size, T* prepared) {
  const int64_t image = conv.x_channels * conv.x_plane();
  copy_rows_stub<T>(ctx, n, image, x, image, prepared, size, false);
}

INFL_REGISTER_CUDA(convolution_prepare_stub, convolution_prepare)
INFL_REGISTER_CUDA(convolution_pack_stub, convolution_pack)
INFL_REGISTER_CUDA(convolution_product_stub, convolution_product)

}  // namespace
}  // namespace cuda
}  // namespace infl
