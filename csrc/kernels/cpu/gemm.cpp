// B is packed into panels of kPanel = 2 vectors, [K][kPanel] each, zero padded. A stays where it is: the register tile broadcasts kRows elements of
// it per k, and 12 x 2 vectors (AVX-512) need 24 cycles of FMA for 14 loads, so A's rows may come from L1 or L2 without being felt, unless their
// stride maps them all to one cache set; then the rows of a block are copied side by side first.
// Loop order: block of rows of A (kept in L2) > panel of B (K * 128 bytes, from L2) > register tiles. No blocking along K is needed for speed;
// runs of kRun steps, which may take in the end of the first term and the beginning of the second, bound the rounding error. A tile asks for its part
// of C before it begins: that is often in memory, or in the last cache, and 12 rows of it would be waited for one after another.
//
// At Precision::bfloat16 both operands are rounded as they are copied, B panel by panel before the product and A block by block, which costs an
// element about a hundredth of what multiplying it does; what is packed ahead stays in full precision, so one packing serves every precision.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cpu/bfloat16.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tiles.h"
#include "kernels/cpu/transpose.h"
#include "kernels/gemm.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
inline constexpr int kPanel = 2 * kLanes<T>;  // columns of a packed panel

// Rows of the register tile: as many as the registers hold (32 with AVX-512, else 16), in groups of three row pointers.
inline constexpr int kRows = INFL_VECTOR_BYTES == 64 ? 12 : 6;

inline constexpr int64_t kRun = 512;               // steps summed in registers before they are added to C
inline constexpr int64_t kBlockBytes = 384 << 10;  // rows of A handled together

// What a product multiplies.
//   plain    operands as they are, one term a step
//   rounded  float rounded to bfloat16, one term a step
//   pairs    the same numbers as `rounded`, two of neighbouring k in the bits of a float, k the lower half: two terms a step
enum class Form { plain, rounded, pairs };

template <Form form>
int64_t steps_of(int64_t K) {
  return form == Form::pairs ? (K + 1) / 2 : K;
}

// Buffers that outlive a call, one set per thread: 0 and 1 hold copies of A's rows for each term, 2 holds B packed on the fly, 3 a panel of B before
// it is rounded.
template <class T>
T* scratch(int64_t size, int which) {
  static thread_local std::vector<T> buffers[4];
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

// ---- Rounded operands --------------------------------------------------------------------------------------------------------------------

// One panel of B, [K, n] at b, in a form other than plain.
template <Form form>
void round_panel(int64_t K, int64_t n, const float* b, int64_t b_row, int64_t b_col, float* out) {
  constexpr int W = kPanel<float>;
  if (form == Form::rounded) {
    pack_panel<float>(K, n, b, b_row, b_col, out);
    for (int64_t i = 0; i < K * W; i += kLanes<float>) store(out + i, rounded(load(out + i)));
    return;
  }
  if (b_col != 1 || n < W) {
    float* whole = scratch<float>(K * W, 3);
    pack_panel<float>(K, n, b, b_row, b_col, whole);
    b = whole;
    b_row = W;
  }
  for (int64_t k = 0; k < K; k += 2) interleave(W, b + k * b_row, k + 1 < K ? b + (k + 1) * b_row : nullptr, out + k / 2 * W);
}

// Rows [0, M) of A in a form other than plain: a copy that keeps the direction in which A is contiguous. Sets the strides between rows and steps.
template <Form form>
const float* round_block(int64_t M, const GemmTerm<float>& term, const float* a, int which, int64_t& row, int64_t& step) {
  const int64_t K = term.K, steps = steps_of<form>(K);
  const bool rows_first = term.a_col == 1 || term.a_row != 1;
  const int64_t lines = rows_first ? M : steps, length = rows_first ? steps : M;
  const int64_t ld = ((length + 15) / 16 | 1) * 16;  // an odd number of cache lines: no two rows compete for the same few places in the cache
  float* copy = scratch<float>(lines * ld, which);
  row = rows_first ? ld : 1;
  step = rows_first ? 1 : ld;
  for (int64_t i = 0; i < lines; ++i) {
    float* to = copy + i * ld;
    if (form == Form::rounded) {
      const float* from = a + i * (rows_first ? term.a_row : term.a_col);
      const int64_t stride = rows_first ? term.a_col : term.a_row;
      int64_t j = 0;
      for (; stride == 1 && j + kLanes<float> <= length; j += kLanes<float>) store(to + j, rounded(load(from + j)));
      for (; j < length; ++j) to[j] = rounded(from[j * stride]);
    } else if (!rows_first) {
      const float* from = a + 2 * i * term.a_col;
      interleave(M, from, 2 * i + 1 < K ? from + term.a_col : nullptr, to);
    } else if (term.a_col == 1) {
      pair_neighbours(K, a + i * term.a_row, to);
    } else {
      const float* from = a + i * term.a_row;
      for (int64_t k = 0; k < K; k += 2) to[k / 2] = pair_of(from[k * term.a_col], k + 1 < K ? from[(k + 1) * term.a_col] : 0.0f);
    }
  }
  return copy;
}

// ---- Register tiles ----------------------------------------------------------------------------------------------------------------------

// Some steps of one term.
template <class T>
struct Steps {
  int64_t count;
  const T* a;
  int64_t a_row, a_col;
  const T* b;  // packed
};

// What a register tile does with its sums once they are complete.
template <class T>
struct Epilogue {
  const T* bias;
  const T* scale;
  int64_t scale_ld;
};

// Where the tile's results go, and their factors, are asked for before the sums begin, which hide the way from memory.
template <int R, int NV, class T>
__attribute__((always_inline)) inline void prefetch_rows(const T* first, int64_t stride) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const T* row = first + r * stride;
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) __builtin_prefetch(row + j * kLanes<T>);
    __builtin_prefetch(row + NV * kLanes<T> - 1);  // rows may begin within a cache line
  }
}

