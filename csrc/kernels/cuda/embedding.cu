// Gathers and merges move whole rows, 16 bytes a thread and step where rows allow. row_scatter sorts its positions by index and sums runs of equal
// indices, whatever the number of rows of the table; equal indices keep the order of positions, so results repeat:
//
//   1. tiles of 1024 positions, sorted by counting for each how many come before it (shared memory, 1024 comparisons a position)
//   2. more than one tile: the place among all is the sum of places in every tile, found by bisection (10 steps a tile)
//   3. 32 sorted positions at a time, the sums of their runs; a run within one such chunk goes to the table
//   4. longer runs: the sums of their pieces
//
// Steps 1 and 2 are done once for all right-hand sides that share a list. g is read once; bytes of the table: its rows that are met, read and
// written.
//
// sparse_gram is one launch however many rows, examples and right-hand sides there are: every element of the result has an owner. A pair of examples
// with t rows each and c in common costs t log2 t comparisons and c · cols multiplications; of the vectors it reads, the left ones are shared by the
// eight warps of a block in the first-level cache, the right ones come from the second.
#include "kernels/embedding.h"

#include <climits>

#include "kernels/cuda/row_reduction.h"
#include "kernels/cuda/vector.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Elements i of [positions, cols] and all right-hand sides of each.
template <class T>
struct RowGather {
  int64_t V, positions, cols;
  const T* index;
  int64_t skip;
  const T* table;
  int64_t table_ld;
  T* y;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t p = i / cols, j = i - p * cols, row = static_cast<int64_t>(index[p]);
    write_sides<W>(V, y + i, positions * cols, [&](int64_t v) {
      Vector<T, W> value{};
      if (row != skip) value = load<W>(table + v * table_ld + row * cols + j);
      return value;
    });
  }
};

template <class T>
void row_gather(const Context& ctx, int64_t V, int64_t positions, int64_t cols, const T* index, int64_t skip, const T* table, int64_t table_ld,
                T* y) {
  const int64_t W = kVectorWidth<T>;
  const bool vectorised = cols % W == 0 && (V == 1 || table_ld % W == 0) && is_aligned({table, y});
  for_each<T>(ctx, "row_gather", positions * cols, vectorised, RowGather<T>{V, positions, cols, index, skip, table, table_ld, y});
}

// A list's positions sorted by index; lists of `positions` one after the other.
template <class T>
struct Order {
  int64_t positions;
  const T* key;
  const int* position;
};

constexpr int kTile = 1024, kBlocksOfTile = kTile / kThreads;

template <class T>
__global__ void __launch_bounds__(kThreads)
    sort_tile_kernel(int64_t lists, int64_t positions, const T* index, int64_t index_ld, T* key, int* position) {
  __shared__ T tile[kTile];
  const int64_t first = int64_t{blockIdx.x / kBlocksOfTile} * kTile;
  const int count = static_cast<int>(positions - first < kTile ? positions - first : kTile);
  const int mine = static_cast<int>(blockIdx.x % kBlocksOfTile * kThreads + threadIdx.x);
  for (int64_t list = blockIdx.y; list < lists; list += gridDim.y) {
    __syncthreads();  // the last list's tile has been read
    for (int j = threadIdx.x; j < count; j += kThreads) tile[j] = index[list * index_ld + first + j];
    __syncthreads();
    if (mine >= count) continue;
    const T own = tile[mine];
    int place = 0;
    for (int j = 0; j < count; ++j) place += tile[j] < own || (tile[j] == own && j < mine) ? 1 : 0;
    key[list * positions + first + place] = own;
    position[list * positions + first + place] = static_cast<int>(first) + mine;
  }
}

// How many of the sorted keys are below x, or with `equal` not above it.
template <class T>
__device__ int count_below(const T* key, int count, T x, bool equal) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    const bool below = key[middle] < x || (equal && key[middle] == x);
    low = below ? middle + 1 : low;
    high = below ? high : middle;
  }
  return low;
}

