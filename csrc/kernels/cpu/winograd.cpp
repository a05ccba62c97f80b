// Winograd's F(4 × 4, 3 × 3): y = Aᵀ[(G w Gᵀ) ∘ (Bᵀ d B)]A for a tile d of 6 × 6 inputs, and its transposes.
//
// Channels are innermost, so that a vector is one element of a tile for several channels: transforms need no shuffles whatever the size of the
// images, and what remains between them is, for each of the 36 elements, an ordinary matrix product
//
//   product  M[tile, o]  = Σ_c D[tile, c] U[c, o]      D = Bᵀ d B, U = G w Gᵀ;  y = Aᵀ M A     (`up`: the kernel turned by 180°)
//   weights  dU[o, c]    = Σ_tile E[tile, o] D[tile, c]    E = A g Aᵀ;  dw = Gᵀ dU G
//
// over all tiles of a unit: several images, or a band of one. Images are turned on the way in and out, in squares of one vector's lanes. Both terms
// of a tangent are summed in the same registers, before one transform of the output.
#include "kernels/cpu/winograd.h"

#include "kernels/cpu/winograd_transforms.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int kRows = INFL_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int64_t kRun = 512;                     // terms summed in registers before they are added up
constexpr int64_t kUnitBytes = 448 << 10;         // transformed inputs and outputs of a unit: half of the second-level cache
constexpr int64_t kAccumulatorBytes = 256 << 10;  // transformed gradients of right-hand sides that are taken together

// ---- Products of the elements -------------------------------------------------------------------------------------------------------------

template <class T>
struct ElementTerm {
  const T* a;  // [rows, K] by strides, broadcast
  int64_t a_row, a_col;
  const T* b;  // [K, columns], rows b_row apart
  int64_t b_row;
  int64_t b_block;  // between blocks of columns
};

// c[R, NV vectors] (+)= Σ_t a_t b_t over K terms each.
template <class T, int R, int NV>
__attribute__((noinline)) void element_tile(int64_t K, const ElementTerm<T>* terms, int num_terms, T* c, int64_t c_row, bool add) {
  constexpr int G = (R + 2) / 3;  // row pointers, three rows each: base, +stride, +2 stride are all one addressing mode
  Vec<T> acc[R][NV];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<T>{};
  for (int t = 0; t < num_terms; ++t) {
    const int64_t a_row = terms[t].a_row, a_col = terms[t].a_col, b_row = terms[t].b_row;
    const T* b = terms[t].b;
    const int64_t second = kLanes<T> % kWinogradBlock == 0 ? terms[t].b_block : kLanes<T>;
    const T* rows[G];
    for (int g = 0; g < G; ++g) rows[g] = terms[t].a + 3 * g * a_row;
    for (int64_t k = 0; k < K; ++k) {
      Vec<T> bv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) bv[j] = load(b + j * second);
      b += b_row;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const T value = rows[r / 3][(r % 3) * a_row];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[r][j] += bv[j] * value;
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) rows[g] += a_col;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      T* out = c + r * c_row + j * kLanes<T>;
      store(out, add ? acc[r][j] + load(out) : acc[r][j]);
    }
  }
}

template <class T>
using ElementFn = void (*)(int64_t, const ElementTerm<T>*, int, T*, int64_t, bool);

template <class T, int NV>
ElementFn<T> element_tile_for(int64_t rows) {
  static constexpr ElementFn<T> table[13] = {
      nullptr,
      element_tile<T, 1, NV>,
      element_tile<T, 2, NV>,
      element_tile<T, 3, NV>,
      element_tile<T, 4, NV>,
      element_tile<T, 5, NV>,
      element_tile<T, 6, NV>,
#if INFL_VECTOR_BYTES == 64
      element_tile<T, 7, NV>,
      element_tile<T, 8, NV>,
      element_tile<T, 9, NV>,
      element_tile<T, 10, NV>,
      element_tile<T, 11, NV>,
      element_tile<T, 12, NV>,
#endif
  };
  return table[rows];
}

