// Products, where they are not Winograd's: a sum over channels and taps of broadcast weight times vector of positions, read from the padded copy
// (convolution_geometry.h), in register tiles of up to 12 channels by 2 vectors, or fewer channels by more vectors (depthwise: 1 by 8). Where
// lines of positions would leave lanes empty, lanes run along channels instead (convolution_channels.h).
#include "kernels/convolution.h"

#include "kernels/cpu/convolution_channels.h"
#include "kernels/cpu/convolution_geometry.h"
#include "kernels/cpu/convolution_picks.h"
#include "kernels/cpu/winograd.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int kRows = INFL_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kSums = INFL_VECTOR_BYTES == 64 ? 24 : 12;  // accumulators of a register tile
constexpr int64_t kBlockBytes = 24 << 10;                 // input of the lines handled together: stays in the first-level cache

// ---- Packed weights: [phase][group][block of rows][inner channel][tap of the phase][height] ------------------------------------------------

template <class T>
void convolution_pack(const Context& ctx, const Convolution& conv, bool up, int64_t num, const T* w, int64_t w_batch, T* packed) {
  if (takes_winograd(conv)) return winograd_pack(ctx, conv, up, num, w, w_batch, packed);
  if (const auto lanes = convolution_lanes(conv, up); lanes != ConvolutionLanes::positions) {
    return pack_channels(ctx, conv, up, lanes, num, w, w_batch, packed);
  }
  const Geometry<T> geometry(conv, up);
  const int64_t rows = geometry.out_channels / conv.groups, inner = geometry.in_channels / conv.groups, taps = conv.taps();
  const int64_t x_channels = conv.x_channels / conv.groups, y_channels = conv.y_channels / conv.groups;
  const RowBlocks blocks = convolution_row_blocks(rows);
  const int64_t size = convolution_packed_size(conv, up);
  const int threads = threads_for(ctx, num * conv.weight_size());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t v = 0; v < num; ++v) {
    T* to = packed + v * size;
    for (const Phase& phase : geometry.phases) {
      for (int64_t g = 0; g < conv.groups; ++g) {
        for (int64_t block = 0; block < blocks.count; ++block) {
          for (int64_t c = 0; c < inner; ++c) {
            for (int64_t t = 0; t < phase.num_taps; ++t) {
              for (int64_t r = 0; r < blocks.height; ++r) {
                const int64_t row = block * blocks.height + r;
                const int64_t o = g * y_channels + (up ? c : row), i = up ? row : c;
                *to++ = row < rows ? w[v * w_batch + (o * x_channels + i) * taps + geometry.indices[phase.first_tap + t]] : T(0);
              }
            }
          }
        }
      }
    }
    while (to < packed + (v + 1) * size) *to++ = T(0);  // taps that reach no output
  }
}

// ---- Products ----------------------------------------------------------------------------------------------------------------------------

// What a register tile reads and where its sums go.
template <class T>
struct TileJob {
  int64_t channels, taps;
  const T* a;  // weights [channels][taps][a_rows]
  int64_t a_rows;
  const T* x;       // position of the first vector
  int64_t channel;  // between channels of x
  const int64_t* offsets;
  int64_t x_step;  // between vectors
  T* out;
  int64_t out_row, out_step;
  int64_t lanes, last_lanes;  // of every vector but the last, and of the last
  bool add, last;
  const T* bias;   // per row
  const T* scale;  // as out
};

template <class T, int R, int NV>
__attribute__((noinline)) void tile_fn(const TileJob<T>& job) {
  Vec<T> acc[R][NV];
  clear(acc);
  const T* a = job.a;
  const int64_t a_rows = job.a_rows, taps = job.taps, step = job.x_step;
  for (int64_t c = 0; c < job.channels; ++c) {
    const T* x = job.x + c * job.channel;
    for (int64_t t = 0; t < taps; ++t) {
      const T* from = x + job.offsets[t];
      Vec<T> b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = load(from + j * step);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const T value = a[r];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[r][j] += b[j] * value;
      }
      a += a_rows;
    }
  }
  const T *bias = job.last ? job.bias : nullptr, *scale = job.last ? job.scale : nullptr;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const int64_t lanes = j == NV - 1 ? job.last_lanes : job.lanes, at = r * job.out_row + j * job.out_step;
      finish<T>(acc[r][j], lanes, job.add, bias ? bias + r : nullptr, scale ? scale + at : nullptr, job.out + at);
    }
  }
}

