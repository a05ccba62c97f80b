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

template <int W, class Body>
__global__ void each_kernel(int64_t size, Body body) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x * W;
  for (int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * W; i < size; i += step) body.template run<W>(i);
}

// body.run<1>(i) for all i < size: for bodies that take an element at a time.
template <class Body>
void for_each_element(const Context& ctx, const char* who, int64_t size, const Body& body) {
  constexpr int kThreads = 256;
  if (size == 0) return;
  launch(ctx, who, &each_kernel<1, Body>, blocks_for(size, kThreads), dim3(kThreads), 0, size, body);
}

// body.run<W>(i) for all i < size in steps of W: W = kVectorWidth<T> if `vectorised` (size a multiple of it, pointers aligned), else 1.
template <class T, class Body>
void for_each(const Context& ctx, const char* who, int64_t size, bool vectorised, const Body& body) {
  constexpr int W = kVectorWidth<T>, kThreads = 256;
  if (size == 0) return;
  if (!vectorised || size % W != 0) return for_each_element(ctx, who, size, body);
  launch(ctx, who, &each_kernel<W, Body>, blocks_for(size / W, kThreads), dim3(kThreads), 0, size, body);
}

}  // namespace infl::cuda