// c[rows, columns] (+)= Σ_t a_t b_t; columns a multiple of the block.
template <class T>
void element_product(int64_t rows, int64_t K, int64_t columns, const ElementTerm<T>* terms, int num_terms, T* c, int64_t c_row, bool accumulate) {
  const int64_t height = ceil_div(rows, ceil_div(rows, kRows));
  for (int64_t k = 0; k < K; k += kRun) {
    const int64_t run = std::min(kRun, K - k);
    for (int64_t column = 0; column < columns;) {
      const int vectors = column + 2 * kLanes<T> <= columns ? 2 : 1;
      for (int64_t r = 0; r < rows; r += height) {
        ElementTerm<T> here[2];
        for (int t = 0; t < num_terms; ++t) {
          here[t] = terms[t];
          here[t].a += r * terms[t].a_row + k * terms[t].a_col;
          here[t].b += column / kWinogradBlock * terms[t].b_block + column % kWinogradBlock + k * terms[t].b_row;
        }
        const int64_t count = std::min(height, rows - r);
        const ElementFn<T> fn = vectors == 2 ? element_tile_for<T, 2>(count) : element_tile_for<T, 1>(count);
        fn(run, here, num_terms, c + r * c_row + column, c_row, accumulate || k > 0);
      }
      column += vectors * kLanes<T>;
    }
  }
}

// ---- Units --------------------------------------------------------------------------------------------------------------------------------

// Tiles whose products are taken together: whole images, or a band of one; enough of them to read the weights seldom, few enough to stay in the
// cache.
struct Units {
  Units(int64_t images, int64_t num_tiles, const int64_t* tiles, int64_t wanted) : num_images(images), tile_rows(tiles[0]), tile_columns(tiles[1]) {
    if (num_tiles <= wanted) {
      per_unit = std::max<int64_t>(1, ceil_div(images, std::max<int64_t>(1, ceil_div(images, wanted / num_tiles))));
      rows = tile_rows;
    } else {
      const int64_t bands = ceil_div(tile_rows, std::max<int64_t>(1, wanted / tile_columns));
      rows = ceil_div(tile_rows, bands);
    }
    bands = ceil_div(tile_rows, rows);
  }

  int64_t count() const { return ceil_div(num_images, per_unit) * bands; }
  int64_t most_tiles() const { return per_unit * rows * tile_columns; }

  int64_t num_images, tile_rows, tile_columns;
  int64_t per_unit = 1, rows = 1, bands = 1;
};

struct Unit {
  Unit(const Units& units, int64_t index)
      : image(index / units.bands * units.per_unit),
        images(std::min(units.per_unit, units.num_images - image)),
        row(index % units.bands * units.rows),
        rows(std::min(units.rows, units.tile_rows - row)),
        tiles(images * rows * units.tile_columns) {}

  Lines lines(const Image& of) const { return {row * kOut, of.lines(rows)}; }

  int64_t image, images, row, rows, tiles;
};

int64_t tiles_wanted(int64_t element_bytes, int64_t blocks) { return std::max<int64_t>(kRows, kUnitBytes / (kElements * blocks * element_bytes)); }

// One image's tiles of a unit, transformed into `out`: from the image, turned by way of `buffer`, or from its prepared copy.
template <class T>
void transform_image(const Image& image, const Unit& unit, const T* in, bool prepared, bool cotangent, int64_t stride, T* buffer, T* out) {
  const Lines lines = unit.lines(image);
  if (prepared) {
    in += lines.begin * image.line() * image.blocks;
  } else {
    Turn<T>{image, lines}.in(in, buffer);
    in = buffer;
  }
  if (cotangent) {
    transform_cotangent<T>(image, unit.rows, in, stride, out);
  } else {
    transform_input<T>(image, unit.rows, in, stride, out);
  }
}

// ---- The weights: [36][block of rows][inner channel][16 rows] -----------------------------------------------------------------------------

