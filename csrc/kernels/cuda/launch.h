// What every CUDA kernel file includes: the language (or its emulation on a CPU, for tests), launching with error reports, and registration.
// No torch header. A file must compile both by nvcc and, with INFL_EMULATED_CUDA, by a C++ compiler: no <<<>>>, shared memory sized at launch only
// through INFL_DYNAMIC_SHARED, and of the intrinsics those that tests/emulation/emulation/cuda.h has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/buffer.h"
#include "common/dispatch.h"

namespace infl::cuda {

// Of a device: shared memory that a block may ask for and that a processor has, and clusters of blocks that read each other's (sm_90 and later).
struct DeviceLimits {
  size_t shared_bytes, processor_shared_bytes;
  bool has_clusters;
};

}  // namespace infl::cuda

#ifdef INFL_EMULATED_CUDA
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>

#define INFL_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char infl_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(infl_dynamic_shared)

#define INFL_REGISTER_CUDA(stub, fn)                                        \
  [[maybe_unused]] static const bool INFL_CONCAT(fn, _is_registered) = [] { \
    ::infl::stub<float>.set_cuda(&fn<float>);                               \
    ::infl::stub<double>.set_cuda(&fn<double>);                             \
    return true;                                                            \
  }();

namespace infl::cuda {

inline void check(cudaError_t error, const char* who) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would be told of it
  std::string message = std::string(who) + ": expected the launch to succeed, got '" + cudaGetErrorString(error) + "'";
  if (error == cudaErrorNoKernelImageForDevice)
    message += "; this build has no code for this GPU, rebuild with its architecture in TORCH_CUDA_ARCH_LIST";
  throw std::runtime_error(message + ".");
}

inline int current_device(const char* who) {
  int device = 0;
  check(cudaGetDevice(&device), who);
  return device;
}

// What `ask` finds for a key, once in a process: between two launches the driver would be asked the same again and again.
template <class Key, class Value>
class Remembered {
 public:
  template <class Ask>
  Value operator()(const Key& key, const Ask& ask) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto known = values_.find(key);
    return known != values_.end() ? known->second : values_.emplace(key, ask()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> values_;
};

// Of the current device.
inline DeviceLimits device_limits(const char* who) {
  static auto* known = new Remembered<int, DeviceLimits>;  // outlives every tape, whatever order a process ends in
  const int device = current_device(who);
  return (*known)(device, [&] {
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, name, device), who);
      return value;
    };
    return DeviceLimits{static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
                        static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)), attribute(cudaDevAttrClusterLaunch) != 0};
  });
}

inline cudaFuncAttributes attributes(const void* kernel, const char* who) {
  cudaFuncAttributes found{};
  check(cudaFuncGetAttributes(&found, kernel), who);
  return found;
}

using KernelOnDevice = std::pair<const void*, int>;

// Whether the kernel's code on the current device has what `cluster_arrive` and the like do. A device that runs clusters also runs code compiled from
// PTX of architectures that have none, where they do nothing.
template <class Kernel>
bool has_cluster_code(Kernel* kernel, const char* who) {
  static auto* known = new Remembered<KernelOnDevice, bool>;
  const auto* function = reinterpret_cast<const void*>(kernel);
  return (*known)({function, current_device(who)}, [&] { return attributes(function, who).ptxVersion >= 90; });
}

// Allows blocks of the kernel `shared` bytes beyond the 48 KB that all may have, by allowing all that its static memory leaves, once: a number of
// bytes would be taken back by another host thread whose launch needs fewer. Those 48 KB hold a kernel's static memory too, which `shared` does not
// count: asked for from 32 KB on, which leaves 16 KB for it, more than any kernel with both has.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t shared, const char* who) {
  if (shared <= (32 << 10)) return;
  static auto* allowed = new Remembered<KernelOnDevice, size_t>;
  const auto* function = reinterpret_cast<const void*>(kernel);
  (*allowed)({function, current_device(who)}, [&] {
    const size_t most = device_limits(who).shared_bytes - attributes(function, who).sharedSizeBytes;
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)), who);
    return most;
  });
}

// Launches kernel<<<blocks, threads, shared bytes, stream>>>(arguments...), arguments converted to the kernel's parameter types.
template <class... Parameters, class... Arguments>
void launch(const Context& ctx, const char* who, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, Arguments... arguments) {
  allow_shared(kernel, shared, who);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(ctx.stream)>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), who);
}

// As `launch`, with every `cluster` neighbouring blocks as a cluster; for more than one the device must run clusters.
template <class... Parameters, class... Arguments>
void launch_clusters(const Context& ctx, const char* who, void (*kernel)(Parameters...), int cluster, dim3 blocks, dim3 threads, size_t shared,
                     Arguments... arguments) {
  if (cluster == 1) return launch(ctx, who, kernel, blocks, threads, shared, arguments...);
  allow_shared(kernel, shared, who);
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = static_cast<unsigned>(cluster);
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(ctx.stream);
  config.attrs = &shape;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), who);
}

// All threads of the cluster: what each wrote to shared memory before it arrived is seen by all that have waited. Between the two a thread may go on.
// Only kernels that were launched in clusters of several blocks call them, which has_cluster_code must allow.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

// Where another block of the cluster has what this one has at `own`, in shared memory that is sized at launch.
template <class T>
__device__ const T* of_block_in_cluster(const T* own, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const T*>(__cluster_map_shared_rank(own, static_cast<unsigned>(rank)));
#else
  return own;
#endif
}

}  // namespace infl::cuda
#endif

namespace infl::cuda {

constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 132 * 16;  // loops that stride over the grid need no more to fill the largest GPU
constexpr int64_t kMaxGridY = 65535;      // of the second and third axis of a grid

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a one-dimensional launch whose threads stride over `size` items.
inline dim3 blocks_for(int64_t size, int threads) { return dim3(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(size, threads), 1, kMaxBlocks))); }

// Sum over the 32 lanes of a warp, in every lane; all lanes must call it. The order is fixed.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
__device__ inline T warp_max(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    value = value > other ? value : other;
  }
  return value;
}

}  // namespace infl::cuda
