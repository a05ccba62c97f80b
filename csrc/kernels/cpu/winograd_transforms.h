// What surrounds the products of Winograd's algorithm (winograd.cpp): images with channels innermost, and the transforms of tiles.
//
// The points are 0, ±5/8, ±3/2, ∞: exact in binary, and with a rounding error half of that of the usual 0, ±1, ±2, ∞ (in float32 with 16 to 64
// channels 5e-7 to 8e-7 relative to the result, where sums in the order of the formula have 2e-7 to 4e-7).
#pragma once

#include "kernels/cpu/convolution_geometry.h"
#include "kernels/cpu/transpose.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kOut = kWinogradOutputs, kIn = kWinogradInputs, kElements = kWinogradElements;

// ---- Transforms along one axis ------------------------------------------------------------------------------------------------------------

template <class T>
struct Points {
  static constexpr T a = T(0.625), b = T(1.5);
  static constexpr T a2 = a * a, b2 = b * b, sum = a2 + b2, product = a2 * b2;
  static constexpr T at_zero = 1 / product, at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));  // 1 / Π of distances to the others
};

// Bᵀ, 6 to 6.
template <class T>
inline __attribute__((always_inline)) void input_line(const Vec<T>* d, Vec<T>* out) {
  using P = Points<T>;
  const Vec<T> even_a = d[4] - P::b2 * d[2], odd_a = P::a * (d[3] - P::b2 * d[1]);
  const Vec<T> even_b = d[4] - P::a2 * d[2], odd_b = P::b * (d[3] - P::a2 * d[1]);
  out[0] = P::product * d[0] + (d[4] - P::sum * d[2]);
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = P::product * d[1] + (d[5] - P::sum * d[3]);
}

// Aᵀ, 6 to 4.
template <class T>
inline __attribute__((always_inline)) void output_line(const Vec<T>* m, Vec<T>* out) {
  using P = Points<T>;
  const Vec<T> sum_a = m[1] + m[2], sum_b = m[3] + m[4];
  const Vec<T> odd_a = P::a * (m[1] - m[2]), odd_b = P::b * (m[3] - m[4]);
  out[0] = m[0] + sum_a + sum_b;
  out[1] = odd_a + odd_b;
  out[2] = P::a2 * sum_a + P::b2 * sum_b;
  out[3] = P::a2 * odd_a + (P::b2 * odd_b + m[5]);
}

