// Rows of a table picked by index, and sums over equal indices. Indices are whole numbers of T; `skip` is an index that counts for nothing
// (−1: none). Deterministic: an element is summed by one thread in the order of positions.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace infl {

// y[v, p, :] = table[v, index[p], :], zero where index[p] = skip; tables table_ld apart, rows of `cols`.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t positions, int64_t cols, const T* index, int64_t skip, const T* table, int64_t table_ld,
                       T* y)>
    row_gather_stub{"row_gather"};

// table[b, index[b, p], :] += g[b, p, :]; b < num, p < positions; indices index_ld apart (0: one list for all), tables table_ld apart.
template <class T>
inline KernelStub<void(const Context&, int64_t num, int64_t positions, int64_t cols, const T* index, int64_t index_ld, int64_t skip, const T* g,
                       T* table, int64_t table_ld)>
    row_scatter_stub{"row_scatter"};

// out[v, e, :] = Σ_k g[v, positions[k], :], k from begin[e] to begin[e + 1]; e < entries; g has num_positions rows for each v.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t entries, int64_t cols, const int64_t* begin, const int64_t* positions, const T* g,
                       int64_t num_positions, T* out)>
    row_merge_stub{"row_merge"};

// Rows of tables, each met by one example: value[v, e] is row[e] of the table of example[e], a pair (row, example) met once. Entries lie in order of
// rows and, of one row, of examples; of_example[begin[n]], ... up to begin[n + 1] are those of example n, in order.
template <class T>
struct SparseRows {
  int64_t V = 0, N = 0, entries = 0;
  const T* row = nullptr;  // whole numbers
  const int64_t *example = nullptr, *begin = nullptr, *of_example = nullptr;
  const T* value = nullptr;  // [V, entries, cols]
};

// out[v, n, w, m] += the inner product of example n's table in a[v] and example m's in b[w]: Σ over the rows of both, in order.
template <class T>
inline KernelStub<void(const Context&, int64_t cols, const SparseRows<T>& a, const SparseRows<T>& b, T* out)> sparse_gram_stub{"sparse_gram"};

}  // namespace infl
