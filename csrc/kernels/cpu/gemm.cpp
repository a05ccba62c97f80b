// B is packed into panels of kPanel = 2 vectors, [K][kPanel] each, zero padded. A stays where it is: the register tile broadcasts kRows elements of
// it per k, and 12 x 2 vectors (AVX-512) need 24 cycles of FMA for 14 loads, so A's rows may come from L1 or L2 without being felt, unless their
// stride maps them all to one cache set; then the rows of a block are copied side by side first.
// Loop order: block of rows of A (kept in L2) > panel of B (K * 128 bytes, from L2) > register tiles. No blocking along K is needed for speed;
// runs of kRun terms bound the rounding error.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/transpose.h"
#include "kernels/gemm.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
inline constexpr int kPanel = 2 * kLanes<T>;  // columns of a packed panel

// Rows of the register tile: as many as the registers hold (32 with AVX-512, else 16), in groups of three row pointers.
inline constexpr int kRows = INFL_VECTOR_BYTES == 64 ? 12 : 6;

inline constexpr int64_t kRun = 512;               // terms summed in registers before they are added to C
inline constexpr int64_t kBlockBytes = 384 << 10;  // rows of A handled together

// Buffers that outlive a call, one set per thread: 0 and 1 hold copies of A's rows for each term, 2 holds B packed on the fly.
template <class T>
T* scratch(int64_t size, int which) {
  static thread_local std::vector<T> buffers[3];
  auto& buffer = buffers[which];
  if (static_cast<int64_t>(buffer.size()) < size + 64 / static_cast<int64_t>(sizeof(T))) {
    buffer.resize(size + 64 / sizeof(T));
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (((address + 63) & ~uintptr_t{63}) - address) / sizeof(T);
}

// out[j][i] = in[i][j] for a square of one vector's lanes.
template <class T>
inline __attribute__((always_inline)) void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  Vec<T> rows[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) rows[i] = load(in + i * in_stride);
  transpose_square<T>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(out + i * out_stride, rows[i]);
}

template <class T>
void pack_panel(int64_t K, int64_t n, const T* b, int64_t b_row, int64_t b_col, T* out) {
  constexpr int W = kPanel<T>;
  if (b_col == 1) {
    for (int64_t k = 0; k < K; ++k) {
      const T* row = b + k * b_row;
      T* to = out + k * W;
      if (n == W) {
        store(to, load(row));
        store(to + kLanes<T>, load(row + kLanes<T>));
      } else {
        for (int64_t j = 0; j < n; ++j) to[j] = row[j];
        for (int64_t j = n; j < W; ++j) to[j] = T(0);
      }
    }
    return;
  }
  // Transposed. Whole columns of the panel go through registers, square by square; what is left over in blocks of 16 along k, so that every cache
  // line read is used up while it is in L1.
  constexpr int L = kLanes<T>;
  const int64_t squares = b_row == 1 && n == W ? K / L : 0;
  for (int64_t k = 0; k < squares * L; k += L) {
    for (int half = 0; half < 2; ++half) transpose_square(b + half * L * b_col + k, b_col, out + k * W + half * L, W);
  }
  for (int64_t k0 = squares * L; k0 < K; k0 += 16) {
    const int64_t k1 = std::min<int64_t>(K, k0 + 16);
    for (int64_t j = 0; j < n; ++j) {
      const T* column = b + j * b_col;
      for (int64_t k = k0; k < k1; ++k) out[k * W + j] = column[k * b_row];
    }
    for (int64_t k = k0; k < k1; ++k) {
      for (int64_t j = n; j < W; ++j) out[k * W + j] = T(0);
    }
  }
}

template <class T>
void gemm_pack(const Context& ctx, int64_t num, int64_t K, int64_t N, const T* b, int64_t b_batch, int64_t b_row, int64_t b_col, T* packed) {
  constexpr int W = kPanel<T>;
  const int64_t panels = (N + W - 1) / W;
  const int64_t size = gemm_packed_size<T>(K, N);
  const int64_t work = num * panels;
  const auto item = [&](int64_t i) {
    const int64_t v = i / panels, p = i % panels;
    pack_panel<T>(K, std::min<int64_t>(W, N - p * W), b + v * b_batch + p * W * b_col, b_row, b_col, packed + v * size + p * W * K);
  };
  parallel_for(threads_for(ctx, num * K * N), work, item);
}

// What a register tile does with its sums once they are complete.
template <class T>
struct Epilogue {
  const T* bias;
  const T* scale;
  int64_t scale_ld;
};

