// The gradient by the kernel is one matrix product for each group, [channels of y, positions] by [positions, channels of x · taps] with the positions
// of all images as the axis that is summed; the right factor is gathered from x as convolution.cu does. Where x is shared by the right-hand sides
// their rows are those of one product, so x is read and gathered once for all of them. It costs 2 · V · positions · weights operations, in registers
// (float32 in full) or on tensor cores (mma.h), where both panels lie as they are read, positions fastest.
//
// Few weights and many positions would leave most of the GPU idle: the positions are split into parts, summed to [parts, ...] and then in the order
// of the parts. A group of few weights (depthwise: its taps) is the sum of a block over positions, eight weights at a time.
//
// So are, in full precision, groups of five to eight rows, unless right-hand sides that share x fill a tile: a block sums eight rows by eight
// columns, about 104 instructions for 32 positions, 64 of them multiplications, where a tile of 128 by 32 takes 5400 and uses a twentieth of them for
// one right-hand side of six rows by 25 columns (LeNet's first layer: 4 blocks, 416). Up to 16 rows have a tile of 16 by 128. Counted, not measured.
#include "kernels/convolution_weights.h"

#include "kernels/cuda/convolution_geometry.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/tile.h"

namespace infl {
namespace cuda {
namespace {

constexpr int64_t kWantedBlocks = 2 * 132;            // two for each processor of the largest GPU
constexpr int64_t kMostPositions = int64_t{1} << 15;  // of a part: bounds the rounding error of its sum
constexpr int kStep = 16;                             // positions of a step: whole sectors of y

template <class T>
struct Weights {
  ConvolutionShape shape;
  int64_t sides;        // right-hand sides whose rows are one product
  int64_t outer_sides;  // and those that are not
  const T *x, *y;
  int64_t x_batch, y_batch, x_image;
  int64_t images, blocks_of_images;
  T* out;
  int64_t out_batch, out_example, out_part;  // out_part 0: added to what is there
  int64_t parts, positions_of_part;
  int64_t row_tiles, col_tiles;
};

// What a block of threads sums; the first is what changes fastest.
struct Work {
  int64_t row_tile, col_tile, part, group, example, v;
};

template <class T>
__device__ Work work_of(const Weights<T>& p) {
  int64_t b = blockIdx.x;
  Work w{};
  const auto next = [&b](int64_t count) {
    const int64_t at = b % count;
    b /= count;
    return at;
  };
  w.row_tile = next(p.row_tiles);
  w.col_tile = next(p.col_tiles);
  w.part = next(p.parts);
  w.group = next(p.shape.groups);
  w.example = next(p.blocks_of_images);
  w.v = b;
  return w;
}

template <class T>
__device__ void put(const Weights<T>& p, const Work& work, int64_t v, int64_t weight, T value) {
  T& to = p.out[work.part * p.out_part + v * p.out_batch + work.example * p.out_example + weight];
  to = p.out_part ? value : to + value;
}

// Where a position's taps start, and its image and place in y.
struct Start {
  int64_t image;
  int pixel, d, h, w;
};

__device__ inline Start start_of(const ConvolutionShape& s, int64_t position) {
  Start start{};
  start.image = position / s.out_plane;
  start.pixel = static_cast<int>(position - start.image * s.out_plane);
  const Place3 q = place_of(start.pixel, s.axes[1].out_size, s.axes[2].out_size);
  start.d = q.d * s.axes[0].stride - s.axes[0].padding;
  start.h = q.h * s.axes[1].stride - s.axes[1].padding;
  start.w = q.w * s.axes[2].stride - s.axes[2].padding;
  return start;
}

// A pair (channel, tap): where it reads from a position's start.
struct Column {
  int d, h, w, offset;
};

__device__ inline Column column_of(const ConvolutionShape& s, int col) {
  const int channel = col / s.taps;
  const Place3 tap = place_of(col % s.taps, s.axes[1].kernel, s.axes[2].kernel);
  Column c{tap.d * s.axes[0].dilation, tap.h * s.axes[1].dilation, tap.w * s.axes[2].dilation, 0};
  c.offset = channel * s.in_plane + (c.d * s.axes[1].in_size + c.h) * s.axes[2].in_size + c.w;
  return c;
}

__device__ inline bool is_inside(const ConvolutionShape& s, const Start& start, const Column& c) {
  return static_cast<unsigned>(start.d + c.d) < static_cast<unsigned>(s.axes[0].in_size) &&
         static_cast<unsigned>(start.h + c.h) < static_cast<unsigned>(s.axes[1].in_size) &&
         static_cast<unsigned>(start.w + c.w) < static_cast<unsigned>(s.axes[2].in_size);
}

__device__ inline int64_t offset_of(const ConvolutionShape& s, const Start& start) {
  return (int64_t{start.d} * s.axes[1].in_size + start.h) * s.axes[2].in_size + start.w;
}

// Panels of a step in shared memory: [positions][rows or columns] for the registers' tile, [rows or columns][positions] for that of tensor cores.
template <class Tile, int kRows>
struct Panel {
  static constexpr int kPitch = kStep + Tile::kRowPad;
  alignas(16) typename Tile::Element of[kRows * kPitch];
  __device__ void put(int k, int row, typename Tile::Value value) { of[row * kPitch + k] = Tile::element(value); }
};

template <class T, int kTileRows_, int kTileCols_, int kOfThreadDown, int kOfThreadAcross, int kRows>
struct Panel<RegisterTile<T, kTileRows_, kTileCols_, kOfThreadDown, kOfThreadAcross>, kRows> {
  static constexpr int kPitch = kRows + kVectorWidth<T>;
  alignas(16) T of[kStep * kPitch];
  __device__ void put(int k, int row, T value) { of[k * kPitch + row] = value; }
};

template <class Tile, class Left, class Right>
__device__ void add_step(Tile& tile, const Left& left, const Right& right) {
  tile.template add_rows<kStep>(left.of, Left::kPitch, right.of, Right::kPitch);
}
template <class T, int kRows, int kCols, int kTileRows, int kTileCols, class Left, class Right>
__device__ void add_step(RegisterTile<T, kRows, kCols, kTileRows, kTileCols>& tile, const Left& left, const Right& right) {
  tile.template add<kStep>(left.of, Left::kPitch, right.of, Right::kPitch);
}

template <class Tile, class T = typename Tile::Value>
__global__ void __launch_bounds__(Tile::kThreads, 2) weights_kernel(const Weights<T> p) {
  constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kThreads = Tile::kThreads;
  using Left = Panel<Tile, kRows>;
  using Right = Panel<Tile, kCols>;
  constexpr int kLines = kThreads / kStep;  // a thread takes one position of a step and every kLines-th row and column
  constexpr int kLeft = kRows / kLines, kRight = kCols / kLines;
  static_assert(kRows % kLines == 0 && kCols % kLines == 0);
  __shared__ Left left[2];
  __shared__ Right right[2];
  __shared__ int64_t row_offset[kRows];
  __shared__ Column columns[kCols];
  const ConvolutionShape& shape = p.shape;
  const Work work = work_of(p);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t rows = p.sides * shape.rows, row0 = work.row_tile * kRows;
  const int cols = shape.inner * shape.taps, col0 = static_cast<int>(work.col_tile) * kCols;
  for (int i = thread; i < kRows; i += kThreads) {
    const int64_t row = row0 + i;
    row_offset[i] = row < rows ? row / shape.rows * p.y_batch + (work.group * shape.rows + row % shape.rows) * shape.out_plane : -1;
  }
  for (int i = thread; i < kCols; i += kThreads) {
    columns[i] = col0 + i < cols ? column_of(shape, col0 + i) : Column{-(1 << 30), 0, 0, 0};
  }
  __syncthreads();
  const int64_t begin = work.part * p.positions_of_part, all = p.images * shape.out_plane;
  const int64_t end = begin + p.positions_of_part < all ? begin + p.positions_of_part : all;
  const T* x = p.x + work.v * p.x_batch + work.group * shape.inner * shape.in_plane;
  const T* y = p.y + work.v * p.y_batch;
  const int lane = thread % kStep, line = thread / kStep;

  T next_left[kLeft], next_right[kRight];
  const auto fetch = [&](int64_t from) {
    const bool reads = from + lane < end;
    const Start start = start_of(shape, reads ? from + lane : begin);
    const int64_t image = work.example * p.images + start.image;
    const T* y_at = y + image * shape.out_image + start.pixel;
    const T* x_at = x + image * p.x_image + offset_of(shape, start);
    INFL_UNROLL(8)
    for (int i = 0; i < kLeft; ++i) {
      const int64_t offset = row_offset[line + i * kLines];
      next_left[i] = reads && offset >= 0 ? y_at[offset] : T(0);
    }
    INFL_UNROLL(8)
    for (int i = 0; i < kRight; ++i) {
      const Column c = columns[line + i * kLines];
      next_right[i] = reads && is_inside(shape, start, c) ? x_at[c.offset] : T(0);
    }
  };
  const auto keep = [&](int half) {
    INFL_UNROLL(8)
    for (int i = 0; i < kLeft; ++i) left[half].put(lane, line + i * kLines, next_left[i]);
    INFL_UNROLL(8)
    for (int i = 0; i < kRight; ++i) right[half].put(lane, line + i * kLines, next_right[i]);
  };

  Tile tile;
  tile.clear();
  fetch(begin);
  keep(0);
  __syncthreads();
  int half = 0;
  for (int64_t from = begin; from < end; from += kStep) {
    const bool more = from + kStep < end;
    if (more) fetch(from + kStep);
    add_step(tile, left[half], right[half]);
    if (more) keep(1 - half);
    half = 1 - half;
    __syncthreads();
  }
  INFL_UNROLL(8)
  for (int i = 0; i < Tile::kTileRows; ++i) {
    const int64_t row = row0 + Tile::row(i);
    if (row >= rows) continue;
    const int64_t v = work.v + row / shape.rows, first = (work.group * shape.rows + row % shape.rows) * cols;
    INFL_UNROLL(8)
    for (int j = 0; j < Tile::kTileCols; ++j) {
      const int col = col0 + Tile::col(j);
      if (col < cols) put(p, work, v, first + col, tile.sum[i][j]);
    }
  }
}

constexpr int64_t kRowsOfFew = 64;  // of all right-hand sides: more fill a tile
constexpr int kDirectThreads = 128, kDirectCols = 8, kDirectRows = 4, kFewRows = 8;

// A block sums kRows rows by kDirectCols columns of a group over the positions of its part.
template <class T, int kRows>
__global__ void __launch_bounds__(kDirectThreads) direct_kernel(const Weights<T> p) {
  __shared__ T partial[kDirectThreads / kWarp][kRows * kDirectCols];
  const ConvolutionShape& shape = p.shape;
  const Work work = work_of(p);
  const int cols = shape.inner * shape.taps, col0 = static_cast<int>(work.col_tile) * kDirectCols;
  Column columns[kDirectCols];
  INFL_UNROLL(8)
  for (int j = 0; j < kDirectCols; ++j) columns[j] = col0 + j < cols ? column_of(shape, col0 + j) : Column{-(1 << 30), 0, 0, 0};
  const int64_t begin = work.part * p.positions_of_part, all = p.images * shape.out_plane;
  const int64_t end = begin + p.positions_of_part < all ? begin + p.positions_of_part : all;
  const T* x = p.x + work.v * p.x_batch + work.group * shape.inner * shape.in_plane;
  const T* y = p.y + work.v * p.y_batch + work.group * shape.rows * shape.out_plane;
  T sum[kRows][kDirectCols] = {};
  for (int64_t position = begin + threadIdx.x; position < end; position += kDirectThreads) {
    const Start start = start_of(shape, position);
    const int64_t image = work.example * p.images + start.image;
    const T* y_at = y + image * shape.out_image + start.pixel;
    const T* x_at = x + image * p.x_image + offset_of(shape, start);
    T row[kRows];
    INFL_UNROLL(8)
    for (int i = 0; i < kRows; ++i) row[i] = i < shape.rows ? y_at[int64_t{i} * shape.out_plane] : T(0);
    INFL_UNROLL(8)
    for (int j = 0; j < kDirectCols; ++j) {
      if (!is_inside(shape, start, columns[j])) continue;
      const T value = x_at[columns[j].offset];
      INFL_UNROLL(8)
      for (int i = 0; i < kRows; ++i) sum[i][j] += row[i] * value;
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  INFL_UNROLL(8)
  for (int i = 0; i < kRows; ++i) {
    INFL_UNROLL(8)
    for (int j = 0; j < kDirectCols; ++j) {
      const T total = warp_sum(sum[i][j]);
      if (threadIdx.x % kWarp == 0) partial[warp][i * kDirectCols + j] = total;
    }
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x) / kDirectCols, j = static_cast<int>(threadIdx.x) % kDirectCols;
  if (i >= kRows || i >= shape.rows || col0 + j >= cols) return;
  T total = partial[0][threadIdx.x];
  for (int k = 1; k < kDirectThreads / kWarp; ++k) total += partial[k][threadIdx.x];
  put(p, work, work.v, (work.group * shape.rows + i) * cols + col0 + j, total);
}

// out[v, block of images, i] += Σ_parts in their order
template <class T>
struct AddParts {
  int64_t size, blocks_of_images, parts, part;
  const T* sums;
  T* out;
  int64_t out_batch, out_example;
  template <int W>
  __device__ void run(int64_t i) const {
    static_assert(W == 1);
    T sum = sums[i];
    for (int64_t k = 1; k < parts; ++k) sum += sums[k * part + i];
    out[i / size / blocks_of_images * out_batch + i / size % blocks_of_images * out_example + i % size] += sum;
  }
};

template <class Tile, class T>
void run(const Context& ctx, const Weights<T>& p, unsigned blocks) {
  launch(ctx, "convolution_weights", &weights_kernel<Tile>, dim3(blocks), dim3(Tile::kThreads), 0, p);
}

// A kernel and the part of the table of weights that a block of it sums.
template <class T>
struct Choice {
  void (*run)(const Context&, const Weights<T>&, unsigned);
  int64_t rows, cols;
};

template <class Tile, class T = typename Tile::Value>
Choice<T> tiles_of() {
  return {&run<Tile, T>, Tile::kRows, Tile::kCols};
}

template <class Low, class Narrow, class Large, class Small>
Choice<float> choose_of(int64_t rows, int64_t cols) {
  if (cols <= Narrow::kCols) return tiles_of<Narrow>();
  if (rows <= Low::kRows) return tiles_of<Low>();
  if (rows > Small::kRows && cols > Small::kCols) return tiles_of<Large>();
  return tiles_of<Small>();
}

template <class Kind>
Choice<float> choose_on_tensor_cores(int64_t rows, int64_t cols) {
  return choose_of<MmaTile<Kind, 32, 128, 2, 4>, MmaTile<Kind, 128, 32, 4, 2>, MmaTile<Kind, 128, 128, 2, 4>, MmaTile<Kind, 64, 64, 2, 4>>(rows,
                                                                                                                                           cols);
}

Choice<float> choose(const Context& ctx, const Weights<float>&, int64_t rows, int64_t cols) {
  if (ctx.precision == Precision::tf32) return choose_on_tensor_cores<Tf32>(rows, cols);
  if (ctx.precision == Precision::bfloat16) return choose_on_tensor_cores<Bfloat16>(rows, cols);
  using Lowest = RegisterTile<float, 16, 128, 4, 4>;
  if (rows <= Lowest::kRows) return tiles_of<Lowest>();
  return choose_of<RegisterTile<float, 32, 128, 4, 4>, RegisterTile<float, 128, 32, 4, 4>, RegisterTile<float, 128, 128, 8, 8>,
                   RegisterTile<float, 64, 64, 4, 4>>(rows, cols);
}

Choice<double> choose(const Context&, const Weights<double>&, int64_t rows, int64_t cols) {
  if (cols <= 32) return tiles_of<MmaTile<Float64, 64, 32, 4, 2>>();
  if (rows <= 32) return tiles_of<MmaTile<Float64, 32, 64, 2, 4>>();
  return tiles_of<MmaTile<Float64, 64, 64, 2, 4>>();
}

template <class T, int kRows>
void run_direct(const Context& ctx, const Weights<T>& p, unsigned blocks) {
  launch(ctx, "convolution_weights", &direct_kernel<T, kRows>, dim3(blocks), dim3(kDirectThreads), 0, p);
}

// Whether products are in the data type itself.
template <class T>
bool is_full(const Context& ctx) {
  return std::is_same_v<T, double> || ctx.precision == Precision::full;
}

template <class T>
void convolution_weights(const Context& ctx, const Convolution& conv, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
                         int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example) {
  if (V == 0 || n == 0) return;
  Weights<T> p{ConvolutionShape(conv, false), 1, V, x, y, x_batch, y_batch, 0, images, n / images, out, out_batch, out_example, 0, 1, 0, 1, 1};
  p.x_image = prepared ? prepared : p.shape.in_image;
  const int64_t cols = int64_t{p.shape.inner} * p.shape.taps;
  Choice<T> choice;
  if (p.shape.rows <= kDirectRows) {
    choice = p.shape.rows == 1 ? Choice<T>{&run_direct<T, 1>, 1, kDirectCols} : Choice<T>{&run_direct<T, kDirectRows>, kDirectRows, kDirectCols};
  } else if (p.shape.rows <= kFewRows && is_full<T>(ctx) && (x_batch != 0 || V * p.shape.rows <= kRowsOfFew)) {
    choice = {&run_direct<T, kFewRows>, kFewRows, kDirectCols};
  } else {
    if (x_batch == 0) std::swap(p.sides, p.outer_sides);
    choice = choose(ctx, p, p.sides * p.shape.rows, cols);
  }
  p.row_tiles = ceil_div(p.sides * p.shape.rows, choice.rows);
  p.col_tiles = ceil_div(cols, choice.cols);
  const int64_t positions = images * p.shape.out_plane;
  const int64_t blocks = p.row_tiles * p.col_tiles * p.shape.groups * p.blocks_of_images * p.outer_sides;
  constexpr int64_t kLeastPositions = 256;  // of a part: as much work as adding it up
  const int64_t wanted = std::min(ceil_div(kWantedBlocks, blocks), ceil_div(positions, kLeastPositions));
  p.parts = std::max(wanted, ceil_div(positions, kMostPositions));
  p.positions_of_part = ceil_div(ceil_div(positions, p.parts), kStep) * kStep;
  p.parts = ceil_div(positions, p.positions_of_part);
  const int64_t size = conv.weight_size(), part = V * p.blocks_of_images * size;
  Buffer<T> sums;
  if (p.parts > 1) {
    sums.resize(ctx, p.parts * part);
    p.out = sums.data();
    p.out_batch = p.blocks_of_images * size;
    p.out_example = size;
    p.out_part = part;
  }
  choice.run(ctx, p, static_cast<unsigned>(blocks * p.parts));
  if (p.parts == 1) return;
  for_each_element(ctx, "convolution_weights", part, AddParts<T>{size, p.blocks_of_images, p.parts, part, sums.data(), out, out_batch, out_example});
}

// ---- Sums by channel -----------------------------------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 256;

// A block sums one channel of a run of images.
template <class T>
__global__ void __launch_bounds__(kSumThreads) channel_sum_kernel(int64_t n, int64_t channels, int64_t plane, const T* y, int64_t images,
                                                                  int64_t parts, T* out, int64_t out_batch, int64_t out_example, int64_t out_part) {
  __shared__ T partial[kSumThreads / kWarp];
  int64_t b = blockIdx.x;
  const int64_t part = b % parts;
  b /= parts;
  const int64_t c = b % channels;
  b /= channels;
  const int64_t example = b % (n / images), v = b / (n / images);
  const int64_t size = images * plane, length = (size + parts - 1) / parts, begin = part * length;
  const int64_t end = begin + length < size ? begin + length : size;
  const T* from = y + ((v * n + example * images) * channels + c) * plane;
  T sum = 0;
  const int64_t image_step = kSumThreads / plane, step = kSumThreads % plane;
  int64_t image = (begin + threadIdx.x) / plane, pixel = (begin + threadIdx.x) % plane;
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) {
    sum += from[image * channels * plane + pixel];
    image += image_step;
    pixel += step;
    if (pixel >= plane) {
      pixel -= plane;
      ++image;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int k = 1; k < kSumThreads / kWarp; ++k) sum += partial[k];
  T& to = out[part * out_part + v * out_batch + example * out_example + c];
  to = out_part ? sum : to + sum;
}

template <class T>
void channel_sum(const Context& ctx, int64_t V, int64_t n, int64_t channels, int64_t plane, const T* y, int64_t images, T* out, int64_t out_batch,
                 int64_t out_example) {
  if (V == 0 || n == 0 || channels == 0) return;
  const int64_t blocks_of_images = n / images, blocks = V * blocks_of_images * channels;
  constexpr int64_t kTermsOfThread = 16;
  const int64_t parts = std::min(ceil_div(kWantedBlocks, blocks), ceil_div(images * plane, kSumThreads * kTermsOfThread));
  const auto run = [&](T* to, int64_t batch, int64_t example, int64_t part) {
    launch(ctx, "channel_sum", &channel_sum_kernel<T>, dim3(static_cast<unsigned>(blocks * parts)), dim3(kSumThreads), 0, n, channels, plane, y,
           images, parts, to, batch, example, part);
  };
  if (parts == 1) return run(out, out_batch, out_example, 0);
  Buffer<T> sums(ctx, parts * blocks);
  run(sums.data(), blocks_of_images * channels, channels, blocks);
  for_each_element(ctx, "channel_sum", blocks, AddParts<T>{channels, blocks_of_images, parts, blocks, sums.data(), out, out_batch, out_example});
}

// ---- Columns -------------------------------------------------------------------------------------------------------------------------------------

template <class T>
struct Columns {
  ConvolutionShape shape;
  int64_t x_image;
  const T* x;
  T* columns;
  template <int W>
  __device__ void run(int64_t i) const {
    static_assert(W == 1);
    const int cols = shape.inner * shape.taps;
    const Start start = start_of(shape, i / cols);
    const Column c = column_of(shape, static_cast<int>(i % cols));
    columns[i] = is_inside(shape, start, c) ? x[start.image * x_image + offset_of(shape, start) + c.offset] : T(0);
  }
};

template <class T>
void convolution_columns(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t prepared, T* columns) {
  const ConvolutionShape shape(conv, false);
  for_each_element(ctx, "convolution_columns", n * shape.out_plane * shape.inner * shape.taps,
                   Columns<T>{shape, prepared ? prepared : shape.in_image, x, columns});
}

INFL_REGISTER_CUDA(convolution_weights_stub, convolution_weights)
INFL_REGISTER_CUDA(channel_sum_stub, channel_sum)
INFL_REGISTER_CUDA(convolution_columns_stub, convolution_columns)

}  // namespace
}  // namespace cuda
}  // namespace infl
