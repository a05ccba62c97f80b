// Reductions along one axis of [rows, size, inner] arrays, and what is computed from each element and the result of its line: softmax and its
// products, losses, sums, norms. One state is carried through threads, warps, blocks and, for lines that are split, through memory; so every line is
// read once where it fits in the registers of a warp or block, and twice where it does not, whatever the operation.
//
// An operation is a plain struct:
//   State            starts as that of no element
//   Item             what one element is computed from
//   kStores          whether elements are written
//   at(row, column)  its line, with
//     load(j) -> Item, add(state, item, j), merge(state, other), store(j, item, state), finish(state)
//     step: how far elements lie apart, where there can be more than one line side by side
// merge must be symmetric. Stores may replace what load(j) of the same j reads; finish, called by one thread per line, must leave all that is read.
//
// Lines and who takes them:
//   inner = 1, up to 32, 512 or 8192 items of 8 bytes: 8 lanes, a warp, a block; items stay in registers, one launch (of larger items, half)
//   inner = 1, longer, elements written    a cluster of up to 8 blocks, or one block; items stay in shared memory, one launch
//   inner = 1, longer, none written        chunks of the line, as many as fill the GPU; two launches if more than one
//   inner > 1                              a thread a column and every Y-th element, neighbouring columns to neighbouring threads; same chunks
// Accesses of a warp are 128 (256) neighbouring bytes of 4-byte (8-byte) words, kItems of them in flight in every thread.
//
// Long lines that are written: an element's bytes are read and written once as far as a line fits in shared memory, and are read again, in the order
// that finds them in the second-level cache, beyond. Items of 8 bytes (two floats), counted:
//
//   sm_90 and later   up to 14,400 / 28,800 / 57,700 / 115,500 elements: 1, 2, 4, 8 blocks, two on a processor, 64 KB in flight on each;
//                     up to 232,000: 8 blocks, one on a processor. All is read once. 50,257 float: 4 blocks of 101 KB
//   before            20,800 elements stay in a block, one on a processor, 32 KB in flight; of 50,257 float 59 % are read again, 236 KB on each
//                     processor and 25 MB on 108 of them, which the second-level cache holds (40 MB); few lines go by chunks, which read twice,
//                     from that cache as well
//
// For 90 % of 3.35 TB/s at 0.7 µs and 132 processors 16 KB have to be in flight on each. Between its last load and its first store a block waits for
// the others of its line; that is hidden by the other block on the processor, and where there is none (more than 115,500 elements) by what
// other processors have in flight.
#pragma once

#include <climits>
#include <cstring>

#include "kernels/cuda/launch.h"

