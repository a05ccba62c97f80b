// Products with channels of the output in the lanes (ConvolutionLanes::channels and ::columns): a sum over channels of the input and taps of
// broadcast input times vector of weights, in register tiles of up to 24 positions of a line by one vector (AVX-512), 12 by 2, or half as many. Every
// lane is used whatever the length of a line, and rows of the kernel that would read zeros above or below the image are left out. Sums go to a buffer
// [position, channel] and are turned, in squares of one vector's lanes, on their way out.
//
// With columns as channels the kernel is split: by its rows first, one result for each column of the kernel (a convolution of kernel width 1 with
// kernel width times as many channels), then along the lines, where the results of the columns are added up.
#pragma once

#include "kernels/convolution_lanes.h"
#include "kernels/cpu/convolution_geometry.h"
#include "kernels/cpu/transpose.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kRun = 512;                     // terms summed in registers before they are added up
constexpr int64_t kChannelBufferBytes = 8 << 10;  // sums of one block of channels that are turned together

// One operand of the sum: padded input and weights of one group.
template <class T>
struct Operand {
  const T* x;
  const T* a;
};

// The first step of ::columns, as a convolution: a channel of x for each column of the kernel.
inline Convolution columns_as_channels(const Convolution& conv) {
  Convolution c = conv;
  c.x_channels *= c.kernel[2];
  c.x_size[2] = c.y_size[2];
  c.kernel[2] = c.dilation[2] = 1;
  c.padding[2] = 0;
  return c;
}

// Packed weights: [block of channels][inner channel][tap][kChannelBlock]; channels of ::columns are [column of the kernel][channel].
template <class T>
void pack_channels(const Context& ctx, const Convolution& conv, bool up, ConvolutionLanes lanes, int64_t num, const T* w, int64_t w_batch,
                   T* packed) {
  const int64_t columns = lanes == ConvolutionLanes::columns ? conv.kernel[2] : 1;
  const Convolution shape = columns > 1 ? columns_as_channels(conv) : conv;
  const Geometry<T> geometry(shape, up);
  const int64_t channels = up ? conv.x_channels : conv.y_channels, inner = geometry.in_channels, taps = shape.taps();
  const int64_t size = channels_packed_size(conv, up, lanes);
  const int threads = threads_for(ctx, num * conv.weight_size());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t v = 0; v < num; ++v) {
    T* to = packed + v * size;
    for (int64_t block = 0; block < channel_blocks(channels * columns); ++block) {
      for (int64_t c = 0; c < inner; ++c) {
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
            const int64_t row = block * kChannelBlock + lane, column = row / channels;
            const int64_t o = up ? c : row % channels, i = up ? row % channels : c;
            *to++ = column < columns ? w[v * w_batch + ((o * conv.x_channels + i) * taps + geometry.indices[t]) * columns + column] : T(0);
          }
        }
      }
    }
  }
}

template <class T>
struct ChannelTerm {
  const T* x;  // first position
  const T* a;  // first channel and tap
  const int64_t* offsets;
  int64_t channels, channel;  // number, and distance in x
  int64_t taps, a_channel;
};

// out[position, channel] (+)= the terms, for P neighbouring positions and NV vectors of channels.
template <class T, int P, int NV>
__attribute__((noinline)) void channel_tile(const ChannelTerm<T>* terms, int num_terms, T* out, int64_t out_row, bool add) {
  Vec<T> acc[P][NV];
  clear(acc);
  for (int i = 0; i < num_terms; ++i) {
    const ChannelTerm<T> term = terms[i];
    for (int64_t c = 0; c < term.channels; ++c) {
      const T *x = term.x + c * term.channel, *a = term.a + c * term.a_channel;
      for (int64_t t = 0; t < term.taps; ++t) {
        const T* from = x + term.offsets[t];
        Vec<T> weight[NV];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) weight[j] = load(a + j * kLanes<T>);
#pragma GCC unroll 24
        for (int p = 0; p < P; ++p) {
          const T value = from[p];
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) acc[p][j] += weight[j] * value;
        }
        a += kChannelBlock;
      }
    }
  }
#pragma GCC unroll 24
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      T* to = out + p * out_row + j * kLanes<T>;
      store(to, add ? acc[p][j] + load(to) : acc[p][j]);
    }
  }
}

template <class T>
using ChannelFn = void (*)(const ChannelTerm<T>*, int, T*, int64_t, bool);