template <class T>
void pack(const Context& ctx, const Convolution& conv, bool up, int64_t num, const T* w, int64_t w_batch, T* packed) {
  const int64_t rows = up ? conv.x_channels : conv.y_channels, inner = up ? conv.y_channels : conv.x_channels;
  const int64_t blocks = winograd_channels(rows), size = kElements * inner * blocks;
  const int64_t w_row = up ? 9 : conv.x_channels * 9, w_inner = up ? conv.x_channels * 9 : 9;
  const int threads = threads_for(ctx, num * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < num * inner; ++item) {
    const int64_t v = item / inner, c = item % inner;
    for (int64_t r = 0; r < blocks; r += kLanes<T>) {
      const int64_t height = std::clamp<int64_t>(rows - r, 0, kLanes<T>);
      const T* from = w + v * w_batch + c * w_inner + r * w_row;
      T taps[9][kLanes<T>] = {};
      for (int64_t i = 0; i < height; ++i) {
        for (int k = 0; k < 9; ++k) taps[up ? 8 - k : k][i] = from[i * w_row + k];
      }
      T* to = packed + v * size + (r / kWinogradBlock * inner + c) * kWinogradBlock + r % kWinogradBlock;
      both_axes<T, 3, kIn>([](const Vec<T>* d, Vec<T>* out) __attribute__((always_inline)) { kernel_line<T>(d, out); },
                           [&](int i, int j) __attribute__((always_inline)) { return load(taps[i * 3 + j]); },
                           [&](int i, int j, Vec<T> value) __attribute__((always_inline)) { store(to + (i * kIn + j) * inner * blocks, value); });
    }
  }
}

// ---- What a tape keeps: the lines of whole images -----------------------------------------------------------------------------------------

template <class T>
void prepare(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t size, T* prepared) {
  const Image image = input_image(conv, false);
  const int threads = threads_for(ctx, n * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) Turn<T>{image, {0, image.lines(image.tiles[0])}}.in(x + i * image.channels * image.plane(), prepared + i * size);
}

// A position's columns, out of a prepared image.
template <class T>
void columns(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t prepared, T* out) {
  const Image image = input_image(conv, false);
  const int64_t C = conv.x_channels, height = conv.y_size[1], width = conv.y_size[2];
  const int threads = threads_for(ctx, n * height * width * C * 9);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    T* to = out + i * height * width * C * 9;
    for (int64_t h = 0; h < height; ++h) {
      for (int64_t w = 0; w < width; ++w, to += C * 9) {
        for (int64_t t = 0; t < 9; ++t) {
          const T* from = x + i * prepared + ((h + t / 3) * image.line() + w + t % 3) * image.blocks;
          for (int64_t c = 0; c < C; ++c) to[c * 9 + t] = from[c];
        }
      }
    }
  }
}

// ---- Products -----------------------------------------------------------------------------------------------------------------------------

template <class T>
void product(const Context& ctx, const Convolution& conv, const ConvolutionProduct<T>& p) {
  const Image in = input_image(conv, p.up), out = output_image(conv, p.up);
  ConvolutionTerm<T> terms[2];
  int num_terms = 0;
  for (const auto& term : p.terms) {
    if (term.in) terms[num_terms++] = term;
  }
  const int64_t in_width = in.channels * in.plane(), out_width = out.channels * out.plane(), weights = in.channels * out.blocks;
  const double flops = 2.0 * num_terms * p.V * p.n * out.num_tiles() * kElements * weights;
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  const int64_t wanted = std::min(tiles_wanted(sizeof(T), num_terms * in.blocks + out.blocks), ceil_div(p.n * out.num_tiles(), threads));
  const Units units(p.n, out.num_tiles(), out.tiles, wanted);
  const int64_t in_stride = element_stride<T>(units.most_tiles() * in.blocks), out_stride = element_stride<T>(units.most_tiles() * out.blocks);
  const int64_t in_lines = in.lines(units.rows) * in.line() * in.blocks;
  const int64_t out_lines = out.lines(units.rows) * out.line() * out.blocks;
  parallel_for(threads, units.count(), [&](int64_t index) {
    const Unit unit(units, index);
    T* transformed[2];
    T* at = scratch<T>(num_terms * kElements * in_stride + kElements * out_stride + in_lines + out_lines, 0);
    for (int t = 0; t < num_terms; ++t, at += kElements * in_stride) transformed[t] = at;
    T* products = at;
    T* buffer = products + kElements * out_stride;
    T* result = buffer + in_lines;
    const auto transform = [&](int t, int64_t v) {
      for (int64_t i = 0; i < unit.images; ++i) {
        const T* image = terms[t].in + v * terms[t].in_batch + (unit.image + i) * (terms[t].prepared ? terms[t].prepared : in_width);
        transform_image<T>(in, unit, image, terms[t].prepared != 0, false, in_stride, buffer,
                           transformed[t] + i * unit.rows * in.tiles[1] * in.blocks);
      }
    };
    for (int64_t v = 0; v < p.V; ++v) {
      for (int t = 0; t < num_terms; ++t) {
        if (v == 0 || terms[t].in_batch != 0) transform(t, v);
      }
      for (int64_t e = 0; e < kElements; ++e) {
        ElementTerm<T> element[2];
        for (int t = 0; t < num_terms; ++t) {
          element[t] = {transformed[t] + e * in_stride, in.blocks, 1, terms[t].packed + v * terms[t].packed_batch + e * weights, kWinogradBlock,
                        in.channels * kWinogradBlock};
        }
        element_product<T>(unit.tiles, in.channels, out.blocks, element, num_terms, products + e * out_stride, out.blocks, false);
      }
      for (int64_t i = 0; i < unit.images; ++i) {
        transform_output<T>(out, unit.rows, products + i * unit.rows * out.tiles[1] * out.blocks, out_stride, result);
        Turn<T>{out, unit.lines(out)}.out(result, p.bias ? p.bias + v * p.bias_batch : nullptr,
                                          p.scale ? p.scale + ((p.scales_each ? v * p.n : 0) + unit.image + i) * out_width : nullptr, p.accumulate,
                                          p.out + (v * p.n + unit.image + i) * out_width);
      }
    }
  });
}