template <class T>
using TileFn = void (*)(const TileJob<T>&);

template <class T, int NV, int R>
constexpr TileFn<T> tile_or_null() {
  if constexpr (R * NV <= kSums && R <= kRows) {
    return tile_fn<T, R, NV>;
  } else {
    return nullptr;
  }
}

template <class T, int NV>
TileFn<T> tile_for(int64_t rows) {
  static constexpr TileFn<T> table[13] = {nullptr,
                                          tile_or_null<T, NV, 1>(),
                                          tile_or_null<T, NV, 2>(),
                                          tile_or_null<T, NV, 3>(),
                                          tile_or_null<T, NV, 4>(),
                                          tile_or_null<T, NV, 5>(),
                                          tile_or_null<T, NV, 6>(),
                                          tile_or_null<T, NV, 7>(),
                                          tile_or_null<T, NV, 8>(),
                                          tile_or_null<T, NV, 9>(),
                                          tile_or_null<T, NV, 10>(),
                                          tile_or_null<T, NV, 11>(),
                                          tile_or_null<T, NV, 12>()};
  return table[rows];
}

// The widest tile of at most `vectors` vectors: its function, and its width.
template <class T>
TileFn<T> widest_tile(int64_t rows, int64_t vectors, int64_t& width) {
  width = vectors >= 8 && rows * 8 <= kSums ? 8 : vectors >= 4 && rows * 4 <= kSums ? 4 : vectors >= 2 && rows * 2 <= kSums ? 2 : 1;
  return width == 8 ? tile_for<T, 8>(rows) : width == 4 ? tile_for<T, 4>(rows) : width == 2 ? tile_for<T, 2>(rows) : tile_for<T, 1>(rows);
}

template <class T>
struct Product {
  const Convolution& conv;
  const Geometry<T>& geometry;
  int num_terms;

  int64_t out_width() const { return geometry.out_channels * geometry.out_plane; }

  // All outputs of one example and one right-hand side.
  void run(int64_t /*example*/, const Operand<T>* operands, const T* bias, const T* scale, T* out, bool accumulate) const {
    const int64_t rows = geometry.out_channels / conv.groups, inner = geometry.in_channels / conv.groups;
    const RowBlocks blocks = convolution_row_blocks(rows);
    int64_t at = 0;  // in the packed weights
    for (const Phase& phase : geometry.phases) {
      for (int64_t g = 0; g < conv.groups; ++g) {
        Operand<T> group[2];
        for (int t = 0; t < num_terms; ++t) group[t] = {operands[t].x + g * inner * geometry.channel, operands[t].a + at};
        const int64_t begin = g * rows * geometry.out_plane;
        group_product(phase, group, rows, inner, blocks, bias ? bias + g * rows : nullptr, scale ? scale + begin : nullptr, out + begin, accumulate);
        at += blocks.count * blocks.height * inner * phase.num_taps;
      }
    }
  }

