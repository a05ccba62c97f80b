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

// out[v, to_row[i], to_col[j]] += a[v, i] · b[j], i < M, j < N, vectors of `cols`; a[v] a_ld and out[v] out_batch apart, out's rows out_ld.
template <class T>
inline KernelStub<void(const Context&, int64_t V, int64_t M, int64_t N, int64_t cols, const T* a, int64_t a_ld, const T* b, const int64_t* to_row,
                       const int64_t* to_col, T* out, int64_t out_batch, int64_t out_ld)>
    sparse_gram_stub{"sparse_gram"};

}  // namespace infl
