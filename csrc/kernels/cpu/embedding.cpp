// Bandwidth-bound: whole rows are read and written. Where several positions may meet in one row of the table, threads own columns of it.
#include "kernels/embedding.h"

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
void row_gather(const Context& ctx, int64_t V, int64_t positions, int64_t cols, const T* index, int64_t skip, const T* table, int64_t table_ld,
                T* y) {
  const int threads = threads_for(ctx, V * positions * cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < V * positions; ++i) {
    const int64_t v = i / positions, row = static_cast<int64_t>(index[i % positions]);
    const T* from = table + v * table_ld + row * cols;
    T* to = y + i * cols;
    if (row == skip) {
      std::memset(to, 0, cols * sizeof(T));
    } else {
      std::memcpy(to, from, cols * sizeof(T));
    }
  }
}

template <class T>
void row_scatter(const Context& ctx, int64_t num, int64_t positions, int64_t cols, const T* index, int64_t index_ld, int64_t skip, const T* g,
                 T* table, int64_t table_ld) {
  const int threads = threads_for(ctx, num * positions * cols);
  // As many strips of columns as it takes to keep all threads busy, of whole cache lines.
  const int64_t wanted = num >= threads ? 1 : (threads + num - 1) / num;
  const int64_t strip = ((cols + wanted - 1) / wanted + 15) / 16 * 16;
  const int64_t strips = (cols + strip - 1) / strip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < num * strips; ++i) {
    const int64_t b = i / strips, begin = i % strips * strip, count = std::min(strip, cols - begin);
    const T* from = g + b * positions * cols + begin;
    T* to = table + b * table_ld + begin;
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t row = static_cast<int64_t>(index[b * index_ld + p]);
      if (row == skip) continue;
      const T* x = from + p * cols;
      T* line = to + row * cols;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) line[j] += x[j];
    }
  }
}

template <class T>
void row_merge(const Context& ctx, int64_t V, int64_t entries, int64_t cols, const int64_t* begin, const int64_t* positions, const T* g,
               int64_t num_positions, T* out) {
  const int threads = threads_for(ctx, V * entries * cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < V * entries; ++i) {
    const int64_t v = i / entries, e = i % entries;
    const T* from = g + v * num_positions * cols;
    T* to = out + i * cols;
    std::memcpy(to, from + positions[begin[e]] * cols, cols * sizeof(T));
    for (int64_t k = begin[e] + 1; k < begin[e + 1]; ++k) {
      const T* x = from + positions[k] * cols;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) to[j] += x[j];
    }
  }
}

template <class T>
T dot(int64_t size, const T* a, const T* b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < size; ++j) sum += a[j] * b[j];
  return sum;
}

template <class T>
void sparse_gram(const Context& ctx, int64_t V, int64_t M, int64_t N, int64_t cols, const T* a, int64_t a_ld, const T* b, const int64_t* to_row,
                 const int64_t* to_col, T* out, int64_t out_batch, int64_t out_ld) {
  const int threads = threads_for(ctx, V * M * N * cols);
  constexpr int64_t kBlock = 16;  // vectors of b that are met by all of a before the next ones
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t j0 = 0; j0 < N; j0 += kBlock) {
      const int64_t j1 = std::min(N, j0 + kBlock);
      for (int64_t i = 0; i < M; ++i) {
        const T* x = a + v * a_ld + i * cols;
        T* to = out + v * out_batch + to_row[i] * out_ld;
        for (int64_t j = j0; j < j1; ++j) to[to_col[j]] += dot(cols, x, b + j * cols);
      }
    }
  }
}

INFL_REGISTER_CPU(row_gather_stub, row_gather)
INFL_REGISTER_CPU(row_scatter_stub, row_scatter)
INFL_REGISTER_CPU(row_merge_stub, row_merge)
INFL_REGISTER_CPU(sparse_gram_stub, sparse_gram)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