  void group_product(const Phase& phase, const Operand<T>* operands, int64_t rows, int64_t inner, const RowBlocks& blocks, const T* bias,
                     const T* scale, T* out, bool accumulate) const {
    const Axis* axes = geometry.axes;
    const bool flat = takes_flat(phase.count, rows);
    const bool collect = flat || axes[0].step * axes[1].step * axes[2].step > 1;  // through a buffer, not straight to `out`
    const int64_t out_line = axes[2].out_size;
    const int64_t line_bytes = inner * std::max(1, num_terms) * geometry.line * static_cast<int64_t>(sizeof(T));
    int64_t lines = std::max<int64_t>(1, kBlockBytes / line_bytes);
    if (flat) lines = std::max<int64_t>(lines, 4096 / geometry.line + 1);
    const int64_t pitch = flat ? geometry.line : ceil_div(phase.count[2], kLanes<T>) * kLanes<T>;  // of the buffer
    lines = std::clamp<int64_t>(lines, 1, phase.count[1]);
    const int64_t buffer_row = lines * pitch + kLanes<T>;
    T* buffer = collect ? scratch<T>(kRows * buffer_row, 2) : nullptr;
    for (int64_t d = 0; d < phase.count[0]; ++d) {
      for (int64_t h = 0; h < phase.count[1]; h += lines) {
        const int64_t num_lines = std::min(lines, phase.count[1] - h);
        const int64_t x_begin = d * geometry.plane + h * geometry.line;
        for (int64_t block = 0; block < blocks.count; ++block) {
          const int64_t r0 = block * blocks.height, height = std::min(blocks.height, rows - r0);
          if (height <= 0) break;
          TileJob<T> job{};
          job.a_rows = blocks.height;
          job.channel = geometry.channel;
          job.offsets = geometry.offsets.data() + phase.first_tap;
          job.taps = phase.num_taps;
          const int64_t a_begin = r0 * inner * phase.num_taps;
          Operand<T> here[2];
          for (int t = 0; t < num_terms; ++t) here[t] = {operands[t].x + x_begin, operands[t].a + a_begin};
          const int64_t out_begin = r0 * geometry.out_plane +
                                    ((d * axes[0].step + phase.index[0]) * axes[1].out_size + h * axes[1].step + phase.index[1]) * out_line +
                                    phase.index[2];
          if (collect) {
            job.out_row = buffer_row;
          } else {
            job.out_row = geometry.out_plane;
            job.bias = bias ? bias + r0 : nullptr;
          }
          if (flat) {
            const int64_t length = ceil_div((num_lines - 1) * geometry.line + phase.count[2], kLanes<T>) * kLanes<T>;
            segment(job, here, inner, height, kLanes<T>, kLanes<T>, kLanes<T>, length / kLanes<T>, kLanes<T>, 0, buffer, nullptr, false);
          } else if (phase.count[2] <= kLanes<T>) {  // a vector a line
            T* to = collect ? buffer : out + out_begin;
            segment(job, here, inner, height, phase.count[2], phase.count[2], geometry.line, num_lines, collect ? pitch : out_line, 0, to,
                    collect || !scale ? nullptr : scale + out_begin, !collect && accumulate);
          } else {
            const int64_t vectors = ceil_div(phase.count[2], kLanes<T>), tail = phase.count[2] - (vectors - 1) * kLanes<T>;
            for (int64_t i = 0; i < num_lines; ++i) {
              T* to = collect ? buffer + i * pitch : out + out_begin + i * out_line;
              segment(job, here, inner, height, kLanes<T>, tail, kLanes<T>, vectors, kLanes<T>, i * geometry.line, to,
                      collect || !scale ? nullptr : scale + out_begin + i * out_line, !collect && accumulate);
            }
          }
          if (collect) {
            for (int64_t r = 0; r < height; ++r) {
              const int64_t start = out_begin + r * geometry.out_plane;
              collect_lines(buffer + r * buffer_row, pitch, num_lines, phase.count[2], axes[1].step * out_line, axes[2].step,
                            bias ? bias[r0 + r] : T(0), scale ? scale + start : nullptr, out + start, accumulate);
            }
          }
        }
      }
    }
  }

  // Few channels of output fill the registers only with long runs of positions (depthwise: 8 vectors).
  bool takes_flat(const int64_t* count, int64_t rows) const {
    const int64_t lines = geometry.line_vectors(count), flat = geometry.flat_vectors(count);
    return flat < lines || (rows <= 3 && count[1] > 1 && lines < 4 * count[1] && 4 * flat <= 5 * lines);
  }