// ---- The gradient by the kernel -----------------------------------------------------------------------------------------------------------

// out [count, 9] += taps [9, lanes]ᵀ. Rows are all read before the first is written: a read that meets a write still under way waits for it.
template <class T>
inline __attribute__((always_inline)) void add_taps(const Vec<T>* taps, int64_t count, T* out) {
  constexpr int L = kLanes<T>;
  if constexpr (L >= 9) {
    Vec<T> rows[L] = {};
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) rows[k] = taps[k];
    transpose_square<T>(rows);
    if (count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] += load_lanes(out + i * 9, 9);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store_lanes(out + i * 9, rows[i], 9);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int k = 0; k < 9; ++k) out[i * 9 + k] += taps[k][i];
  }
}

template <class T>
void weights(const Context& ctx, const Convolution& conv, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
             int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example) {
  const Image in = input_image(conv, false), cotangent = output_image(conv, false);
  const int64_t x_width = prepared ? prepared : in.channels * in.plane(), y_width = cotangent.channels * cotangent.plane();
  const double flops = 2.0 * V * n * in.num_tiles() * kElements * in.blocks * cotangent.channels;
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  const Units units(images, in.num_tiles(), in.tiles, tiles_wanted(sizeof(T), in.blocks + cotangent.blocks));
  const int64_t in_stride = element_stride<T>(units.most_tiles() * in.blocks);
  const int64_t out_stride = element_stride<T>(units.most_tiles() * cotangent.blocks);
  const int64_t lines = std::max(in.lines(units.rows) * in.line() * in.blocks, cotangent.lines(units.rows) * cotangent.line() * cotangent.blocks);
  const int64_t gradient = element_stride<T>(cotangent.channels * in.blocks), sums_size = kElements * gradient;
  const int64_t together = std::clamp<int64_t>(kAccumulatorBytes / (sums_size * static_cast<int64_t>(sizeof(T))), 1, V);  // right-hand sides
  T* inputs = scratch<T>(kElements * (in_stride + out_stride) + together * sums_size + threads * lines, 0);
  T* cotangents = inputs + kElements * in_stride;
  T* sums = cotangents + kElements * out_stride;  // [together][36][y channels][x blocks], elements `gradient` apart
  T* buffers = sums + together * sums_size;
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < n; block += images) {
    T* buffer = buffers + omp_get_thread_num() * lines;
    for (int64_t v0 = 0; v0 < V; v0 += together) {
      const int64_t v1 = std::min(V, v0 + together);
      for (int64_t index = 0; index < units.count(); ++index) {
        const Unit unit(units, index);
        const int64_t first = block + unit.image, tiles = unit.rows * in.tiles[1];
        for (int64_t v = v0; v < v1; ++v) {
          if (v == v0 || x_batch != 0) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < unit.images; ++i) {
              transform_image<T>(in, unit, x + v * x_batch + (first + i) * x_width, prepared != 0, false, in_stride, buffer,
                                 inputs + i * tiles * in.blocks);
            }
          }
          if (v == v0 || y_batch != 0) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < unit.images; ++i) {
              transform_image<T>(cotangent, unit, y + v * y_batch + (first + i) * y_width, false, true, out_stride, buffer,
                                 cotangents + i * tiles * cotangent.blocks);
            }
          }
