// Bandwidth-bound: whole rows are read and written. Where several positions may meet in one row of the table, threads own columns of it.
#include "kernels/embedding.h"

#include <algorithm>

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

// Entries of the row that `entry` is of end here.
template <class T>
int64_t end_of_row(const SparseRows<T>& x, int64_t entry) {
  return std::upper_bound(x.row + entry, x.row + x.entries, x.row[entry]) - x.row;
}

// A thread owns some of b's examples, so the sums over rows have one order whatever their number.
template <class T>
void sparse_gram(const Context& ctx, int64_t cols, const SparseRows<T>& a, const SparseRows<T>& b, T* out) {
  const int threads = threads_for(ctx, a.V * b.V * (a.entries + b.entries) * cols);
  constexpr int64_t kBlock = 16;  // vectors of b that are met by all of a before the next ones
  const int64_t ld = b.V * b.N;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    const int64_t m_begin = b.N * part / threads, m_end = b.N * (part + 1) / threads;
    for (int64_t i = 0, j = 0, i_end, j_end; i < a.entries && j < b.entries; i = i_end, j = j_end) {
      i_end = a.row[i] > b.row[j] ? i : end_of_row(a, i);
      j_end = b.row[j] > a.row[i] ? j : end_of_row(b, j);
      if (a.row[i] != b.row[j]) continue;
      const int64_t *owned = std::lower_bound(b.example + j, b.example + j_end, m_begin), *end = std::lower_bound(owned, b.example + j_end, m_end);
      for (int64_t vw = 0; vw < a.V * b.V; ++vw) {
        const int64_t v = vw / b.V, w = vw % b.V;
        const T *of_a = a.value + v * a.entries * cols, *of_b = b.value + w * b.entries * cols;
        T* to = out + v * a.N * ld + w * b.N;
        for (const int64_t* m0 = owned; m0 < end; m0 += std::min<int64_t>(kBlock, end - m0)) {
          const int64_t* m1 = m0 + std::min<int64_t>(kBlock, end - m0);
          for (int64_t k = i; k < i_end; ++k) {
            for (const int64_t* m = m0; m < m1; ++m) to[a.example[k] * ld + *m] += dot(cols, of_a + k * cols, of_b + (m - b.example) * cols);
          }
        }
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