template <class T>
__global__ void merge_tiles_kernel(int64_t lists, int64_t positions, const T* tile_key, const int* tile_position, T* key, int* position) {
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= positions) return;
  for (int64_t list = blockIdx.y; list < lists; list += gridDim.y) {
    const T* keys = tile_key + list * positions;
    const T own = keys[e];
    const int64_t home = e / kTile;
    int64_t place = e - home * kTile;
    for (int64_t tile = 0; tile * kTile < positions; ++tile) {
      const int64_t rest = positions - tile * kTile;
      if (tile != home) place += count_below(keys + tile * kTile, static_cast<int>(rest < kTile ? rest : kTile), own, tile < home);
    }
    key[list * positions + place] = own;
    position[list * positions + place] = tile_position[list * positions + e];
  }
}

constexpr int kChunk = 32, kLoads = 8;

template <class T>
struct RowScatter {
  int64_t num, cols;
  Order<T> order;
  bool one_list;
  T skip;
  const T* g;
  T* table;
  int64_t table_ld;
  T* partial;  // [num, chunks, 2, cols]: the sums of a chunk's first and last piece where its run goes on beyond the chunk
  int64_t chunks;
};

// threadIdx.x runs over columns, threadIdx.y over chunks.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(RowScatter<T> s) {
  const int64_t chunk = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, P = s.order.positions;
  if (chunk >= s.chunks) return;
  const int64_t begin = chunk * kChunk;
  const int count = static_cast<int>(P - begin < kChunk ? P - begin : kChunk);
  for (int64_t b = blockIdx.y; b < s.num; b += gridDim.y) {
    const int64_t list = s.one_list ? 0 : b * P;
    const T* key = s.order.key + list + begin;
    const int* position = s.order.position + list + begin;
    const bool from_before = begin > 0 && key[-1] == key[0], goes_on = begin + count < P && key[count - 1] == key[count];
    for (int64_t c = threadIdx.x; c < s.cols; c += blockDim.x) {
      T sum = 0;
      bool is_first = true;  // piece of the chunk
      for (int r0 = 0; r0 < count; r0 += kLoads) {
        T value[kLoads];
        INFL_UNROLL(8)
        for (int k = 0; k < kLoads; ++k) {
          const int r = r0 + k;
          value[k] = r < count && key[r] != s.skip ? s.g[(b * P + position[r]) * s.cols + c] : T(0);
        }
        INFL_UNROLL(8)
        for (int k = 0; k < kLoads; ++k) {
          const int r = r0 + k;
          if (r >= count) break;
          sum += value[k];
          const bool is_last = r + 1 == count;
          if (!is_last && key[r + 1] == key[r]) continue;
          if ((is_first && from_before) || (is_last && goes_on)) {
            s.partial[((b * s.chunks + chunk) * 2 + (is_first ? 0 : 1)) * s.cols + c] = sum;
          } else if (key[r] != s.skip) {
            s.table[b * s.table_ld + static_cast<int64_t>(key[r]) * s.cols + c] += sum;
          }
          sum = 0;
          is_first = false;
        }
      }
    }
  }
}

// The chunk in which a run begins that goes on beyond it adds up the run's pieces.
template <class T>
__global__ void __launch_bounds__(kThreads) join_pieces_kernel(RowScatter<T> s) {
  const int64_t chunk = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, P = s.order.positions;
  const int64_t begin = chunk * kChunk, end = begin + kChunk;
  if (chunk >= s.chunks || end >= P) return;
  for (int64_t b = blockIdx.y; b < s.num; b += gridDim.y) {
    const T* key = s.order.key + (s.one_list ? 0 : b * P);
    const T own = key[end - 1];
    if (key[end] != own || own == s.skip || (begin > 0 && key[begin - 1] == own)) continue;
    const T* partial = s.partial + (b * s.chunks + chunk) * 2 * s.cols;
    for (int64_t c = threadIdx.x; c < s.cols; c += blockDim.x) {
      T sum = partial[(key[begin] == own ? 0 : s.cols) + c];
      for (int64_t next = 1; (chunk + next) * kChunk < P && key[(chunk + next) * kChunk] == own; ++next) sum += partial[2 * next * s.cols + c];
      s.table[b * s.table_ld + static_cast<int64_t>(own) * s.cols + c] += sum;
    }
  }
}