#pragma omp for schedule(static)
          for (int64_t e = 0; e < kElements; ++e) {
            const ElementTerm<T> term{cotangents + e * out_stride, 1, cotangent.blocks, inputs + e * in_stride, in.blocks, kWinogradBlock};
            element_product<T>(cotangent.channels, unit.tiles, in.blocks, &term, 1, sums + (v - v0) * sums_size + e * gradient, in.blocks, index > 0);
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t item = 0; item < (v1 - v0) * cotangent.channels; ++item) {
        const int64_t v = item / cotangent.channels, o = item % cotangent.channels;
        const T* from = sums + v * sums_size + o * in.blocks;
        T* to = out + (v0 + v) * out_batch + block / images * out_example + o * in.channels * 9;
        for (int64_t c = 0; c < in.channels; c += kLanes<T>) {
          Vec<T> taps[9];
          both_axes<T, kIn, 3>([](const Vec<T>* d, Vec<T>* result) __attribute__((always_inline)) { gradient_line<T>(d, result); },
                               [&](int i, int j) __attribute__((always_inline)) { return load(from + (i * kIn + j) * gradient + c); },
                               [&](int i, int j, Vec<T> value) __attribute__((always_inline)) { taps[i * 3 + j] = value; });
          add_taps<T>(taps, std::min<int64_t>(kLanes<T>, in.channels - c), to + c * 9);
        }
      }
    }
  }
}

}  // namespace

template <class T>
void winograd_pack(const Context& ctx, const Convolution& conv, bool up, int64_t num, const T* w, int64_t w_batch, T* packed) {
  pack<T>(ctx, conv, up, num, w, w_batch, packed);
}

int64_t winograd_prepared_size(const Convolution& conv) {
  const Image image = input_image(conv, false);
  return image.lines(image.tiles[0]) * image.line() * image.blocks;
}

template <class T>
void winograd_prepare(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t size, T* prepared) {
  prepare<T>(ctx, conv, n, x, size, prepared);
}

template <class T>
void winograd_columns(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t prepared, T* out) {
  columns<T>(ctx, conv, n, x, prepared, out);
}

template <class T>
void winograd_product(const Context& ctx, const Convolution& conv, const ConvolutionProduct<T>& p) {
  product<T>(ctx, conv, p);
}

template <class T>
void winograd_weights(const Context& ctx, const Convolution& conv, int64_t V, int64_t n, const T* x, int64_t x_batch, int64_t prepared, const T* y,
                      int64_t y_batch, int64_t images, T* out, int64_t out_batch, int64_t out_example) {
  weights<T>(ctx, conv, V, n, x, x_batch, prepared, y, y_batch, images, out, out_batch, out_example);
}

#define INFL_WINOGRAD(T)                                                                                                                          \
  template void winograd_pack<T>(const Context&, const Convolution&, bool, int64_t, const T*, int64_t, T*);                                       \
  template void winograd_prepare<T>(const Context&, const Convolution&, int64_t, const T*, int64_t, T*);                                          \
  template void winograd_columns<T>(const Context&, const Convolution&, int64_t, const T*, int64_t, T*);                                          \
  template void winograd_product<T>(const Context&, const Convolution&, const ConvolutionProduct<T>&);                                            \
  template void winograd_weights<T>(const Context&, const Convolution&, int64_t, int64_t, const T*, int64_t, int64_t, const T*, int64_t, int64_t, \
                                    T*, int64_t, int64_t);
INFL_WINOGRAD(float)
INFL_WINOGRAD(double)

}  // namespace INFL_ISA
}  // namespace infl