  // `vectors` vectors, x_step apart in x and out_step in out, in tiles, of `lanes` positions each and `tail` in the last.
  void segment(TileJob<T> job, const Operand<T>* operands, int64_t inner, int64_t height, int64_t lanes, int64_t tail, int64_t x_step,
               int64_t vectors, int64_t out_step, int64_t x_begin, T* out, const T* scale, bool accumulate) const {
    job.lanes = lanes;
    job.x_step = x_step;
    job.out_step = out_step;
    const int64_t run = job.taps > 0 ? std::max<int64_t>(1, kRun / job.taps) : inner;
    for (int64_t j = 0; j < vectors;) {
      int64_t width = 1;
      const TileFn<T> fn = widest_tile<T>(height, vectors - j, width);
      job.last_lanes = j + width == vectors ? tail : job.lanes;
      job.out = out + j * out_step;
      job.scale = scale ? scale + j * out_step : nullptr;
      job.add = accumulate;
      for (int t = 0; t < std::max(1, num_terms); ++t) {
        int64_t c = 0;
        do {  // at least once: an empty sum still has its bias and scale
          job.channels = num_terms == 0 ? 0 : std::min(run, inner - c);
          job.a = num_terms == 0 ? nullptr : operands[t].a + c * job.taps * job.a_rows;
          job.x = num_terms == 0 ? nullptr : operands[t].x + x_begin + j * x_step + c * job.channel;
          c += job.channels;
          job.last = t >= num_terms - 1 && (c >= inner || num_terms == 0);
          fn(job);
          job.add = true;
        } while (!(num_terms == 0 || c >= inner));
      }
      j += width;
    }
  }

  // Lines of the buffer to their places.
  static void collect_lines(const T* from, int64_t pitch, int64_t lines, int64_t columns, int64_t out_line, int64_t out_step, T bias, const T* scale,
                            T* out, bool accumulate) {
    for (int64_t h = 0; h < lines; ++h) {
      const T* in = from + h * pitch;
      T* to = out + h * out_line;
      const T* factor = scale ? scale + h * out_line : nullptr;
      if (out_step == 1 && !accumulate) {
        if (factor) {
#pragma omp simd
          for (int64_t w = 0; w < columns; ++w) to[w] = (in[w] + bias) * factor[w];
        } else {
#pragma omp simd
          for (int64_t w = 0; w < columns; ++w) to[w] = in[w] + bias;
        }
        continue;
      }
      for (int64_t w = 0; w < columns; ++w) {
        T value = in[w] + bias;
        if (accumulate) value += to[w * out_step];
        if (factor) value *= factor[w * out_step];
        to[w * out_step] = value;
      }
    }
  }
};

// `P`: Product, ChannelProduct or PickProduct, whose inputs are as `geometry` copies them.
template <class T, class P>
void run_product(const Context& ctx, const Convolution& conv, const Geometry<T>& geometry, const ConvolutionTerm<T>* terms, const P& product,
                 const ConvolutionProduct<T>& p) {
  const int num_terms = product.num_terms;
  const int64_t in_width = geometry.in_channels * (p.places ? p.picked : geometry.in_plane);
  const int64_t out_width = product.out_width();
  const double flops = 2.0 * num_terms * p.V * p.n * conv.weight_size() * std::min(conv.x_plane(), conv.y_plane());
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  const std::vector<int32_t> places = p.places ? geometry.positions() : std::vector<int32_t>{};
  const auto fill = [&](const T* in, int64_t i, T* out) {
    if (!p.places) return geometry.fill(in, out);
    const int64_t at = i * geometry.in_channels * p.picked;
    geometry.fill_picked(p.picked, places, p.places + at, p.factor ? p.factor + at : nullptr, in, out);
  };
  parallel_for(threads, p.n, [&](int64_t i) {
    const T* shared[2] = {nullptr, nullptr};
    T* buffers[2] = {nullptr, nullptr};
    for (int t = 0; t < num_terms; ++t) {
      if (terms[t].prepared) {
        shared[t] = terms[t].in + i * terms[t].prepared;
        continue;
      }
      buffers[t] = scratch<T>(geometry.padded + kLanes<T>, t);
      geometry.fill_end(buffers[t] + geometry.padded);
      if (terms[t].in_batch == 0) fill(terms[t].in + i * in_width, i, buffers[t]);
    }
    for (int64_t v = 0; v < p.V; ++v) {
      Operand<T> operands[2];
      for (int t = 0; t < num_terms; ++t) {
        if (!terms[t].prepared && terms[t].in_batch != 0) fill(terms[t].in + v * terms[t].in_batch + i * in_width, i, buffers[t]);
        operands[t] = {terms[t].prepared ? shared[t] : buffers[t], terms[t].packed + v * terms[t].packed_batch};
      }
      product.run(i, operands, p.bias ? p.bias + v * p.bias_batch : nullptr,
                  p.scale ? p.scale + ((p.scales_each ? v * p.n : 0) + i) * out_width : nullptr, p.out + (v * p.n + i) * out_width, p.accumulate);
    }
  });
}