namespace infl {
namespace cuda {

template <class T>
struct Sum {
  T value = 0;
};

// Exchanges the two if `swapped`, member by member in registers (a reference to the one or the other would put both in memory), and returns the
// second.
template <class State>
__device__ State exchanged(bool swapped, State& first, const State& second) {
  static_assert(sizeof(State) % 4 == 0);
  constexpr int kWords = sizeof(State) / 4;
  uint32_t a[kWords], b[kWords];
  std::memcpy(a, &first, sizeof(State));
  std::memcpy(b, &second, sizeof(State));
  INFL_UNROLL(16)
  for (int w = 0; w < kWords; ++w) {
    const uint32_t kept = swapped ? b[w] : a[w];
    b[w] = swapped ? a[w] : b[w];
    a[w] = kept;
  }
  State other;
  std::memcpy(&first, a, sizeof(State));
  std::memcpy(&other, b, sizeof(State));
  return other;
}

// Merges states whose sums leave out the largest element so far, `top` with index `m` (INT_MAX: of no element; of equal ones the first): add(a, b)
// adds what b has summed, and the element it left out, to a, whose element is the larger one.
template <class State, class Add>
__device__ void merge_into_larger(State& state, const State& other, const Add& add) {
  if (other.m == INT_MAX) return;
  if (state.m == INT_MAX) {
    state = other;
    return;
  }
  const bool other_is_larger = other.top > state.top || (other.top == state.top && other.m < state.m);
  const State smaller = exchanged(other_is_larger, state, other);
  add(state, smaller);
}

namespace row_reduction {

constexpr int kThreads = 256;
// Items a thread loads before it uses them, where they do not stay in registers.
template <class Item>
constexpr int kInFlight = sizeof(Item) > 8   ? 2
                          : sizeof(Item) > 4 ? 4
                                             : 8;

constexpr int64_t kMinChunk = 4096;   // elements of a line that are worth a block
constexpr int64_t kMaxChunks = 1024;  // of one line

template <class Op>
constexpr int kItemsOfThread = sizeof(typename Op::Item) > 8 ? 8 : 16;  // 64 to 128 bytes in registers

constexpr int kLongRowThreads = 512;

// Line `row` of lines one after the other, of which the compiler is to know that elements are neighbours: addresses cost no multiplication then.
template <class Op>
__device__ auto line_of_row(const Op& op, int64_t row) {
  auto line = op.at(row, 0);
  if constexpr (requires { line.step; }) line.step = 1;
  return line;
}

constexpr int kMaxCluster = 8;         // blocks; what every device with clusters takes
constexpr int64_t kFilling = 2 * 132;  // blocks that fill a GPU
constexpr size_t kReserved = 1 << 10;  // bytes of a processor's shared memory that each block costs beside its own
template <int kLanes>
constexpr int kRowThreads = kLanes > kWarp ? kLanes : kThreads;

// The state of another lane, word by word.
template <class State>
__device__ State shuffle_xor(const State& state, int step) {
  static_assert(sizeof(State) % 4 == 0);
  uint32_t words[sizeof(State) / 4];
  std::memcpy(words, &state, sizeof(State));
  INFL_UNROLL(16)
  for (size_t w = 0; w < sizeof(State) / 4; ++w) words[w] = __shfl_xor_sync(0xffffffffu, words[w], step);
  State other;
  std::memcpy(&other, words, sizeof(State));
  return other;
}

// Of kLanes neighbouring lanes, in all of them. Every thread of the block calls it.
template <int kLanes, class Line, class State>
__device__ void merge_lanes(const Line& line, State& state) {
  for (int step = (kLanes < kWarp ? kLanes : kWarp) / 2; step > 0; step /= 2) {
    const State other = shuffle_xor(state, step);
    line.merge(state, other);
  }
  if constexpr (kLanes > kWarp) {
    constexpr int kWarps = kLanes / kWarp;
    __shared__ double raw[kWarps * ((sizeof(State) + 7) / 8)];
    State* of_warp = reinterpret_cast<State*>(raw);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = state;
    __syncthreads();
    state = of_warp[0];
    for (int w = 1; w < kWarps; ++w) line.merge(state, of_warp[w]);
  }
}

// Lines of at most kLanes * kItems elements.
template <int kLanes, int kItems, class Op>
__global__ void __launch_bounds__(kRowThreads<kLanes>) row_kernel(int64_t rows, int size, Op op) {
  constexpr int kRows = kRowThreads<kLanes> / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const bool exists = row < rows;
  const auto line = line_of_row(op, exists ? row : rows - 1);
  const int end = exists ? size : 0;  // lanes without a row take part in shuffles only
  typename Op::State state;
  typename Op::Item items[kItems] = {};
  INFL_UNROLL(16)
  for (int k = 0; k < kItems; ++k) {
    if (k * kLanes + lane < end) items[k] = line.load(k * kLanes + lane);
  }
  INFL_UNROLL(16)
  for (int k = 0; k < kItems; ++k) {
    if (k * kLanes + lane < end) line.add(state, items[k], k * kLanes + lane);
  }
  merge_lanes<kLanes>(line, state);
  if constexpr (Op::kStores) {
    INFL_UNROLL(16)
    for (int k = 0; k < kItems; ++k) {
      if (k * kLanes + lane < end) line.store(k * kLanes + lane, items[k], state);
    }
  }
  if (exists && lane == 0) line.finish(state);
}

// The elements begin <= j < end of a line that are first, first + step, ...
template <class Line, class Item, class Body>
__device__ void each_item(const Line& line, int64_t begin, int64_t end, int first, int step, const Body& body) {
  Item items[kInFlight<Item>] = {};
  for (int64_t j0 = begin + first; j0 < end; j0 += kInFlight<Item> * step) {
    INFL_UNROLL(8)
    for (int k = 0; k < kInFlight<Item>; ++k) {
      if (j0 + k * step < end) items[k] = line.load(j0 + k * step);
    }
    INFL_UNROLL(8)
    for (int k = 0; k < kInFlight<Item>; ++k) {
      if (j0 + k * step < end) body(items[k], j0 + k * step);
    }
  }
}

template <class Line, class State>
struct Add {
  const Line& line;
  State& state;
  template <class Item>
  __device__ void operator()(const Item& item, int64_t j) const {
    line.add(state, item, j);
  }
};

template <class Line, class State>
struct Store {
  const Line& line;
  const State& state;
  template <class Item>
  __device__ void operator()(const Item& item, int64_t j) const {
    line.store(j, item, state);
  }
};

// How lines are cut: chunk c of a line is its elements from c * length on.
struct Chunks {
  int64_t length, count;
};

// A block a chunk. Of lines in one chunk it does all; of others it leaves the state in `partial` [lines, chunks].
template <class Op>
__global__ void __launch_bounds__(kThreads, 2) chunk_kernel(int64_t size, Chunks chunks, Op op, typename Op::State* partial) {
  const int64_t row = blockIdx.x / chunks.count, begin = (blockIdx.x - row * chunks.count) * chunks.length;
  const int64_t end = begin + chunks.length < size ? begin + chunks.length : size;
  const auto line = line_of_row(op, row);
  using Line = decltype(op.at(0, 0));
  using State = typename Op::State;
  State state;
  each_item<Line, typename Op::Item>(line, begin, end, threadIdx.x, kThreads, Add<Line, State>{line, state});
  merge_lanes<kThreads>(line, state);
  if (partial) {
    if (threadIdx.x == 0) partial[blockIdx.x] = state;
    return;
  }
  if constexpr (Op::kStores) {
    each_item<Line, typename Op::Item>(line, begin, end, threadIdx.x, kThreads, Store<Line, State>{line, state});
  }
  if (threadIdx.x == 0) line.finish(state);
}

// A block a chunk, or one a line where no elements are written.
template <class Op>
__global__ void __launch_bounds__(kThreads, 2) chunk_store_kernel(int64_t size, Chunks chunks, Op op, const typename Op::State* partial) {
  using Line = decltype(op.at(0, 0));
  using State = typename Op::State;
  const int64_t blocks = Op::kStores ? chunks.count : 1;
  const int64_t row = blockIdx.x / blocks, chunk = blockIdx.x - row * blocks;
  const auto line = line_of_row(op, row);
  State state;
  for (int64_t c = threadIdx.x; c < chunks.count; c += kThreads) line.merge(state, partial[row * chunks.count + c]);
  merge_lanes<kThreads>(line, state);
  if constexpr (Op::kStores) {
    const int64_t begin = chunk * chunks.length, end = begin + chunks.length < size ? begin + chunks.length : size;
    each_item<Line, typename Op::Item>(line, begin, end, threadIdx.x, kThreads, Store<Line, State>{line, state});
  }
  if (chunk == 0 && threadIdx.x == 0) line.finish(state);
}

// Of the items that a block keeps in shared memory, those in flight in a thread.
template <class Item>
constexpr int kKeptInFlight = sizeof(Item) > 8 ? 8 : 16;

// Shared memory of a kept line: the block's state and those of its warps, then items.
template <class State>
constexpr size_t kKeptStates = (sizeof(State) * (1 + kThreads / kWarp) + 15) / 16 * 16;

// A line by chunks.count blocks, a cluster if there are several: each keeps the first `kept` items of its chunk in shared memory, where every thread
// finds its own again. The others it loads last, and loads again in the opposite order.
template <class Op>
__global__ void __launch_bounds__(kThreads, 2) kept_kernel(int64_t size, Chunks chunks, int kept, Op op) {
  using State = typename Op::State;
  using Item = typename Op::Item;
  constexpr int kInFlight = kKeptInFlight<Item>, kStep = kThreads * kInFlight;
  INFL_DYNAMIC_SHARED(unsigned char, raw);
  State *of_block = reinterpret_cast<State*>(raw), *of_warp = of_block + 1;
  Item* items = reinterpret_cast<Item*>(raw + kKeptStates<State>);
  const int64_t row = blockIdx.x / chunks.count;
  const int rank = static_cast<int>(blockIdx.x - row * chunks.count), thread = static_cast<int>(threadIdx.x);
  const int64_t begin = rank * chunks.length, end = begin + chunks.length < size ? begin + chunks.length : size;
  const int count = static_cast<int>(end - begin < kept ? end - begin : kept);
  const auto line = line_of_row(op, row);
  State state;
  for (int64_t k0 = thread; k0 < end - begin; k0 += kStep) {
    Item batch[kInFlight] = {};
    INFL_UNROLL(16)
    for (int k = 0; k < kInFlight; ++k) {
      if (begin + k0 + k * kThreads < end) batch[k] = line.load(begin + k0 + k * kThreads);
    }
    INFL_UNROLL(16)
    for (int k = 0; k < kInFlight; ++k) {
      if (begin + k0 + k * kThreads >= end) continue;
      if (k0 + k * kThreads < count) items[k0 + k * kThreads] = batch[k];
      line.add(state, batch[k], begin + k0 + k * kThreads);
    }
  }

  merge_lanes<kWarp>(line, state);
  if (thread % kWarp == 0) of_warp[thread / kWarp] = state;
  __syncthreads();
  state = of_warp[0];
  for (int w = 1; w < kThreads / kWarp; ++w) line.merge(state, of_warp[w]);
  if (chunks.count > 1) {
    if (thread == 0) *of_block = state;
    cluster_arrive();
    cluster_wait();
    state = *of_block_in_cluster(of_block, 0);
    for (int r = 1; r < chunks.count; ++r) line.merge(state, *of_block_in_cluster(of_block, r));
    cluster_arrive();
  }

  const int64_t rest = end - begin - count;
  for (int64_t first = rest - 1 - (rest - 1) % kStep; rest > 0 && first >= 0; first -= kStep) {
    const int64_t j0 = begin + count + first + thread;
    Item batch[kInFlight] = {};
    INFL_UNROLL(16)
    for (int k = 0; k < kInFlight; ++k) {
      if (j0 + k * kThreads < end) batch[k] = line.load(j0 + k * kThreads);
    }
    INFL_UNROLL(16)
    for (int k = 0; k < kInFlight; ++k) {
      if (j0 + k * kThreads < end) line.store(j0 + k * kThreads, batch[k], state);
    }
  }
  for (int k = thread; k < count; k += kThreads) line.store(begin + k, items[k], state);
  if (rank == 0 && thread == 0) line.finish(state);
  if (chunks.count > 1) cluster_wait();  // the others have read this block's state
}

// Of the threads with equal threadIdx.x, in all of them; blockDim.y a power of two.
template <class Line, class State>
__device__ void merge_y(const Line& line, State& state) {
  __shared__ double raw[kThreads * ((sizeof(State) + 7) / 8)];
  State* all = reinterpret_cast<State*>(raw);
  State& mine = all[threadIdx.y * blockDim.x + threadIdx.x];
  mine = state;
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) line.merge(mine, all[(threadIdx.y + half) * blockDim.x + threadIdx.x]);
  }
  __syncthreads();
  state = all[threadIdx.x];
}

// A block takes blockDim.x columns of a row and a chunk of their elements.
template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    column_kernel(int64_t size, int64_t inner, int64_t strips, Chunks chunks, Op op, typename Op::State* partial) {
  using Line = decltype(op.at(0, 0));
  using State = typename Op::State;
  const int64_t chunk = blockIdx.x % chunks.count, rest = blockIdx.x / chunks.count, row = rest / strips;
  const int64_t column = (rest - row * strips) * blockDim.x + threadIdx.x;
  const int64_t begin = chunk * chunks.length, end = begin + chunks.length < size ? begin + chunks.length : size;
  const bool exists = column < inner;
  const auto line = op.at(row, exists ? column : inner - 1);
  State state;
  if (exists) each_item<Line, typename Op::Item>(line, begin, end, threadIdx.y, blockDim.y, Add<Line, State>{line, state});
  merge_y(line, state);
  if (!exists) return;
  if (partial) {
    if (threadIdx.y == 0) partial[(row * inner + column) * chunks.count + chunk] = state;
    return;
  }
  if constexpr (Op::kStores) each_item<Line, typename Op::Item>(line, begin, end, threadIdx.y, blockDim.y, Store<Line, State>{line, state});
  if (threadIdx.y == 0) line.finish(state);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    column_store_kernel(int64_t size, int64_t inner, int64_t strips, Chunks chunks, Op op, const typename Op::State* partial) {
  using Line = decltype(op.at(0, 0));
  using State = typename Op::State;
  const int64_t blocks = Op::kStores ? chunks.count : 1;
  const int64_t chunk = blockIdx.x % blocks, rest = blockIdx.x / blocks, row = rest / strips;
  const int64_t column = (rest - row * strips) * blockDim.x + threadIdx.x;
  const bool exists = column < inner;
  const auto line = op.at(row, exists ? column : inner - 1);
  State state;
  if (exists) {
    const State* of_column = partial + (row * inner + column) * chunks.count;
    for (int64_t c = threadIdx.y; c < chunks.count; c += blockDim.y) line.merge(state, of_column[c]);
  }
  merge_y(line, state);
  if (!exists) return;
  if constexpr (Op::kStores) {
    const int64_t begin = chunk * chunks.length, end = begin + chunks.length < size ? begin + chunks.length : size;
    each_item<Line, typename Op::Item>(line, begin, end, threadIdx.y, blockDim.y, Store<Line, State>{line, state});
  }
  if (chunk == 0 && threadIdx.y == 0) line.finish(state);
}

inline Chunks cut(int64_t size, int64_t blocks_of_a_chunk, int64_t shortest) {
  const int64_t most = std::min(kMaxChunks, ceil_div(size, shortest));
  const int64_t count = std::clamp<int64_t>(kMaxBlocks / blocks_of_a_chunk, 1, std::max<int64_t>(most, 1));
  const int64_t length = std::max<int64_t>(ceil_div(size, count), 1);
  return {length, std::max<int64_t>(ceil_div(size, length), 1)};
}

inline dim3 grid(int64_t blocks, const char* who) {
  if (blocks > INT_MAX)
    throw std::invalid_argument(std::string(who) + ": expected fewer than 2^31 blocks, got " + std::to_string(blocks) + "; use smaller tiles.");
  return dim3(static_cast<unsigned>(blocks));
}

inline int64_t power_of_two_below(int64_t x) {
  int64_t power = 1;
  while (2 * power <= x) power *= 2;
  return power;
}

// Lines of many elements, kept in shared memory; false if chunks serve them better: where a line is one block's, few of them leave the GPU empty.
template <class Op>
bool keep_rows(const Context& ctx, const char* who, int64_t rows, int64_t size, const Op& op) {
  using Item = typename Op::Item;
  constexpr size_t kStates = kKeptStates<typename Op::State>;
  const DeviceLimits limits = device_limits(who);
  const auto fitting = [](size_t bytes) { return static_cast<int64_t>((bytes - kStates) / sizeof(Item)); };
  const int64_t of_two = fitting(limits.processor_shared_bytes / 2 - kReserved);
  int blocks = 1;
  if (limits.has_clusters && has_cluster_code(&kept_kernel<Op>, who)) {
    while (blocks < kMaxCluster && (ceil_div(size, blocks) > of_two || rows * blocks < kFilling)) blocks *= 2;
  } else if (rows < kFilling / 2) {
    return false;
  }
  const Chunks chunks{ceil_div(size, blocks), blocks};
  const int64_t kept = std::min(chunks.length, fitting(limits.shared_bytes));
  launch_clusters(ctx, who, &kept_kernel<Op>, blocks, grid(rows * blocks, who), dim3(kThreads), kStates + static_cast<size_t>(kept) * sizeof(Item),
                  size, chunks, kept, op);
  return true;
}

}  // namespace row_reduction

// The operation on [rows, size, inner]. Nothing is launched for no lines; lines of no element are finished.
template <class Op>
void reduce_columns(const Context& ctx, const char* who, int64_t rows, int64_t size, int64_t inner, const Op& op) {
  using namespace row_reduction;
  if (rows == 0 || inner == 0) return;
  const int64_t y =
      std::min(power_of_two_below(std::max<int64_t>(size / 4, 1)), kThreads / std::min<int64_t>(kWarp, power_of_two_below(2 * inner - 1)));
  const int64_t x = std::min(power_of_two_below(2 * inner - 1), kThreads / y), strips = ceil_div(inner, x);
  const Chunks chunks = cut(size, rows * strips, std::max<int64_t>(kMinChunk / x, 32 * y));
  const dim3 threads(static_cast<unsigned>(x), static_cast<unsigned>(y));
  Buffer<typename Op::State> partial;
  if (chunks.count > 1) partial.resize(ctx, rows * inner * chunks.count);
  launch(ctx, who, &column_kernel<Op>, grid(rows * strips * chunks.count, who), threads, 0, size, inner, strips, chunks, op, partial.data());
  if (chunks.count == 1) return;
  launch(ctx, who, &column_store_kernel<Op>, grid(rows * strips * (Op::kStores ? chunks.count : 1), who), threads, 0, size, inner, strips, chunks, op,
         partial.data());
}

template <class Op>
void reduce_rows(const Context& ctx, const char* who, int64_t rows, int64_t size, int64_t inner, const Op& op) {
  using namespace row_reduction;
  if (inner != 1) return reduce_columns(ctx, who, rows, size, inner, op);
  if (rows == 0) return;
  constexpr int kItems = kItemsOfThread<Op>;
  const auto in_registers = [&](auto kernel, int lanes, int threads) {
    launch(ctx, who, kernel, grid(ceil_div(rows, threads / lanes), who), dim3(threads), 0, rows, size, op);
  };
  if (size <= 8 * 4) return in_registers(&row_kernel<8, 4, Op>, 8, kRowThreads<8>);
  if (size <= kWarp * kItems) return in_registers(&row_kernel<kWarp, kItems, Op>, kWarp, kRowThreads<kWarp>);
  if (size <= kLongRowThreads * kItems) return in_registers(&row_kernel<kLongRowThreads, kItems, Op>, kLongRowThreads, kRowThreads<kLongRowThreads>);
  if constexpr (Op::kStores) {
    if (keep_rows(ctx, who, rows, size, op)) return;
  }
  const Chunks chunks = cut(size, rows, kMinChunk);
  Buffer<typename Op::State> partial;
  if (chunks.count > 1) partial.resize(ctx, rows * chunks.count);
  launch(ctx, who, &chunk_kernel<Op>, grid(rows * chunks.count, who), dim3(kThreads), 0, size, chunks, op, partial.data());
  if (chunks.count == 1) return;
  launch(ctx, who, &chunk_store_kernel<Op>, grid(rows * (Op::kStores ? chunks.count : 1), who), dim3(kThreads), 0, size, chunks, op, partial.data());
}

}  // namespace cuda
}  // namespace infl
