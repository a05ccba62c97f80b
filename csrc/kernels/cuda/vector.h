// 16-byte access to global memory: a thread handles a vector of neighbouring elements, or one element where sizes or addresses do not allow it.
#pragma once

#include <initializer_list>

#include "kernels/cuda/launch.h"

namespace infl::cuda {

template <class T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

template <class T, int W>
struct __align__(W * sizeof(T)) Vector {
  T v[W];
};

template <int W, class T>
__device__ inline Vector<T, W> load(const T* p) {
  return *reinterpret_cast<const Vector<T, W>*>(p);
}

template <int W, class T>
__device__ inline void store(T* p, const Vector<T, W>& x) {
  *reinterpret_cast<Vector<T, W>*>(p) = x;
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// Elements before the address from which on all of these are 16-byte aligned; −1 if they never are together.
template <class T>
int64_t first_aligned(std::initializer_list<const void*> pointers) {
  int64_t first = -1;
  for (const void* p : pointers) {
    if (p == nullptr) continue;
    const int64_t own = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
    if (first >= 0 && own != first) return -1;
    first = own;
  }
  return first;
}

// to[v · apart] = value(v), vectors, for all right-hand sides v < V. What four of them read is on its way before the first is written, so rows of odd
// length, an element a thread, keep as many bytes in flight as vectors do. Of `to`, value(v) may read what is written for v.
template <int W, class T, class Value>
__device__ inline void write_sides(int64_t V, T* to, int64_t apart, const Value& value) {
  constexpr int kSides = 4;
  int64_t v = 0;
  for (; v + kSides <= V; v += kSides) {
    Vector<T, W> x[kSides];
    INFL_UNROLL(4)
    for (int s = 0; s < kSides; ++s) x[s] = value(v + s);
    INFL_UNROLL(4)
    for (int s = 0; s < kSides; ++s) store<W>(to + (v + s) * apart, x[s]);
  }
  for (; v < V; ++v) store<W>(to + v * apart, value(v));
}

// Elements from `first` on W at a time; those before, and those that are left, one at a time.
template <int W, class Body>
__global__ void each_kernel(int64_t first, int64_t size, Body body) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t vectors = (size - first) / W;
  for (int64_t k = thread; k < vectors; k += threads) body.template run<W>(first + k * W);
  if constexpr (W > 1) {
    if (thread < size - vectors * W) body.template run<1>(thread < first ? thread : thread + vectors * W);
  }
}

// body.run<1>(i) for all i < size: for bodies that take an element at a time.
template <class Body>
void for_each_element(const Context& ctx, const char* who, int64_t size, const Body& body) {
  constexpr int kThreads = 256;
  if (size == 0) return;
  launch(ctx, who, &each_kernel<1, Body>, blocks_for(size, kThreads), dim3(kThreads), 0, int64_t{0}, size, body);
}

// body.run<W>(i) for all i < size from `first` on in steps of W = kVectorWidth<T>, run<1>(i) for what is before and left; all by run<1> if first < 0.
template <class T, class Body>
void for_each_from(const Context& ctx, const char* who, int64_t first, int64_t size, const Body& body) {
  constexpr int W = kVectorWidth<T>, kThreads = 256;
  if (first < 0 || size - first < W) return for_each_element(ctx, who, size, body);
  launch(ctx, who, &each_kernel<W, Body>, blocks_for(ceil_div(size, W), kThreads), dim3(kThreads), 0, first, size, body);
}

// body.run<W>(i) for all i < size in steps of W: W = kVectorWidth<T> if `vectorised` (size a multiple of it, pointers aligned), else 1.
template <class T, class Body>
void for_each(const Context& ctx, const char* who, int64_t size, bool vectorised, const Body& body) {
  for_each_from<T>(ctx, who, vectorised && size % kVectorWidth<T> == 0 ? 0 : -1, size, body);
}

// For bodies that find element i at i of every pointer: whatever the size, and where the pointers lie, if all lie alike. With V > 1 right-hand sides,
// `size` elements apart, they lie alike if that is a multiple of the width.
template <class T, class Body>
void for_each_flat(const Context& ctx, const char* who, int64_t V, int64_t size, std::initializer_list<const void*> pointers, const Body& body) {
  const bool alike = V == 1 || size % kVectorWidth<T> == 0;
  for_each_from<T>(ctx, who, alike ? first_aligned<T>(pointers) : -1, size, body);
}

}  // namespace infl::cuda
