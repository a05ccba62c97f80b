// The CUDA language on a CPU, as far as kernels/cuda uses it: every thread of a block is a fiber that runs until it ends or waits at a barrier.
//
// Slow and exact. What it finds: wrong indices, arithmetic, launch sizes, barriers that not all threads reach, reads of memory nobody wrote (device
// memory and dynamic shared memory start as NaN). With INFL_EMULATION_ORDER=reversed threads and blocks run in the opposite order, with a number
// in orders drawn from that seed, so a missing barrier, or blocks that depend on each other, show as results that differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dispatch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define INFL_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::infl::emulation::dynamic_shared())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

namespace infl::emulation {

struct Place {
  dim3 thread, block;
};

// Of the running thread.
const Place& here();
const dim3& block_shape();
const dim3& grid_shape();
void* dynamic_shared();

void block_barrier();
void warp_barrier();
void cluster_arrival();
void cluster_barrier();

// What the emulated device is: architecture 90 unless INFL_EMULATION_ARCHITECTURE says otherwise, with its shared memory and, from 90 on, clusters.
struct Limits {
  size_t shared_bytes, processor_shared_bytes;
  bool has_clusters;
};
Limits limits();

// The same place of dynamic shared memory in another block of the running cluster.
const void* of_block(const void* own, int rank);

// 8 bytes of each lane of the running warp; meaningful between two warp barriers.
uint64_t& exchange(int lane);
int lane();
bool is_alive(int lane);

// What each lane of the running warp gives, readable until the lane's next call but one: for instructions in which all 32 lanes take part; that
// another has ended, or waits elsewhere, is an error.
struct Given {
  alignas(16) unsigned char bytes[32];
};
const Given* gather(const void* own, size_t size);

// Ends the launch with an error.
void fail(const char* what);

// Blocks run one after the other, those of a cluster together. Static __shared__ is one for all of them: kernels in clusters use the dynamic one.
void launch(const char* who, int cluster, dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel);

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&exchange(lane()), &value, sizeof(T));
  warp_barrier();
  T result = value;
  if (from >= 0 && from < 32 && is_alive(from)) std::memcpy(&result, &exchange(from), sizeof(T));
  warp_barrier();
  return result;
}

// The kernels of this library, for the table it exports.
std::vector<DeviceKernel>& kernels();

}  // namespace infl::emulation

#define threadIdx (::infl::emulation::here().thread)
#define blockIdx (::infl::emulation::here().block)
#define blockDim (::infl::emulation::block_shape())
#define gridDim (::infl::emulation::grid_shape())
#define __syncthreads() ::infl::emulation::block_barrier()
#define __syncwarp(...) ::infl::emulation::warp_barrier()

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return ::infl::emulation::shuffle(value, ::infl::emulation::lane() / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::infl::emulation::shuffle(value, ::infl::emulation::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
  return ::infl::emulation::shuffle(value, ::infl::emulation::lane() + static_cast<int>(step));
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  return ::infl::emulation::shuffle(value, ::infl::emulation::lane() - static_cast<int>(step));
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const bool own = predicate != 0;
  const ::infl::emulation::Given* given = ::infl::emulation::gather(&own, sizeof own);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(given[lane].bytes[0]) << lane;
  return all;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
// Blocks and threads run one at a time, so nothing interferes.
template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
template <class T>
T atomicMax(T* p, T value) {
  const T before = *p;
  if (value > before) *p = value;
  return before;
}
template <class T>
T atomicMin(T* p, T value) {
  const T before = *p;
  if (value < before) *p = value;
  return before;
}

#define INFL_REGISTER_CUDA(stub, fn)                                                                                                          \
  [[maybe_unused]] static const bool INFL_CONCAT(fn, _is_registered) = [] {                                                                   \
    ::infl::stub<float>.set_cuda(&fn<float>);                                                                                                 \
    ::infl::stub<double>.set_cuda(&fn<double>);                                                                                               \
    ::infl::emulation::kernels().push_back(                                                                                                   \
        {::infl::stub<float>.name(), reinterpret_cast<::infl::AnyFunction>(&fn<float>), reinterpret_cast<::infl::AnyFunction>(&fn<double>)}); \
    return true;                                                                                                                              \
  }();

namespace infl::cuda {

template <class... Parameters, class... Arguments>
void launch(const Context&, const char* who, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, Arguments... arguments) {
  emulation::launch(who, 1, blocks, threads, shared, [=] { kernel(static_cast<Parameters>(arguments)...); });  // copies, as a launch does
}

template <class... Parameters, class... Arguments>
void launch_clusters(const Context&, const char* who, void (*kernel)(Parameters...), int cluster, dim3 blocks, dim3 threads, size_t shared,
                     Arguments... arguments) {
  emulation::launch(who, cluster, blocks, threads, shared, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline DeviceLimits device_limits(const char*) {
  const emulation::Limits limits = emulation::limits();
  return {limits.shared_bytes, limits.processor_shared_bytes, limits.has_clusters};
}

template <class Kernel>
bool has_cluster_code(Kernel*, const char*) {
  return true;
}

inline void cluster_arrive() { emulation::cluster_arrival(); }
inline void cluster_wait() { emulation::cluster_barrier(); }
template <class T>
const T* of_block_in_cluster(const T* own, int rank) {
  return static_cast<const T*>(emulation::of_block(own, rank));
}

}  // namespace infl::cuda