// A, 4 to 6.
template <class T>
inline __attribute__((always_inline)) void cotangent_line(const Vec<T>* g, Vec<T>* out) {
  using P = Points<T>;
  const Vec<T> even_a = g[0] + P::a2 * g[2], odd_a = P::a * (g[1] + P::a2 * g[3]);
  const Vec<T> even_b = g[0] + P::b2 * g[2], odd_b = P::b * (g[1] + P::b2 * g[3]);
  out[0] = g[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = g[3];
}

// G, 3 to 6.
template <class T>
inline __attribute__((always_inline)) void kernel_line(const Vec<T>* w, Vec<T>* out) {
  using P = Points<T>;
  const Vec<T> even_a = P::at_a * (w[0] + P::a2 * w[2]), odd_a = (P::at_a * P::a) * w[1];
  const Vec<T> even_b = P::at_b * (w[0] + P::b2 * w[2]), odd_b = (P::at_b * P::b) * w[1];
  out[0] = P::at_zero * w[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = w[2];
}

// Gᵀ, 6 to 3.
template <class T>
inline __attribute__((always_inline)) void gradient_line(const Vec<T>* m, Vec<T>* out) {
  using P = Points<T>;
  const Vec<T> sum_a = P::at_a * (m[1] + m[2]), sum_b = P::at_b * (m[3] + m[4]);
  out[0] = P::at_zero * m[0] + (sum_a + sum_b);
  out[1] = (P::at_a * P::a) * (m[1] - m[2]) + (P::at_b * P::b) * (m[3] - m[4]);
  out[2] = P::a2 * sum_a + (P::b2 * sum_b + m[5]);
}

// Both axes: `line` takes From vectors to To. in(i, j) gives a vector, out(i, j, v) takes one.
template <class T, int From, int To, class Line, class In, class Out>
inline __attribute__((always_inline)) void both_axes(const Line& line, const In& in, const Out& out) {
  Vec<T> half[To][From];
#pragma GCC unroll 6
  for (int j = 0; j < From; ++j) {
    Vec<T> column[From], result[To];
#pragma GCC unroll 6
    for (int i = 0; i < From; ++i) column[i] = in(i, j);
    line(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) {
    Vec<T> result[To];
    line(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < To; ++j) out(i, j, result[j]);
  }
}

// ---- Images with channels innermost -------------------------------------------------------------------------------------------------------

// One side of a convolution in units of tiles. As input, an image has `low` zeros before it and zeros up to a whole number of tiles; the lines of a
// unit are [6 or more, line, channels].
struct Image {
  int64_t channels, blocks;  // blocks: channels with those that fill the last block
  const int64_t* size;       // of the three axes
  int64_t low[2];            // zeros before lines and columns
  int64_t tiles[2];
  int64_t overlap;  // lines that neighbouring tiles share

  int64_t plane() const { return size[1] * size[2]; }
  int64_t lines(int64_t rows) const { return rows * kOut + overlap; }
  int64_t line() const { return lines(tiles[1]); }
  int64_t num_tiles() const { return tiles[0] * tiles[1]; }
};

// What is read, in tiles of 6 × 6.
inline Image input_image(const Convolution& c, bool up) {
  const int64_t channels = up ? c.y_channels : c.x_channels;
  Image image{channels, winograd_channels(channels), up ? c.y_size : c.x_size, {}, {}, kIn - kOut};
  for (int a = 0; a < 2; ++a) {
    image.low[a] = up ? 2 - c.padding[a + 1] : c.padding[a + 1];
    image.tiles[a] = ceil_div((up ? c.x_size : c.y_size)[a + 1], kOut);
  }
  return image;
}

// What is written, in tiles of 4 × 4; of `weights` the cotangent.
inline Image output_image(const Convolution& c, bool up) {
  const int64_t channels = up ? c.x_channels : c.y_channels;
  const int64_t* size = up ? c.x_size : c.y_size;
  return {channels, winograd_channels(channels), size, {}, {ceil_div(size[1], kOut), ceil_div(size[2], kOut)}, 0};
}

// The lines of a unit: padded lines [begin, begin + count) of an image.
struct Lines {
  int64_t begin, count;
};

// An image [channels, plane] and its lines [lines, line, blocks] of a unit.
template <class T>
struct Turn {
  const Image& image;
  Lines lines;

  // Pixels [first, last) of the image lie in these lines.
  int64_t first() const { return std::clamp<int64_t>(lines.begin - image.low[0], 0, image.size[1]) * image.size[2]; }
  int64_t last() const { return std::clamp<int64_t>(lines.begin + lines.count - image.low[0], 0, image.size[1]) * image.size[2]; }

  // Where pixels p, p + 1, ... lie in the lines, times the blocks.
  void places(int64_t p, int64_t count, int64_t* place) const {
    int64_t y = p / image.size[2], x = p % image.size[2];
    for (int64_t i = 0; i < count; ++i) {
      place[i] = ((y + image.low[0] - lines.begin) * image.line() + x + image.low[1]) * image.blocks;
      if (++x == image.size[2]) {
        x = 0;
        ++y;
      }
    }
  }

  // [channels, plane] to lines; all else in them becomes zero.
  void in(const T* from, T* to) const {
    const int64_t line = image.line() * image.blocks, low = image.low[1] * image.blocks, end = low + image.size[2] * image.blocks;
    for (int64_t h = 0; h < lines.count; ++h) {
      const int64_t y = lines.begin + h - image.low[0];
      T* at = to + h * line;
      if (y < 0 || y >= image.size[1]) {
        for (int64_t i = 0; i < line; ++i) at[i] = T(0);
      } else {
        for (int64_t i = 0; i < low; ++i) at[i] = T(0);
        for (int64_t i = end; i < line; ++i) at[i] = T(0);
      }
    }
    constexpr int L = kLanes<T>;
    int64_t place[L];
    for (int64_t p = first(), stop = last(); p < stop; p += L) {
      const int64_t count = std::min<int64_t>(L, stop - p);
      places(p, count, place);
      for (int64_t c = 0; c < image.blocks; c += L) {
        const int64_t height = std::clamp<int64_t>(image.channels - c, 0, L);
        const T* corner = from + c * image.plane() + p;
        Vec<T> rows[L];
        if (height == L && count == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) rows[i] = load(corner + i * image.plane());
          transpose_square<T>(rows);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(to + place[i] + c, rows[i]);
          continue;
        }
        for (int i = 0; i < L; ++i) rows[i] = i < height ? load_lanes(corner + i * image.plane(), count) : Vec<T>{};
        transpose_square<T>(rows);
        for (int i = 0; i < count; ++i) store(to + place[i] + c, rows[i]);
      }
    }
  }

  // Lines to [channels, plane]: (beta out + lines + bias) ∘ scale.
  void out(const T* from, const T* bias, const T* scale, bool accumulate, T* to) const {
    constexpr int L = kLanes<T>;
    int64_t place[L];
    for (int64_t p = first(), stop = last(); p < stop; p += L) {
      const int64_t count = std::min<int64_t>(L, stop - p);
      places(p, count, place);
      for (int64_t c = 0; c < image.channels; c += L) {
        const int64_t height = std::min<int64_t>(image.channels - c, L);
        Vec<T> rows[L];
        if (count == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) rows[i] = load(from + place[i] + c);
        } else {
          for (int i = 0; i < L; ++i) rows[i] = i < count ? load(from + place[i] + c) : Vec<T>{};
        }
        transpose_square<T>(rows);
        const int64_t corner = c * image.plane() + p;
        if (height == L && count == L) {
          finish<true>(rows, L, L, bias ? bias + c : nullptr, scale ? scale + corner : nullptr, accumulate, to + corner);
        } else {
          finish<false>(rows, height, count, bias ? bias + c : nullptr, scale ? scale + corner : nullptr, accumulate, to + corner);
        }
      }
    }
  }

  // All loads before all stores: where a plane is a multiple of 4 KB, a load would seem to depend on the store before it.
  template <bool whole>
  void finish(Vec<T>* rows, int64_t height, int64_t count, const T* bias, const T* scale, bool accumulate, T* to) const {
    const int64_t plane = image.plane();
    if (whole) height = kLanes<T>;
    const auto read = [&](const T* p) { return whole ? load(p) : load_lanes(p, count); };
    if (accumulate) {
#pragma GCC unroll 16
      for (int i = 0; i < height; ++i) rows[i] += read(to + i * plane);
    }
    if (bias) {
#pragma GCC unroll 16
      for (int i = 0; i < height; ++i) rows[i] += bias[i];
    }
    if (scale) {
#pragma GCC unroll 16
      for (int i = 0; i < height; ++i) rows[i] *= read(scale + i * plane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < height; ++i) {
      if (whole) {
        store(to + i * plane, rows[i]);
      } else {
        store_lanes(to + i * plane, rows[i], count);
      }
    }
  }
};

// Strides of what is transformed: [36][tiles][channels], an odd number of cache lines between elements, lest all 36 compete for the same few places.
template <class T>
int64_t element_stride(int64_t size) {
  return (ceil_div(size * static_cast<int64_t>(sizeof(T)), 64) | 1) * 64 / static_cast<int64_t>(sizeof(T));
}

// Tiles of `rows` rows of tiles, from their lines, transformed; `transform` takes tiles of Size × Size.
template <class T, int Size, class Line>
inline void transform_in(const Image& image, int64_t rows, const T* lines, int64_t stride, T* out, const Line& transform) {
  const int64_t line = image.line() * image.blocks, blocks = image.blocks;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < image.tiles[1]; ++t) {
      const T* corner = lines + r * kOut * line + t * kOut * blocks;
      for (int64_t c = 0; c < blocks; c += kLanes<T>, corner += kLanes<T>, out += kLanes<T>) {
        both_axes<T, Size, kIn>(
            transform, [&](int i, int j) __attribute__((always_inline)) { return load(corner + i * line + j * blocks); },
            [&](int i, int j, Vec<T> v) __attribute__((always_inline)) { store(out + (i * kIn + j) * stride, v); });
      }
    }
  }
}