// R rows by NV vectors: acc = the sum of A B over one run of steps, of one term or of both; then C = acc (first run) or C + acc, and the epilogue
// after the last run. `columns` < NV * lanes only in the last panel.
template <class T, int R, int NV, bool pairs>
__attribute__((always_inline)) inline void tile(const Steps<T>* run, int num_terms, T* c, int64_t ldc, bool add, bool last,
                                                const Epilogue<T>& epilogue, int64_t columns) {
  constexpr int L = kLanes<T>;
  constexpr int W = kPanel<T>;
  constexpr int G = (R + 2) / 3;  // row pointers, three rows each: base, +stride, +2 stride are all one addressing mode
  prefetch_rows<R, NV>(c, ldc);
  if (last && epilogue.scale) prefetch_rows<R, NV>(epilogue.scale, epilogue.scale_ld);
  Vec<T> acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) acc[r][j] = Vec<T>{};
  for (int t = 0; t < num_terms; ++t) {
    const int64_t a_row = run[t].a_row, a_col = run[t].a_col, count = run[t].count;
    const T* b = run[t].b;
    const T* rows[G];
    for (int g = 0; g < G; ++g) rows[g] = run[t].a + 3 * g * a_row;
    for (int64_t k = 0; k < count; ++k) {
      Vec<T> bv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) bv[j] = load(b + j * L);
      b += W;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const T value = rows[r / 3][(r % 3) * a_row];
        if constexpr (pairs) {
#if INFL_VECTOR_BYTES == 64
          const __m512 both = _mm512_set1_ps(value);
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j)
            acc[r][j] = reinterpret_cast<Vec<T>>(add_pairs(reinterpret_cast<__m512>(acc[r][j]), both, reinterpret_cast<__m512>(bv[j])));
#endif
        } else {
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) acc[r][j] += bv[j] * value;
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) rows[g] += a_col;
    }
  }
  // Sums stay in their registers: one pass over them for each part of the epilogue.
  const auto each = [&](const auto& body) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) body(acc[r][j], r, j * L);
  };
  const auto finish = [&](const auto& load_at, const auto& store_at) {
    if (add) each([&](Vec<T>& sum, int r, int at) { sum += load_at(c + r * ldc, at); });
    if (last && epilogue.bias) each([&](Vec<T>& sum, int, int at) { sum += load_at(epilogue.bias, at); });
    if (last && epilogue.scale) each([&](Vec<T>& sum, int r, int at) { sum *= load_at(epilogue.scale + r * epilogue.scale_ld, at); });
    each([&](Vec<T>& sum, int r, int at) { store_at(c + r * ldc, at, sum); });
  };
  if (columns == NV * L) {
    finish([](const T* row, int at) { return load(row + at); }, [](T* row, int at, Vec<T> sum) { store(row + at, sum); });
  } else {
    const auto lanes = [columns](int at) { return std::clamp<int64_t>(columns - at, 0, L); };
    finish([&](const T* row, int at) { return load_lanes(row + at, lanes(at)); },
           [&](T* row, int at, Vec<T> sum) { store_lanes(row + at, sum, lanes(at)); });
  }
}