template <int NV>
inline constexpr int kMostPositions = (INFL_VECTOR_BYTES == 64 ? 24 : 12) / NV;

template <class T, int NV>
ChannelFn<T> channel_tile_for(int64_t positions) {
  return of_size<kMostPositions<NV>>(positions, []<int P>(Size<P>) { return &channel_tile<T, P, NV>; });
}

// What is done with complete sums on their way to `lanes` elements of the output.
template <class T>
inline __attribute__((always_inline)) void finish(Vec<T> value, int64_t lanes, bool add, const T* bias, const T* scale, T* out) {
  const bool whole = lanes == kLanes<T>;
  if (add) value += whole ? load(out) : load_lanes(out, lanes);
  if (bias) value += *bias;
  if (scale) value *= whole ? load(scale) : load_lanes(scale, lanes);
  if (whole) {
    store(out, value);
  } else {
    store_lanes(out, value, lanes);
  }
}

// Sums [count, channels], `row` between positions, to their places in planes.
template <class T>
void turn_positions(const T* sums, int64_t row, int64_t count, int64_t channels, int64_t plane, const T* bias, const T* scale, T* out,
                    bool accumulate) {
  constexpr int L = kLanes<T>;
  for (int64_t p = 0; p < count; p += L) {
    const int64_t lanes = std::min<int64_t>(L, count - p);
    for (int64_t c = 0; c < channels; c += L) {
      Vec<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(sums + (p + i) * row + c);
      transpose_square<T>(square);
      T turned[L][L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(turned[i], square[i]);
      for (int64_t i = 0; i < std::min<int64_t>(L, channels - c); ++i) {
        const int64_t at = (c + i) * plane + p;
        finish<T>(load(turned[i]), lanes, accumulate, bias ? bias + c + i : nullptr, scale ? scale + at : nullptr, out + at);
      }
    }
  }
}

template <class T>
struct ChannelProduct {
  const Convolution& conv;
  const Geometry<T>& geometry;  // of columns_as_channels(conv) with ::columns
  ConvolutionLanes lanes;
  int num_terms;

  int64_t out_width() const { return geometry.up ? conv.x_channels * conv.x_plane() : conv.y_channels * conv.y_plane(); }

  // All outputs of one example and one right-hand side.
  void run(int64_t /*example*/, const Operand<T>* operands, const T* bias, const T* scale, T* out, bool accumulate) const {
    const int64_t* size = geometry.up ? conv.x_size : conv.y_size;
    const int64_t channels = geometry.up ? conv.x_channels : conv.y_channels, plane = size[0] * size[1] * size[2];
    const int64_t lines = std::max<int64_t>(1, kChannelBufferBytes / (size[2] * kChannelBlock * static_cast<int64_t>(sizeof(T))));
    const int64_t stage_row = channel_blocks(geometry.out_channels) * kChannelBlock + kChannelBlock;  // a vector may be read beyond the last column
    T* sums = scratch<T>((lines * size[2] + kLanes<T>)*kChannelBlock, 2);
    T* stage = lanes == ConvolutionLanes::columns ? scratch<T>(conv.y_size[2] * stage_row, 3) : nullptr;
    const int64_t block_size = geometry.in_channels * geometry.phases[0].num_taps * kChannelBlock;
    for (int64_t first = 0; first < size[0] * size[1]; first += lines) {
      const int64_t last = std::min(size[0] * size[1], first + lines), begin = first * size[2];
      for (int64_t o = 0; o < channels; o += kChannelBlock) {
        const int64_t block = std::min(kChannelBlock, channels - o);
        for (int64_t l = first; l < last; ++l) {
          T* to = sums + (l - first) * size[2] * kChannelBlock;
          if (lanes == ConvolutionLanes::channels) {
            line(operands, o / kChannelBlock * block_size, block, l, size[2], to, kChannelBlock);
            continue;
          }
          for (int64_t c = 0; c < geometry.out_channels; c += kChannelBlock) {
            line(operands, c / kChannelBlock * block_size, std::min(kChannelBlock, geometry.out_channels - c), l, conv.y_size[2], stage + c,
                 stage_row);
          }
          add_columns(stage, stage_row, to);
        }
        const int64_t at = o * plane + begin;
        turn_positions<T>(sums, kChannelBlock, (last - first) * size[2], block, plane, bias ? bias + o : nullptr, scale ? scale + at : nullptr,
                          out + at, accumulate);
      }
    }
  }

  // `count` positions of one line, a block of channels whose weights begin at `a`.
  void line(const Operand<T>* operands, int64_t a, int64_t channels, int64_t l, int64_t count, T* out, int64_t out_row) const {
    const Axis& axis = geometry.axes[1];
    const int64_t h = l % axis.out_size, columns = static_cast<int64_t>(geometry.axes[2].taps.size()), taps = geometry.phases[0].num_taps;
    int64_t t0 = 0, t1 = taps;
    if (geometry.axes[0].taps.size() == 1) {  // rows of the kernel that read lines of the image
      const auto reads = [&](int64_t row) {
        const AxisTap& tap = axis.taps[row];
        const int64_t y = (h + tap.shift) * axis.spacing + tap.residue;
        return y >= 0 && y < axis.in_size;
      };
      int64_t r0 = 0, r1 = static_cast<int64_t>(axis.taps.size());
      while (r0 < r1 && !reads(r0)) ++r0;
      while (r1 > r0 && !reads(r1 - 1)) --r1;
      t0 = r0 * columns;
      t1 = r1 * columns;
    }
    const int64_t begin = l / axis.out_size * geometry.plane + h * geometry.line, inner = geometry.in_channels;
    const int64_t run = std::max<int64_t>(1, kRun / std::max<int64_t>(1, t1 - t0));
    ChannelTerm<T> terms[2];
    const auto tiles = [&](int count_terms, bool add) {
      constexpr int kVectors = std::min<int>(2, kChannelBlock / kLanes<T>);
      for (int64_t c = 0; c < channels;) {
        const bool wide = kVectors == 2 && channels - c > kLanes<T>;
        const int64_t most = wide ? kMostPositions<kVectors> : kMostPositions<1>;
        const int64_t num_tiles = ceil_div(count, most);
        for (int64_t i = 0; i < num_tiles; ++i) {
          const int64_t p0 = i * count / num_tiles, p1 = (i + 1) * count / num_tiles;
          ChannelTerm<T> here[2];
          for (int t = 0; t < count_terms; ++t) {
            here[t] = terms[t];
            here[t].x += p0;
            here[t].a += c;
          }
          const ChannelFn<T> fn = wide ? channel_tile_for<T, kVectors>(p1 - p0) : channel_tile_for<T, 1>(p1 - p0);
          fn(here, count_terms, out + p0 * out_row + c, out_row, add);
        }
        c += wide ? kVectors * kLanes<T> : kLanes<T>;
      }
    };
    const auto term = [&](int t, int64_t c, int64_t num_channels) {
      const int64_t a_channel = taps * kChannelBlock;
      return ChannelTerm<T>{operands[t].x + begin + c * geometry.channel,
                            operands[t].a + a + c * a_channel + t0 * kChannelBlock,
                            geometry.offsets.data() + t0,
                            num_channels,
                            geometry.channel,
                            t1 - t0,
                            a_channel};
    };
    if (num_terms * inner <= run) {
      for (int t = 0; t < num_terms; ++t) terms[t] = term(t, 0, inner);
      return tiles(num_terms, false);
    }
    for (int t = 0; t < num_terms; ++t) {
      for (int64_t c = 0; c < inner; c += run) {
        terms[0] = term(t, c, std::min(run, inner - c));
        tiles(1, t > 0 || c > 0);
      }
    }
  }

  // sums[w, c] = Σ_k stage[w + padding − k dilation, (k, c)] over the columns k of the kernel.
  void add_columns(const T* stage, int64_t stage_row, T* sums) const {
    const int64_t in = conv.y_size[2], dilation = conv.dilation[2], channels = conv.x_channels;
    const auto steps = [dilation](int64_t columns) { return dilation == 1 ? columns : columns / dilation; };  // divisions would be half of the time
    for (int64_t w = 0; w < conv.x_size[2]; ++w) {
      const int64_t e = w + conv.padding[2];
      const int64_t k0 = e < in ? 0 : steps(e - in) + 1, k1 = std::min(conv.kernel[2], steps(e) + 1);
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t k = k0; k < k1; ++k) sum += load(stage + (e - k * dilation) * stage_row + k * channels + c);
        store(sums + w * kChannelBlock + c, sum);
      }
    }
  }
};

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
