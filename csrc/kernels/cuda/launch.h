// What every CUDA kernel file includes: the language (or its emulation on a CPU, for tests), launching with error reports, and registration.
// No torch header. A file must compile both by nvcc and, with INFL_EMULATED_CUDA, by a C++ compiler: no <<<>>>, shared memory sized at launch only
// through INFL_DYNAMIC_SHARED, and of the intrinsics those that tests/emulation/cuda.h has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/buffer.h"
#include "common/dispatch.h"

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
  std::string message = std::string(who) + ": expected the launch to succeed, got '" + cudaGetErrorString(error) + "'";
  if (error == cudaErrorNoKernelImageForDevice)
    message += "; this build has no code for this GPU, rebuild with its architecture in TORCH_CUDA_ARCH_LIST";
  throw std::runtime_error(message + ".");
}

// Launches kernel<<<blocks, threads, shared bytes, stream>>>(arguments...), arguments converted to the kernel's parameter types.
template <class... Parameters, class... Arguments>
void launch(const Context& ctx, const char* who, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, Arguments... arguments) {
  if (shared > (48 << 10)) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), who);
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(ctx.stream)>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), who);
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