template <class T>
using TileFn = void (*)(const Steps<T>*, int, T*, int64_t, bool, bool, const Epilogue<T>&, int64_t);

template <class T, int R, int NV, bool pairs>
__attribute__((noinline)) void tile_fn(const Steps<T>* run, int num_terms, T* c, int64_t ldc, bool add, bool last, const Epilogue<T>& epilogue,
                                       int64_t columns) {
  tile<T, R, NV, pairs>(run, num_terms, c, ldc, add, last, epilogue, columns);
}

template <class T, int NV, bool pairs, int... R>
TileFn<T> tile_for(int rows, std::integer_sequence<int, R...>) {
  static constexpr TileFn<T> table[] = {tile_fn<T, R + 1, NV, pairs>...};
  return table[rows - 1];
}

template <class T, int NV, bool pairs>
TileFn<T> tile_for(int rows) {
  return tile_for<T, NV, pairs>(rows, std::make_integer_sequence<int, kRows>{});
}

// Rows [m0, m1) of C[v], panels [p0, p1).
template <class T, Form form>
void gemm_block(const Gemm<T>& g, const GemmTerm<T>* terms, int num_terms, int64_t v, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  constexpr int W = kPanel<T>;
  constexpr bool pairs = form == Form::pairs;
  GemmTerm<T> local[2];
  const T* a_block[2];
  for (int t = 0; t < num_terms; ++t) {
    local[t] = terms[t];
    a_block[t] = terms[t].a + v * terms[t].a_batch + m0 * terms[t].a_row;
    if constexpr (form != Form::plain) {
      if (terms[t].K > 0) a_block[t] = round_block<form>(m1 - m0, terms[t], a_block[t], t, local[t].a_row, local[t].a_col);
      continue;
    }
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
      const TileFn<T> fn = narrow ? tile_for<T, 1, pairs>(rows) : tile_for<T, 2, pairs>(rows);
      T* c = g.c + v * g.c_batch + m * g.ldc + p * W;
      if (g.scale) epilogue.scale = g.scale + m * g.scale_ld + p * W;
      bool add = g.accumulate;
      Steps<T> run[2];
      int in_run = 0;
      int64_t left = kRun;
      for (int t = 0; t < num_terms; ++t) {
        const GemmTerm<T>& term = local[t];
        const int64_t steps = steps_of<form>(term.K);
        const T* a = a_block[t] + (m - m0) * term.a_row;
        const T* b = term.packed + v * term.packed_batch + p * W * steps;
        int64_t k = 0;
        do {  // at least once: an empty sum still has its beta and epilogue
          const int64_t count = std::min(left, steps - k);
          run[in_run++] = {count, a + k * term.a_col, term.a_row, term.a_col, b + k * W};
          k += count;
          left -= count;
          const bool last = t == num_terms - 1 && k == steps;
          if (last || left == 0) {
            fn(run, in_run, c, g.ldc, add, last, epilogue, columns);
            add = true;
            in_run = 0;
            left = kRun;
          }
        } while (k < steps);
      }
    }
  }
}

// ---- Few columns: lanes run along K, not along columns that are not there -----------------------------------------------------------------------

inline constexpr int64_t kFewColumns = 4;

// x as the product takes it.
template <bool rounds, class X>
inline __attribute__((always_inline)) X taken(X x) {
  if constexpr (rounds) {
    return rounded(x);
  } else {
    return x;
  }
}

// What the lanes of R by C sums hold, added up.
template <class T, int R, int C>
inline __attribute__((always_inline)) void add_lanes(Vec<T> (&lanes)[R][C], T (&sums)[R][C]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Vec<T> v = lanes[r][c];
      using Mask = decltype(v < v);
#pragma GCC unroll 4
      for (int half = L / 2; half > 0; half /= 2) {
        Mask other;
        for (int i = 0; i < L; ++i) other[i] = i ^ half;
        v += __builtin_shuffle(v, other);
      }
      sums[r][c] += v[0];
    }
  }
}