template <class T>
__attribute__((noinline)) void transform_input(const Image& image, int64_t rows, const T* lines, int64_t stride, T* out) {
  transform_in<T, kIn>(image, rows, lines, stride, out, [](const Vec<T>* d, Vec<T>* r) __attribute__((always_inline)) { input_line<T>(d, r); });
}

template <class T>
__attribute__((noinline)) void transform_cotangent(const Image& image, int64_t rows, const T* lines, int64_t stride, T* out) {
  transform_in<T, kOut>(image, rows, lines, stride, out, [](const Vec<T>* d, Vec<T>* r) __attribute__((always_inline)) { cotangent_line<T>(d, r); });
}

template <class T>
__attribute__((noinline)) void transform_output(const Image& image, int64_t rows, const T* in, int64_t stride, T* lines) {
  const int64_t line = image.line() * image.blocks, blocks = image.blocks;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < image.tiles[1]; ++t) {
      T* corner = lines + r * kOut * line + t * kOut * blocks;
      for (int64_t c = 0; c < blocks; c += kLanes<T>, corner += kLanes<T>, in += kLanes<T>) {
        both_axes<T, kIn, kOut>([](const Vec<T>* d, Vec<T>* r) __attribute__((always_inline)) { output_line<T>(d, r); },
                                [&](int i, int j) __attribute__((always_inline)) { return load(in + (i * kIn + j) * stride); },
                                [&](int i, int j, Vec<T> v) __attribute__((always_inline)) { store(corner + i * line + j * blocks, v); });
      }
    }
  }
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
