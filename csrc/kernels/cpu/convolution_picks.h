// Products and gradients of the elements that a max pool takes (kernels/convolution_picks.h). Lanes are neighbouring windows by channels. What a lane
// reads lies in one of two lines of x, a few columns on, the same for every tap of the kernel: two vectors of x, loaded for all windows and channels
// together, hold it, and one instruction with two sources picks it for each lane. x is read from its padded copy.
#pragma once

#include "kernels/convolution_picks.h"
#include "kernels/cpu/convolution_channels.h"
#include "kernels/cpu/convolution_weights_channels.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int kPickVectors = 8;  // of a tile of products

template <class T>
using Places = decltype(Vec<T>{} < Vec<T>{});  // integers of the lanes' size

template <class T>
Places<T> load_places(const T* p) {
  return reinterpret_cast<Places<T>>(load(p));
}

// Vectors of one line of windows that read the same columns of x.
struct PickGroup {
  int64_t vector, column;
  std::vector<int64_t> windows;  // the first of each vector
  std::vector<int64_t> counts;   // and how many
};

// The groups of a line, of at most `most` vectors.
template <class T>
std::vector<PickGroup> pick_groups(const PickLanes<T>& lanes, const Windows& w, int64_t most) {
  std::vector<PickGroup> groups;
  int64_t vector = 0;
  lanes.each_vector(w, [&](int64_t window, int64_t count, int64_t column, bool first) {
    if (first || static_cast<int64_t>(groups.back().windows.size()) == most) groups.push_back({vector, column, {}, {}});
    groups.back().windows.push_back(window);
    groups.back().counts.push_back(count);
    ++vector;
  });
  return groups;
}

template <class T>
void pick_places(const Context& ctx, const Convolution& conv, const Windows& w, int64_t n, const T* index, T* places) {
  constexpr int L = kLanes<T>;
  const PickLanes<T> lanes(conv.y_channels);
  const auto groups = pick_groups(lanes, w, kPickVectors);
  const int64_t plane = w.out_plane(), size = pick_places_size<T>(conv, w);
  parallel_for(threads_for(ctx, n * size), n, [&](int64_t i) {
    T* turned = scratch<T>((plane + L) * lanes.slot + L * L, 0);
    T* to = places + i * size;
    for (int64_t b = 0; b < lanes.blocks; ++b) {
      const int64_t o = b * L;
      turn_channels<T>(std::min<int64_t>(L, conv.y_channels - o), plane, index + (i * conv.y_channels + o) * plane, turned, lanes.slot);
      for (int64_t h = 0; h < w.out[1]; ++h) {
        // A window has two lines, so a comparison tells which; places are exact as numbers of T.
        const T upper = static_cast<T>(w.begin[1][h] * w.in[2]), lower = static_cast<T>((w.begin[1][h] + 1) * w.in[2]);
        for (const PickGroup& group : groups) {
          const T column = static_cast<T>(group.column);
          for (size_t j = 0; j < group.windows.size(); ++j, to += L) {
            const Vec<T> place = load_lanes(turned + (h * w.out[2] + group.windows[j]) * lanes.slot, group.counts[j] * lanes.slot);
            const Vec<T> at = place - column - (place >= lower ? Vec<T>{} + (lower - L) : Vec<T>{} + upper);
            const auto used = __builtin_convertvector(at > T(0) ? at : Vec<T>{}, Places<T>);  // lanes without a window or channel: the first place
            store(to, reinterpret_cast<Vec<T>>(used));
          }
        }
      }
    }
  });
}

template <class T>
void pick_pack(const Context& ctx, const Convolution& conv, int64_t num, const T* w, int64_t w_batch, T* packed) {
  const PickLanes<T> lanes(conv.y_channels);
  const int64_t rows = conv.kernel[1], columns = conv.kernel[2], size = pick_packed_size(conv);
  parallel_for(threads_for(ctx, num * size), num, [&](int64_t v) {
    T* to = packed + v * size;
    for (int64_t b = 0; b < lanes.blocks; ++b) {
      for (int64_t c = 0; c < conv.x_channels; ++c) {
        for (int64_t kx = 0; kx < columns; ++kx) {
          for (int64_t ky = 0; ky < rows; ++ky) {
            for (int64_t lane = 0; lane < lanes.lanes; ++lane) {
              const int64_t o = b * lanes.lanes + lane % lanes.slot;
              *to++ = o < conv.y_channels ? w[v * w_batch + ((o * conv.x_channels + c) * rows + ky) * columns + kx] : T(0);
            }
          }
        }
      }
    }
  });
}