// R rows of C[v] from row m on; b: the columns of each term, for each v, contiguous as A's rows are; a is rounded here, b was. A run of steps takes
// in the end of the first term and the beginning of the second, so that lanes are added up once.
template <class T, int R, int C, bool rounds>
void few_columns_rows(const Gemm<T>& g, const GemmTerm<T>* terms, int num_terms, int64_t v, int64_t m) {
  constexpr int L = kLanes<T>;
  T sums[R][C] = {};
  Vec<T> acc[R][C];
  clear(acc);
  int64_t left = kRun;
  for (int t = 0; t < num_terms; ++t) {
    const GemmTerm<T>& term = terms[t];
    const T* a = term.a + v * term.a_batch + m * term.a_row;
    const T* b = term.b + v * term.b_batch;
    const int64_t whole = term.K / L * L;
    for (int64_t k = 0; k < whole;) {
      const int64_t end = std::min(whole, k + left * L);
      left -= (end - k) / L;
      for (; k < end; k += L) {
        Vec<T> bv[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) bv[c] = load(b + c * term.b_col + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const Vec<T> av = taken<rounds>(load(a + r * term.a_row + k));
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) acc[r][c] += av * bv[c];
        }
      }
      if (left > 0) continue;
      add_lanes<T, R, C>(acc, sums);
      clear(acc);
      left = kRun;
    }
    for (int64_t k = whole; k < term.K; ++k) {
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sums[r][c] += taken<rounds>(a[r * term.a_row + k]) * b[c * term.b_col + k];
      }
    }
  }
  add_lanes<T, R, C>(acc, sums);
  for (int r = 0; r < R; ++r) {
    T* out = g.c + v * g.c_batch + (m + r) * g.ldc;
    for (int c = 0; c < C; ++c) {
      T value = sums[r][c];
      if (g.accumulate) value += out[c];
      if (g.bias) value += g.bias[v * g.bias_batch + c];
      if (g.scale) value *= g.scale[(m + r) * g.scale_ld + c];
      out[c] = value;
    }
  }
}

template <class T, int C, bool rounds>
void few_columns(int threads, const Gemm<T>& g, const GemmTerm<T>* given, int num_terms) {
  constexpr int R = 4;
  constexpr int64_t kRows = 64;
  GemmTerm<T> terms[2];
  const auto in_place = [](const GemmTerm<T>& term) { return !rounds && !term.packed && term.b_row == 1; };
  int64_t size = 0;
  for (int t = 0; t < num_terms; ++t) size += in_place(given[t]) ? 0 : g.V * C * given[t].K;
  T* columns = scratch<T>(size, 2);
  for (int t = 0; t < num_terms; ++t) {
    GemmTerm<T>& term = terms[t] = given[t];
    if (in_place(term)) continue;
    const int64_t batch = term.packed ? term.packed_batch : term.b_batch, num = batch ? g.V : 1;
    const int64_t row = term.packed ? kPanel<T> : term.b_row, column = term.packed ? 1 : term.b_col;
    const T* from = term.packed ? term.packed : term.b;
    for (int64_t v = 0; v < num; ++v) {
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t k = 0; k < term.K; ++k) columns[(v * C + c) * term.K + k] = taken<rounds>(from[v * batch + k * row + c * column]);
      }
    }
    term.b = columns;
    term.b_batch = batch ? C * term.K : 0;
    term.b_col = term.K;
    columns += num * C * term.K;
  }
  const int64_t blocks = (g.M + kRows - 1) / kRows;
  parallel_for<Shares::on_demand>(threads, g.V * blocks, [&](int64_t i) {
    const int64_t v = i / blocks, end = std::min(g.M, (i % blocks + 1) * kRows);
    int64_t m = i % blocks * kRows;
    for (; m + R <= end; m += R) few_columns_rows<T, R, C, rounds>(g, terms, num_terms, v, m);
    for (; m < end; ++m) few_columns_rows<T, 1, C, rounds>(g, terms, num_terms, v, m);
  });
}

// Whether dot products along rows take it, done if so.
template <class T, bool rounds>
bool takes_few_columns(int threads, const Gemm<T>& g, const GemmTerm<T>* terms, int num_terms) {
  if (g.N > kFewColumns || g.M < 2) return false;
  for (int t = 0; t < num_terms; ++t) {
    if (terms[t].a_col != 1 || terms[t].K < 2 * kLanes<T>) return false;
  }
  switch (g.N) {
    case 1:
      few_columns<T, 1, rounds>(threads, g, terms, num_terms);
      return true;
    case 2:
      few_columns<T, 2, rounds>(threads, g, terms, num_terms);
      return true;
    case 3:
      few_columns<T, 3, rounds>(threads, g, terms, num_terms);
      return true;
    default:
      few_columns<T, 4, rounds>(threads, g, terms, num_terms);
      return true;
  }
}

