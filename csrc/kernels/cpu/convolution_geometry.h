// What the convolution kernels share: where each tap reads, in a padded copy of the input.
//
// Each example's input is copied once into a zero-padded buffer in which every tap of the kernel reads contiguous memory: with stride s the columns,
// rows and planes are sorted by their residue modulo s, so that neighbouring outputs read neighbouring inputs. A tap is then an offset into that
// buffer, and no matrix of columns is formed. The transposed direction is the same with one phase of the outputs for each residue of their
// coordinates, each with the taps that reach it: no operation is spent on zeros between inputs, and no output is written twice.
//
// Positions are taken line by line, or, where lines are short, from the whole plane including the columns between lines ("flat").
#pragma once

#include "kernels/convolution.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tiles.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
T* scratch(int64_t size, int which) {
  static thread_local std::vector<T> buffers[4];
  auto& buffer = buffers[which];
  if (static_cast<int64_t>(buffer.size()) < size + 64 / static_cast<int64_t>(sizeof(T))) buffer.resize(size + 64 / sizeof(T));
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (((address + 63) & ~uintptr_t{63}) - address) / sizeof(T);
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lines are a few vectors long, so what is left of the last one counts: it is a vector of some lanes, or one that overlaps the vector before it.
template <class T>
inline __attribute__((always_inline)) void copy_line(const T* from, int64_t count, T* to) {
  constexpr int64_t L = kLanes<T>;
  if (count >= L) {
    for (int64_t i = 0; i + L <= count; i += L) store(to + i, load(from + i));
    if (count % L != 0) store(to + count - L, load(from + count - L));
  } else {
    store_lanes(to, load_lanes(from, count), count);
  }
}

// One spatial axis of one direction: outputs of phase r lie at r + step·q, q < count, and tap k of that phase reads element q + shift of the inputs
// whose coordinate is `residue` modulo the stride.
struct AxisTap {
  int64_t phase, k, residue, shift;
};

struct Axis {
  int64_t in_size, out_size, spacing, step;  // spacing: of inputs that neighbouring outputs read
  int64_t num_phases;
  std::vector<AxisTap> taps;
  std::vector<int64_t> residues;  // those that are read
  int64_t low = 0, size = 1;      // zeros before, and length of the padded copy

  int64_t count(int64_t phase) const { return (out_size - phase + step - 1) / step; }
  int64_t place(int64_t residue) const {
    for (size_t i = 0; i < residues.size(); ++i) {
      if (residues[i] == residue) return static_cast<int64_t>(i);
    }
    return 0;
  }
};

inline Axis make_axis(const Convolution& c, int a, bool up) {
  Axis axis;
  const int64_t s = c.stride[a];
  axis.in_size = up ? c.y_size[a] : c.x_size[a];
  axis.out_size = up ? c.x_size[a] : c.y_size[a];
  axis.spacing = up ? 1 : s;
  axis.step = up ? s : 1;
  axis.num_phases = up ? std::min(s, c.x_size[a]) : 1;
  int64_t lowest = 0, highest = 0;
  for (int64_t phase = 0; phase < axis.num_phases; ++phase) {
    for (int64_t k = 0; k < c.kernel[a]; ++k) {
      const int64_t e = up ? phase + c.padding[a] - k * c.dilation[a] : k * c.dilation[a] - c.padding[a];
      const int64_t shift = floor_div(e, s), residue = e - shift * s;
      if (up && residue != 0) continue;
      const bool first = axis.taps.empty();
      lowest = first ? shift : std::min(lowest, shift);
      highest = first ? shift + axis.count(phase) : std::max(highest, shift + axis.count(phase));
      axis.taps.push_back({phase, k, residue, shift});
      bool known = false;
      for (int64_t r : axis.residues) known = known || r == residue;
      if (!known) axis.residues.push_back(residue);
    }
  }
  if (axis.residues.empty()) axis.residues.push_back(0);
  axis.low = -lowest;
  axis.size = std::max<int64_t>(1, highest - lowest);
  return axis;
}

struct Phase {
  int64_t index[3];  // per axis
  int64_t count[3];  // outputs per axis
  int64_t first_tap, num_taps;
};

template <class T>
struct Geometry {
  Geometry(const Convolution& c, bool up) : conv(c), up(up) {
    for (int a = 0; a < 3; ++a) axes[a] = make_axis(c, a, up);
    in_channels = up ? c.y_channels : c.x_channels;
    out_channels = up ? c.x_channels : c.y_channels;
    in_plane = up ? c.y_plane() : c.x_plane();
    out_plane = up ? c.x_plane() : c.y_plane();
    line = axes[2].size;
    plane = axes[1].size * line;
    volume = axes[0].size * plane;
    const int64_t residues = static_cast<int64_t>(axes[0].residues.size() * axes[1].residues.size() * axes[2].residues.size());
    // An odd number of cache lines between channels: no two of them compete for the same few places in the cache.
    channel = (ceil_div(residues * volume * static_cast<int64_t>(sizeof(T)), 64) | 1) * 64 / static_cast<int64_t>(sizeof(T));
    padded = in_channels * channel;
    for (int64_t d = 0; d < axes[0].num_phases; ++d) {
      for (int64_t h = 0; h < axes[1].num_phases; ++h) {
        for (int64_t w = 0; w < axes[2].num_phases; ++w) add_phase(d, h, w);
      }
    }
  }

  void add_phase(int64_t d, int64_t h, int64_t w) {
    Phase phase{{d, h, w}, {axes[0].count(d), axes[1].count(h), axes[2].count(w)}, static_cast<int64_t>(offsets.size()), 0};
    for (const AxisTap& td : axes[0].taps) {
      if (td.phase != d) continue;
      for (const AxisTap& th : axes[1].taps) {
        if (th.phase != h) continue;
        for (const AxisTap& tw : axes[2].taps) {
          if (tw.phase != w) continue;
          const int64_t place = (axes[0].place(td.residue) * static_cast<int64_t>(axes[1].residues.size()) + axes[1].place(th.residue)) *
                                    static_cast<int64_t>(axes[2].residues.size()) +
                                axes[2].place(tw.residue);
          offsets.push_back(place * volume + (td.shift + axes[0].low) * plane + (th.shift + axes[1].low) * line + tw.shift + axes[2].low);
          indices.push_back((td.k * conv.kernel[1] + th.k) * conv.kernel[2] + tw.k);
        }
      }
    }
    phase.num_taps = static_cast<int64_t>(offsets.size()) - phase.first_tap;
    phases.push_back(phase);
  }

  // The padded copy of one example's channels: [channels][residues][D][H][W].
  void fill(const T* in, T* out) const {
    for (int64_t c = 0; c < in_channels; ++c) {
      T* to = out + c * channel;
      for (int64_t rd : axes[0].residues) {
        for (int64_t rh : axes[1].residues) {
          for (int64_t rw : axes[2].residues) {
            fill_volume(in + c * in_plane, rd, rh, rw, to);
            to += volume;
          }
        }
      }
      for (T* end = out + (c + 1) * channel; to < end; ++to) *to = T(0);
    }
  }

  // Where the elements of a plane lie in the padded copy of its channel, where strides sort nothing.
  std::vector<int32_t> positions() const {
    std::vector<int32_t> at(in_plane);
    for (int64_t i = 0; i < in_plane; ++i) {
      const int64_t w = i % axes[2].in_size, h = i / axes[2].in_size % axes[1].in_size, d = i / (axes[2].in_size * axes[1].in_size);
      at[i] = static_cast<int32_t>((d + axes[0].low) * plane + (h + axes[1].low) * line + w + axes[2].low);
    }
    return at;
  }

  // The padded copy of planes that are zero but for the sums of `picked` elements each, in [channels, picked] ∘ factor, at the places of `index`.
  void fill_picked(int64_t picked, const std::vector<int32_t>& positions, const T* index, const T* factor, const T* in, T* out) const {
    std::memset(out, 0, padded * sizeof(T));
    for (int64_t c = 0; c < in_channels; ++c, index += picked, in += picked, factor += factor ? picked : 0) {
      T* to = out + c * channel;
      for (int64_t o = 0; o < picked; ++o) to[positions[static_cast<int32_t>(index[o])]] += factor ? in[o] * factor[o] : in[o];
    }
  }

  // A copy by itself: with zeros behind it, and its successor aligned as it is.
  int64_t prepared() const { return padded + 64 / static_cast<int64_t>(sizeof(T)); }
  void prepare(const T* in, T* out) const {
    fill(in, out);
    for (T* end = out + padded; end < out + prepared(); ++end) *end = T(0);
  }

  // Vectors may reach beyond the last line: a vector of zeros behind the last copy.
  void fill_end(T* end) const {
    for (int64_t i = 0; i < kLanes<T>; ++i) end[i] = T(0);
  }

  void fill_volume(const T* in, int64_t rd, int64_t rh, int64_t rw, T* out) const {
    const int64_t s = axes[2].spacing;
    const int64_t inputs = std::max<int64_t>(0, ceil_div(axes[2].in_size - rw, s));
    const int64_t begin = std::clamp<int64_t>(axes[2].low, 0, line), end = std::clamp<int64_t>(axes[2].low + inputs, begin, line);
    for (int64_t d = 0; d < axes[0].size; ++d) {
      const int64_t z = (d - axes[0].low) * axes[0].spacing + rd;
      for (int64_t h = 0; h < axes[1].size; ++h) {
        const int64_t y = (h - axes[1].low) * axes[1].spacing + rh;
        T* to = out + d * plane + h * line;
        if (z < 0 || z >= axes[0].in_size || y < 0 || y >= axes[1].in_size) {
          for (int64_t w = 0; w < line; ++w) to[w] = T(0);
          continue;
        }
        const T* from = in + (z * axes[1].in_size + y) * axes[2].in_size + (begin - axes[2].low) * s + rw;
        for (int64_t w = 0; w < begin; ++w) to[w] = T(0);
        if (s == 1) {
          copy_line(from, end - begin, to + begin);
        } else if (s == 2) {
          for (int64_t w = begin; w < end; ++w) to[w] = from[2 * (w - begin)];
        } else {
          for (int64_t w = begin; w < end; ++w) to[w] = from[s * (w - begin)];
        }
        for (int64_t w = end; w < line; ++w) to[w] = T(0);
      }
    }
  }

  // Vectors that cover the positions of a phase line by line, and from the whole plane.
  static int64_t line_vectors(const int64_t* count) { return count[1] * ceil_div(count[2], kLanes<T>); }
  int64_t flat_vectors(const int64_t* count) const { return ceil_div((count[1] - 1) * line + count[2], kLanes<T>); }

  const Convolution& conv;
  bool up;
  Axis axes[3];
  int64_t in_channels, out_channels, in_plane, out_plane;
  int64_t line, plane, volume, channel, padded;  // strides and size of the padded copy
  std::vector<Phase> phases;
  std::vector<int64_t> offsets, indices;  // per tap, phase by phase: where it reads, and its number in the kernel
};

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