// What a tile of products reads of one term.
template <class T>
struct PickTerm {
  const T *x, *a;
  int64_t channels;
};

template <class T>
struct PickJob {
  const T* places;
  int64_t channel, line, columns, rows;  // of x, and the kernel's
  T* sums;
  int64_t slot;                     // between windows in `sums`
  const int64_t *windows, *counts;  // of each vector
};

template <class T, int W>
__attribute__((noinline)) void pick_tile(const PickJob<T>& job, const PickTerm<T>* terms, int num_terms, bool add) {
  Vec<T> acc[W];
  Places<T> places[W];
#pragma GCC unroll 8
  for (int j = 0; j < W; ++j) {
    acc[j] = Vec<T>{};
    places[j] = load_places(job.places + j * kLanes<T>);
  }
  for (int i = 0; i < num_terms; ++i) {
    const T* a = terms[i].a;
    for (int64_t c = 0; c < terms[i].channels; ++c) {
      for (int64_t k = 0; k < job.columns; ++k) {
        const T* from = terms[i].x + c * job.channel + k;
        Vec<T> upper = load(from);
        for (int64_t r = 0; r < job.rows; ++r) {
          from += job.line;
          const Vec<T> lower = load(from), weight = load(a);
          a += kLanes<T>;
#pragma GCC unroll 8
          for (int j = 0; j < W; ++j) acc[j] += weight * __builtin_shuffle(upper, lower, places[j]);
          upper = lower;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < W; ++j) finish<T>(acc[j], job.counts[j] * job.slot, add, nullptr, nullptr, job.sums + job.windows[j] * job.slot);
}

template <class T>
using PickFn = void (*)(const PickJob<T>&, const PickTerm<T>*, int, bool);

template <class T>
PickFn<T> pick_tile_for(size_t vectors) {
  return of_size<kPickVectors>(static_cast<int64_t>(vectors), []<int W>(Size<W>) { return &pick_tile<T, W>; });
}

template <class T>
struct PickProduct {
  PickProduct(const Convolution& conv, const Geometry<T>& geometry, const Windows& w, int num_terms, const T* places)
      : conv(conv),
        geometry(geometry),
        w(w),
        num_terms(num_terms),
        places(places),
        lanes(conv.y_channels),
        groups(pick_groups(lanes, w, kPickVectors)),
        vectors(lanes.line_vectors(w)),
        places_size(pick_places_size<T>(conv, w)) {}

  int64_t out_width() const { return conv.y_channels * w.out_plane(); }

  void run(int64_t example, const Operand<T>* operands, const T* bias, const T* scale, T* out, bool accumulate) const {
    constexpr int L = kLanes<T>;
    const int64_t plane = w.out_plane(), taps = conv.taps(), block_size = conv.x_channels * taps * L;
    const int64_t run = std::max<int64_t>(1, kRun / (taps * std::max(1, num_terms)));
    T* sums = scratch<T>((plane + L) * lanes.slot + L * L, 2);
    for (int64_t b = 0; b < lanes.blocks; ++b) {
      for (int64_t c = 0; c < conv.x_channels; c += run) {
        for (int64_t h = 0; h < w.out[1]; ++h) {
          for (const PickGroup& group : groups) {
            PickJob<T> job{};
            job.places = places + example * places_size + ((b * w.out[1] + h) * vectors + group.vector) * L;
            job.channel = geometry.channel;
            job.line = geometry.line;
            job.columns = conv.kernel[2];
            job.rows = conv.kernel[1];
            job.sums = sums + h * w.out[2] * lanes.slot;
            job.slot = lanes.slot;
            job.windows = group.windows.data();
            job.counts = group.counts.data();
            PickTerm<T> terms[2];
            for (int t = 0; t < num_terms; ++t) {
              terms[t] = {operands[t].x + c * geometry.channel + w.begin[1][h] * geometry.line + group.column,
                          operands[t].a + b * block_size + c * taps * L, std::min(run, conv.x_channels - c)};
            }
            pick_tile_for<T>(group.windows.size())(job, terms, num_terms, c > 0);
          }
        }
      }
      const int64_t o = b * L, at = o * plane;
      turn_positions<T>(sums, lanes.slot, plane, std::min<int64_t>(L, conv.y_channels - o), plane, bias ? bias + o : nullptr,
                        scale ? scale + at : nullptr, out + at, accumulate);
    }
  }

  const Convolution& conv;
  const Geometry<T>& geometry;
  const Windows& w;
  int num_terms;
  const T* places;
  PickLanes<T> lanes;
  std::vector<PickGroup> groups;
  int64_t vectors, places_size;
};

// ---- The gradient by the kernel: an outer product of the cotangents of a vector's lanes with what its lanes read for each tap ------------------

template <class T>
struct PickSums {
  int64_t examples, lines;
  const T* x;
  int64_t x_example, line;
  const int64_t* begin;  // line of x per line of windows
  const PickGroup* groups;
  int64_t num_groups, vectors;
  const T *places, *g;
  int64_t places_example, g_example;
  T* sums;  // [row of the kernel][column][lane], `row` between rows
  int64_t row;
};

// A tile: R rows of the kernel (all of them) by C neighbouring columns, for one channel of x.
template <class T, int R, int C>
__attribute__((noinline)) void pick_sums_tile(const PickSums<T>& job) {
  Vec<T> acc[C][R];
  clear(acc);
  for (int64_t n = 0; n < job.examples; ++n) {
    for (int64_t h = 0; h < job.lines; ++h) {
      for (int64_t i = 0; i < job.num_groups; ++i) {
        const PickGroup& group = job.groups[i];
        const T* from = job.x + n * job.x_example + job.begin[h] * job.line + group.column;
        Vec<T> lines[C][R + 1];
#pragma GCC unroll 8
        for (int k = 0; k < C; ++k)
#pragma GCC unroll 8
          for (int r = 0; r <= R; ++r) lines[k][r] = load(from + r * job.line + k);
        const int64_t at = (h * job.vectors + group.vector) * kLanes<T>;
        const T *places = job.places + n * job.places_example + at, *g = job.g + n * job.g_example + at;
        for (size_t j = 0; j < group.windows.size(); ++j, places += kLanes<T>, g += kLanes<T>) {
          const Places<T> chosen = load_places(places);
          const Vec<T> value = load(g);
#pragma GCC unroll 8
          for (int k = 0; k < C; ++k)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[k][r] += value * __builtin_shuffle(lines[k][r], lines[k][r + 1], chosen);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < C; ++k)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T* sum = job.sums + r * job.row + k * kLanes<T>;
      store(sum, load(sum) + acc[k][r]);
    }
}

template <class T>
using PickSumsFn = void (*)(const PickSums<T>&);

// Columns of a tile: as many as leave room for the lines that they read.
template <int R>
inline constexpr int kPickColumns = R <= 2   ? 4
                                    : R == 3 ? 3
                                    : R <= 5 ? 2
                                             : 1;

// The tile for the first of `columns` columns of `rows` rows: its function, and how many it takes.
template <class T>
PickSumsFn<T> pick_sums_for(int64_t rows, int64_t columns, int64_t& taken) {
  taken = std::min<int64_t>(columns, of_size<kMostPickRows>(rows, []<int R>(Size<R>) { return kPickColumns<R>; }));
  const auto of_rows = of_size<kMostPickRows>(rows, []<int R>(Size<R>) {
    return +[](int64_t num) { return of_size<kPickColumns<R>>(num, []<int C>(Size<C>) { return &pick_sums_tile<T, R, C>; }); };
  });
  return of_rows(taken);
}

template <class T>
void pick_weights(const Context& ctx, const Convolution& conv, const Windows& w, const T* places, int64_t V, int64_t n, const T* x, int64_t prepared,
                  const T* g, int64_t images, T* out, int64_t out_batch, int64_t out_example) {
  constexpr int L = kLanes<T>;
  const Geometry<T> geometry(conv, false);
  const PickLanes<T> lanes(conv.y_channels);
  const auto groups = pick_groups(lanes, w, kPickVectors);
  const int64_t vectors = lanes.line_vectors(w), block_vectors = w.out[1] * vectors * L, places_size = lanes.blocks * block_vectors;
  const int64_t plane = w.out_plane(), width = conv.y_channels * plane, taps = conv.taps(), cols = conv.x_channels * taps;
  const int64_t sums_block = ceil_div(cols, L) * L * L;
  const int64_t example_bytes = (geometry.padded + 2 * places_size) * static_cast<int64_t>(sizeof(T));
  const int threads = 2.0 * V * n * conv.weight_size() * plane < 5e5 ? 1 : ctx.num_threads;
  const int64_t chunk =
      std::clamp<int64_t>(kTurnedBytes / example_bytes, 1, std::min(images, std::max<int64_t>(1, kRunPositions / (w.out[1] * vectors))));
  // A thread takes blocks of images of their own sums, or shares of the images of one block.
  const int64_t shares = std::min<int64_t>(threads, images), parts = n / images * V * shares;
  T* all_sums = shares > 1 ? scratch<T>(parts * lanes.blocks * sums_block, 3) : nullptr;
  const auto share = [&](int64_t part, T* sums) {
    const int64_t v = part / shares % V, block = part / (shares * V), piece = part % shares;
    const int64_t begin = block * images + piece * images / shares, end = block * images + (piece + 1) * images / shares;
    T* line = scratch<T>((plane + L) * lanes.slot + L * L, 0);
    T* lined = scratch<T>(chunk * places_size, 1);  // g as the places lie
    std::fill(sums, sums + lanes.blocks * sums_block, T(0));
    for (int64_t i0 = begin; i0 < end; i0 += chunk) {
      const int64_t count = std::min(chunk, end - i0);
      for (int64_t i = 0; i < count * lanes.blocks; ++i) {
        const int64_t b = i % lanes.blocks, o = b * L;
        turn_channels<T>(std::min<int64_t>(L, conv.y_channels - o), plane, g + (v * n + i0 + i / lanes.blocks) * width + o * plane, line, lanes.slot);
        T* to = lined + i * block_vectors;
        for (int64_t h = 0; h < w.out[1]; ++h) {
          for (const PickGroup& group : groups) {
            for (size_t j = 0; j < group.windows.size(); ++j, to += L) {
              store(to, load_lanes(line + (h * w.out[2] + group.windows[j]) * lanes.slot, group.counts[j] * lanes.slot));
            }
          }
        }
      }
      for (int64_t b = 0; b < lanes.blocks; ++b) {
        for (int64_t c = 0; c < conv.x_channels; ++c) {
          for (int64_t k = 0; k < conv.kernel[2];) {
            PickSums<T> job{};
            job.examples = count;
            job.lines = w.out[1];
            job.x = x + i0 * prepared + c * geometry.channel + k;
            job.x_example = prepared;
            job.line = geometry.line;
            job.begin = w.begin[1];
            job.groups = groups.data();
            job.num_groups = static_cast<int64_t>(groups.size());
            job.vectors = vectors;
            job.places = places + i0 * places_size + b * block_vectors;
            job.places_example = places_size;
            job.g = lined + b * block_vectors;
            job.g_example = places_size;
            job.sums = sums + b * sums_block + (c * taps + k) * L;
            job.row = conv.kernel[2] * L;
            int64_t taken = 0;
            pick_sums_for<T>(conv.kernel[1], conv.kernel[2] - k, taken)(job);
            k += taken;
          }
        }
      }
    }
  };
  const auto add = [&](int64_t part, T* sums) {
    const int64_t v = part / shares % V, block = part / (shares * V);
    for (int64_t b = 0; b < lanes.blocks; ++b) {
      T* of_block = sums + b * sums_block;
      for (int64_t i = 0; i < cols && lanes.windows > 1; ++i) {  // the windows of a vector
        for (int64_t lane = lanes.slot; lane < L; ++lane) of_block[i * L + lane % lanes.slot] += of_block[i * L + lane];
      }
      const int64_t o = b * L;
      add_turned<T>(std::min<int64_t>(L, conv.y_channels - o), cols, of_block, out + v * out_batch + block * out_example + o * cols);
    }
  };
  if (shares == 1) {
    return parallel_for(threads, parts, [&](int64_t part) {
      T* sums = scratch<T>(lanes.blocks * sums_block, 2);
      share(part, sums);
      add(part, sums);
    });
  }
  parallel_for(threads, parts, [&](int64_t part) { share(part, all_sums + part * lanes.blocks * sums_block); });
  for (int64_t part = 0; part < parts; ++part) add(part, all_sums + part * lanes.blocks * sums_block);
}

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