// ---- The product ---------------------------------------------------------------------------------------------------------------------------

// B of one term, packed in a form other than plain: all panels, from what was packed ahead or from where it lies.
template <Form form>
void round_matrices(int threads, int64_t num, int64_t N, const GemmTerm<float>& term, float* packed) {
  constexpr int W = kPanel<float>;
  const int64_t panels = (N + W - 1) / W, size = panels * W * steps_of<form>(term.K);
  parallel_for(threads, num * panels, [&](int64_t i) {
    const int64_t v = i / panels, p = i % panels;
    float* to = packed + v * size + p * W * steps_of<form>(term.K);
    if (term.packed) {
      round_panel<form>(term.K, W, term.packed + v * term.packed_batch + p * W * term.K, W, 1, to);
    } else {
      round_panel<form>(term.K, std::min<int64_t>(W, N - p * W), term.b + v * term.b_batch + p * W * term.b_col, term.b_row, term.b_col, to);
    }
  });
}

template <class T, Form form>
void multiply(const Context& ctx, const Gemm<T>& g) {
  constexpr int W = kPanel<T>;
  GemmTerm<T> terms[2];
  int num_terms = 0;
  int64_t longest = 1, unpacked = 0;
  const auto matrices = [&](const GemmTerm<T>& term) { return (term.packed ? term.packed_batch : term.b_batch) ? g.V : 1; };
  const auto is_ready = [](const GemmTerm<T>& term) { return form == Form::plain && term.packed != nullptr; };
  for (const auto& term : g.terms) {
    if (term.K > 0) {
      terms[num_terms++] = term;
      longest = std::max(longest, steps_of<form>(term.K));
      if (!is_ready(term)) unpacked += matrices(term) * gemm_packed_size<T>(steps_of<form>(term.K), g.N);
    }
  }
  if (g.M == 0 || g.N == 0 || g.V == 0) return;
  if (num_terms == 0) num_terms = 1;  // terms[0] is empty
  const int64_t panels = (g.N + W - 1) / W;
  int64_t block = std::max<int64_t>(1, kBlockBytes / (longest * static_cast<int64_t>(sizeof(T))) / kRows) * kRows;
  block = std::min<int64_t>(block, 16 * kRows);
  const double flops = 2.0 * g.V * g.M * g.N * longest * num_terms;
  const int threads = flops < 5e5 ? 1 : ctx.num_threads;
  if (takes_few_columns<T, form != Form::plain>(threads, g, terms, num_terms)) return;
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
    GemmTerm<T>& term = terms[t];
    if (term.K == 0 || is_ready(term)) continue;
    const int64_t num = matrices(term), size = gemm_packed_size<T>(steps_of<form>(term.K), g.N);
    if constexpr (form == Form::plain) {
      gemm_pack<T>(Context{.num_threads = threads}, num, term.K, g.N, term.b, term.b_batch, term.b_row, term.b_col, packed);
    } else {
      round_matrices<form>(threads, num, g.N, term, packed);
    }
    term.packed = packed;
    term.packed_batch = num > 1 ? size : 0;
    packed += num * size;
  }
  auto item = [&](int64_t i) {
    const int64_t q = i % panel_groups, m = i / panel_groups % row_blocks, v = i / panel_groups / row_blocks;
    gemm_block<T, form>(g, terms, num_terms, v, m * block, std::min(g.M, (m + 1) * block), q * group, std::min(panels, (q + 1) * group));
  };
  parallel_for<Shares::on_demand>(threads, work, item);
}

template <class T>
void gemm(const Context& ctx, const Gemm<T>& g) {
  if constexpr (std::is_same_v<T, float>) {
    if (ctx.precision == Precision::bfloat16) {
      if constexpr (INFL_VECTOR_BYTES == 64) {
        if (multiplies_bfloat16()) return multiply<float, Form::pairs>(ctx, g);
      }
      return multiply<float, Form::rounded>(ctx, g);
    }
  }
  multiply<T, Form::plain>(ctx, g);
}

INFL_REGISTER_CPU(gemm_pack_stub, gemm_pack)
INFL_REGISTER_CPU(gemm_stub, gemm)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