// R rows by NV vectors: acc = A B over K terms; then C = acc (first run) or C + acc, and the epilogue after the last run.
// `columns` < NV * lanes only in the last panel, which goes through a small buffer.
template <class T, int R, int NV>
__attribute__((always_inline)) inline void tile(int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c, int64_t ldc, bool add,
                                                bool last, const Epilogue<T>& epilogue, int64_t columns) {
  constexpr int L = kLanes<T>;
  constexpr int W = kPanel<T>;
  constexpr int G = (R + 2) / 3;  // row pointers, three rows each: base, +stride, +2 stride are all one addressing mode
  Vec<T> acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<T>{};
  const T* rows[G];
  for (int g = 0; g < G; ++g) rows[g] = a + 3 * g * a_row;
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> bv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * L);
    b += W;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const T value = rows[r / 3][(r % 3) * a_row];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[r][j] += bv[j] * value;
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) rows[g] += a_col;
  }
  const bool whole = columns == NV * L;
  T buffer[NV * L];
  for (int r = 0; r < R; ++r) {
    T* out = c + r * ldc;
    for (int j = 0; j < NV; ++j) {
      if (whole) {
        Vec<T> value = acc[r][j];
        if (add) value += load(out + j * L);
        if (last) {
          if (epilogue.bias) value += load(epilogue.bias + j * L);
          if (epilogue.scale) value *= load(epilogue.scale + r * epilogue.scale_ld + j * L);
        }
        store(out + j * L, value);
      } else {
        store(buffer + j * L, acc[r][j]);
      }
    }
    if (!whole) {
      for (int64_t j = 0; j < columns; ++j) {
        T value = buffer[j];
        if (add) value += out[j];
        if (last) {
          if (epilogue.bias) value += epilogue.bias[j];
          if (epilogue.scale) value *= epilogue.scale[r * epilogue.scale_ld + j];
        }
        out[j] = value;
      }
    }
  }
}

template <class T>
using TileFn = void (*)(int64_t, const T*, int64_t, int64_t, const T*, T*, int64_t, bool, bool, const Epilogue<T>&, int64_t);

template <class T, int R, int NV>
__attribute__((noinline)) void tile_fn(int64_t K, const T* a, int64_t a_row, int64_t a_col, const T* b, T* c, int64_t ldc, bool add, bool last,
                                       const Epilogue<T>& epilogue, int64_t columns) {
  tile<T, R, NV>(K, a, a_row, a_col, b, c, ldc, add, last, epilogue, columns);
}

template <class T, int NV>
TileFn<T> tile_for(int rows) {
  static constexpr TileFn<T> table[13] = {
      nullptr,           tile_fn<T, 1, NV>, tile_fn<T, 2, NV>, tile_fn<T, 3, NV>,  tile_fn<T, 4, NV>,  tile_fn<T, 5, NV>, tile_fn<T, 6, NV>,
#if INFL_VECTOR_BYTES == 64
      tile_fn<T, 7, NV>, tile_fn<T, 8, NV>, tile_fn<T, 9, NV>, tile_fn<T, 10, NV>, tile_fn<T, 11, NV>, tile_fn<T, 12, NV>
#endif
  };
  return table[rows];
}