template <class T>
int present_terms(const ConvolutionProduct<T>& p, ConvolutionTerm<T>* terms) {
  int count = 0;
  for (const auto& term : p.terms) {
    if (term.in) terms[count++] = term;
  }
  return count;
}

template <class T>
void convolution_product(const Context& ctx, const Convolution& conv, const ConvolutionProduct<T>& p) {
  if (takes_winograd(conv) && (p.terms[0].in || p.terms[1].in)) return winograd_product(ctx, conv, p);
  ConvolutionTerm<T> terms[2];
  const int num_terms = present_terms(p, terms);
  const auto lanes = convolution_lanes(conv, p.up);
  const Convolution shape = lanes == ConvolutionLanes::columns ? columns_as_channels(conv) : conv;
  const Geometry<T> geometry(shape, p.up);
  if (lanes == ConvolutionLanes::positions) {
    run_product(ctx, conv, geometry, terms, Product<T>{conv, geometry, num_terms}, p);
  } else {
    run_product(ctx, conv, geometry, terms, ChannelProduct<T>{conv, geometry, lanes, num_terms}, p);
  }
}

template <class T>
void pick_product(const Context& ctx, const Convolution& conv, const Windows& windows, const T* places, const ConvolutionProduct<T>& p) {
  ConvolutionTerm<T> terms[2];
  const int num_terms = present_terms(p, terms);
  const Geometry<T> geometry(conv, false);
  run_product(ctx, conv, geometry, terms, PickProduct<T>(conv, geometry, windows, num_terms, places), p);
}

template <class T>
void convolution_prepared_size(const Context&, const Convolution& conv, int64_t* size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  *size = std::max(takes_winograd(conv) ? winograd_prepared_size(conv) : Geometry<T>(conv, false).prepared(),
                   ceil_div(conv.x_channels * conv.x_plane(), kLine) * kLine);
}

template <class T>
void convolution_prepare(const Context& ctx, const Convolution& conv, int64_t n, const T* x, int64_t size, T* prepared) {
  if (takes_winograd(conv)) return winograd_prepare(ctx, conv, n, x, size, prepared);
  const Geometry<T> geometry(conv, false);
  const int64_t in_width = geometry.in_channels * geometry.in_plane;
  parallel_for(threads_for(ctx, n * geometry.padded), n, [&](int64_t i) { geometry.prepare(x + i * in_width, prepared + i * size); });
}

INFL_REGISTER_CPU(convolution_prepared_size_stub, convolution_prepared_size)
INFL_REGISTER_CPU(convolution_prepare_stub, convolution_prepare)
INFL_REGISTER_CPU(convolution_pack_stub, convolution_pack)
INFL_REGISTER_CPU(convolution_product_stub, convolution_product)
INFL_REGISTER_CPU(pick_places_stub, pick_places)
INFL_REGISTER_CPU(pick_pack_stub, pick_pack)
INFL_REGISTER_CPU(pick_product_stub, pick_product)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