template <class T>
void row_scatter(const Context& ctx, int64_t num, int64_t positions, int64_t cols, const T* index, int64_t index_ld, int64_t skip, const T* g,
                 T* table, int64_t table_ld) {
  constexpr const char* kWho = "row_scatter";
  if (num == 0 || positions == 0 || cols == 0) return;
  if (positions > INT_MAX - kTile) {
    throw std::invalid_argument("row_scatter: expected fewer than 2^31 positions, got " + std::to_string(positions) + "; use smaller tiles.");
  }
  const bool one_list = index_ld == 0;
  const int64_t lists = one_list ? 1 : num, tiles = ceil_div(positions, kTile);
  const auto lists_y = static_cast<unsigned>(std::min(lists, kMaxGridY));
  Buffer<T> key(ctx, lists * positions), tile_key;
  Buffer<int> position(ctx, lists * positions), tile_position;
  if (tiles > 1) {
    tile_key.resize(ctx, lists * positions);
    tile_position.resize(ctx, lists * positions);
  }
  launch(ctx, kWho, &sort_tile_kernel<T>, dim3(static_cast<unsigned>(tiles * kBlocksOfTile), lists_y), dim3(kThreads), 0, lists, positions, index,
         index_ld, tiles > 1 ? tile_key.data() : key.data(), tiles > 1 ? tile_position.data() : position.data());
  if (tiles > 1) {
    launch(ctx, kWho, &merge_tiles_kernel<T>, dim3(static_cast<unsigned>(ceil_div(positions, kThreads)), lists_y), dim3(kThreads), 0, lists,
           positions, tile_key.data(), tile_position.data(), key.data(), position.data());
  }
  const int64_t chunks = ceil_div(positions, kChunk);
  Buffer<T> partial;
  if (chunks > 1) partial.resize(ctx, num * chunks * 2 * cols);
  const RowScatter<T> s{.num = num,
                        .cols = cols,
                        .order = {positions, key.data(), position.data()},
                        .one_list = one_list,
                        .skip = static_cast<T>(skip),
                        .g = g,
                        .table = table,
                        .table_ld = table_ld,
                        .partial = partial.data(),
                        .chunks = chunks};
  const int64_t x = std::min<int64_t>(kThreads, row_reduction::power_of_two_below(2 * cols - 1)), y = kThreads / x;
  const dim3 threads(static_cast<unsigned>(x), static_cast<unsigned>(y));
  const dim3 blocks(static_cast<unsigned>(ceil_div(chunks, y)), static_cast<unsigned>(std::min(num, kMaxGridY)));
  launch(ctx, kWho, &sum_pieces_kernel<T>, blocks, threads, 0, s);
  if (chunks > 1) launch(ctx, kWho, &join_pieces_kernel<T>, blocks, threads, 0, s);
}

// Elements i of [entries, cols] and all right-hand sides of each.
template <class T>
struct RowMerge {
  int64_t V, entries, cols;
  const int64_t *begin, *positions;
  const T* g;
  int64_t num_positions;
  T* out;
  template <int W>
  __device__ void run(int64_t i) const {
    const int64_t e = i / cols, j = i - e * cols;
    write_sides<W>(V, out + i, entries * cols, [&](int64_t v) {
      Vector<T, W> sum{};
      for (int64_t k = begin[e]; k < begin[e + 1]; ++k) {
        const auto x = load<W>(g + (v * num_positions + positions[k]) * cols + j);
        for (int w = 0; w < W; ++w) sum.v[w] += x.v[w];
      }
      return sum;
    });
  }
};