// Rows [m0, m1) of C[v], panels [p0, p1).
template <class T>
void gemm_block(const Gemm<T>& g, const GemmTerm<T>* terms, int num_terms, int64_t v, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  constexpr int W = kPanel<T>;
  GemmTerm<T> local[2];
  const T* a_block[2];
  for (int t = 0; t < num_terms; ++t) {
    local[t] = terms[t];
    a_block[t] = terms[t].a + v * terms[t].a_batch + m0 * terms[t].a_row;
    // Lines 2 KiB apart fall into two cache sets and push each other out: copy the block side by side, an odd number of lines per row.
    const int64_t stride = terms[t].a_col == 1 ? terms[t].a_row : terms[t].a_col;
    if (stride * static_cast<int64_t>(sizeof(T)) % 2048 != 0 || terms[t].K <= 16 || p1 - p0 < 2) continue;
    const bool rows_first = terms[t].a_col == 1;
    const int64_t lines = rows_first ? m1 - m0 : terms[t].K, length = rows_first ? terms[t].K : m1 - m0;
    const int64_t ld = length + 16;
    T* copy = scratch<T>(lines * ld, t);
    for (int64_t i = 0; i < lines; ++i) std::memcpy(copy + i * ld, a_block[t] + i * stride, length * sizeof(T));
    a_block[t] = copy;
    (rows_first ? local[t].a_row : local[t].a_col) = ld;
  }
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t columns = std::min<int64_t>(W, g.N - p * W);
    const bool narrow = columns <= kLanes<T>;
    Epilogue<T> epilogue{g.bias ? g.bias + v * g.bias_batch + p * W : nullptr, nullptr, g.scale_ld};
    for (int64_t m = m0; m < m1; m += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, m1 - m));
      const TileFn<T> fn = narrow ? tile_for<T, 1>(rows) : tile_for<T, 2>(rows);
      T* c = g.c + v * g.c_batch + m * g.ldc + p * W;
      if (g.scale) epilogue.scale = g.scale + m * g.scale_ld + p * W;
      bool add = g.accumulate;
      for (int t = 0; t < num_terms; ++t) {
        const GemmTerm<T>& term = local[t];
        const T* a = a_block[t] + (m - m0) * term.a_row;
        const T* b = term.packed + v * term.packed_batch + p * W * term.K;
        int64_t k = 0;
        do {  // at least once: an empty sum still has its beta and epilogue
          const int64_t run = std::min(kRun, term.K - k);
          const bool last = t == num_terms - 1 && k + run == term.K;
          fn(run, a + k * term.a_col, term.a_row, term.a_col, b + k * W, c, g.ldc, add, last, epilogue, columns);
          add = true;
          k += run;
        } while (k < term.K);
      }
    }
  }
}

template <class T>
void gemm(const Context& ctx, const Gemm<T>& g) {
  constexpr int W = kPanel<T>;
  GemmTerm<T> terms[2];
  int num_terms = 0;
  int64_t longest = 1, unpacked = 0;
  for (const auto& term : g.terms) {
    if (term.K > 0) {
      terms[num_terms++] = term;
      longest = std::max(longest, term.K);
      if (term.packed == nullptr) unpacked += (term.b_batch ? g.V : 1) * gemm_packed_size<T>(term.K, g.N);
    }
  }
  if (g.M == 0 || g.N == 0 || g.V == 0) return;
  if (num_terms == 0) num_terms = 1;  // terms[0] is empty
  const int64_t panels = (g.N + W - 1) / W;
  int64_t block = std::max<int64_t>(1, kBlockBytes / (longest * static_cast<int64_t>(sizeof(T))) / kRows) * kRows;
  block = std::min<int64_t>(block, 16 * kRows);
  const double flops = 2.0 * g.V * g.M * g.N * longest * num_terms;
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  // With several threads, split rows first, then panels, until there is work for everyone.
  if (threads > 1) block = std::min<int64_t>(block, std::max<int64_t>(2, (g.M / (2 * threads) + kRows - 1) / kRows) * kRows);
  const int64_t row_blocks = (g.M + block - 1) / block;
  int64_t panel_groups = 1;
  if (threads > 1 && g.V * row_blocks < 3 * threads)
    panel_groups = std::min<int64_t>(panels, (3 * threads + g.V * row_blocks - 1) / (g.V * row_blocks));
  const int64_t group = (panels + panel_groups - 1) / panel_groups;
  panel_groups = (panels + group - 1) / group;
  const int64_t work = g.V * row_blocks * panel_groups;

  T* packed = unpacked > 0 ? scratch<T>(unpacked, 2) : nullptr;
  for (int t = 0; t < num_terms; ++t) {
    if (terms[t].K == 0 || terms[t].packed) continue;
    const int64_t num = terms[t].b_batch ? g.V : 1;
    const int64_t size = gemm_packed_size<T>(terms[t].K, g.N);
    gemm_pack<T>(Context{.num_threads = threads}, num, terms[t].K, g.N, terms[t].b, terms[t].b_batch, terms[t].b_row, terms[t].b_col, packed);
    terms[t].packed = packed;
    terms[t].packed_batch = terms[t].b_batch ? size : 0;
    packed += num * size;
  }
  auto item = [&](int64_t i) {
    const int64_t q = i % panel_groups, m = i / panel_groups % row_blocks, v = i / panel_groups / row_blocks;
    gemm_block<T>(g, terms, num_terms, v, m * block, std::min(g.M, (m + 1) * block), q * group, std::min(panels, (q + 1) * group));
  };
  parallel_for<Shares::on_demand>(threads, work, item);
}

INFL_REGISTER_CPU(gemm_pack_stub, gemm_pack)
INFL_REGISTER_CPU(gemm_stub, gemm)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