template <class T>
void row_merge(const Context& ctx, int64_t V, int64_t entries, int64_t cols, const int64_t* begin, const int64_t* positions, const T* g,
               int64_t num_positions, T* out) {
  const bool vectorised = cols % kVectorWidth<T> == 0 && is_aligned({g, out});
  for_each<T>(ctx, "row_merge", entries * cols, vectorised, RowMerge<T>{V, entries, cols, begin, positions, g, num_positions, out});
}

// How many of `count` entries of x are of rows below `row`; their rows ascend.
template <class T>
__device__ int64_t rows_below(const SparseRows<T>& x, const int64_t* entry, int64_t count, T row) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (x.row[entry[middle]] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A warp an element of [v, w, n, m]: its lanes look for 32 of a's rows among b's at a time, and then share each pair that was found.
template <int W, class T>
__global__ void __launch_bounds__(kThreads) sparse_gram_kernel(int64_t cols, SparseRows<T> a, SparseRows<T> b, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp), size = a.V * b.V * a.N * b.N;
  for (int64_t at = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; at < size; at += warps) {
    const int64_t m = at % b.N, n = at / b.N % a.N, w = at / b.N / a.N % b.V, v = at / b.N / a.N / b.V;
    const int64_t *of_n = a.of_example + a.begin[n], *of_m = b.of_example + b.begin[m];
    const int64_t count_n = a.begin[n + 1] - a.begin[n], count_m = b.begin[m + 1] - b.begin[m];
    const T *left = a.value + v * a.entries * cols, *right = b.value + w * b.entries * cols;
    T sum = 0;
    for (int64_t k0 = 0; k0 < count_n; k0 += kWarp) {
      int64_t i = 0, j = 0;
      bool found = false;
      if (k0 + lane < count_n) {
        i = of_n[k0 + lane];
        const int64_t place = rows_below(b, of_m, count_m, a.row[i]);
        if (place < count_m) j = of_m[place];
        found = place < count_m && b.row[j] == a.row[i];
      }
      for (unsigned rest = __ballot_sync(0xffffffffu, found); rest != 0; rest &= rest - 1) {
        const int from = __ffs(static_cast<int>(rest)) - 1;
        const T *x = left + __shfl_sync(0xffffffffu, i, from) * cols, *y = right + __shfl_sync(0xffffffffu, j, from) * cols;
        for (int64_t c = lane * W; c < cols; c += kWarp * W) {
          const auto p = load<W>(x + c), q = load<W>(y + c);
          INFL_UNROLL(4)
          for (int e = 0; e < W; ++e) sum += p.v[e] * q.v[e];
        }
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) out[((v * a.N + n) * b.V + w) * b.N + m] += sum;
  }
}

template <class T>
void sparse_gram(const Context& ctx, int64_t cols, const SparseRows<T>& a, const SparseRows<T>& b, T* out) {
  const int64_t size = a.V * b.V * a.N * b.N;
  if (size == 0) return;
  const bool vectorised = cols % kVectorWidth<T> == 0 && is_aligned({a.value, b.value});
  launch(ctx, "sparse_gram", vectorised ? &sparse_gram_kernel<kVectorWidth<T>, T> : &sparse_gram_kernel<1, T>, blocks_for(size, kThreads / kWarp),
         dim3(kThreads), 0, cols, a, b, out);
}

INFL_REGISTER_CUDA(row_gather_stub, row_gather)
INFL_REGISTER_CUDA(row_scatter_stub, row_scatter)
INFL_REGISTER_CUDA(row_merge_stub, row_merge)
INFL_REGISTER_CUDA(sparse_gram_stub, sparse_gram)

}  // namespace
}  // namespace cuda
}  // namespace infl
