// torch's tensors as the core takes them: pointers that were checked, and the context of the device they lie on.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/extension.h>

#include <memory>

#include "common/context.h"
#include "common/launch_graph.h"
#include "common/memory.h"

#ifdef INFL_WITH_CUDA
#include "bindings_cuda.h"
#endif

namespace infl {

// What stands in for a GPU in the tests (emulation/): takes CPU tensors for a device's. Null unless switched on.
inline DeviceRuntime* emulated_runtime = nullptr;
inline LaunchRecorder* emulated_recorder = nullptr;

// What a call runs in: a device made current, its stream, and the threads of the CPU.
struct Run {
  explicit Run(at::Device device, Precision precision = Precision::full) : guard(device), ctx(context(device)) { ctx.precision = precision; }

  static Context context(at::Device device) {
    if (device.is_cpu()) {
      if (emulated_runtime != nullptr) return {.device = Device::cuda, .runtime = emulated_runtime};
      return {.num_threads = at::get_num_threads()};
    }
#ifdef INFL_WITH_CUDA
    if (device.is_cuda()) return cuda_context(device);
#endif
    TORCH_CHECK(false, "influence_ext: expected tensors on a device this build has kernels for, got ", device,
                "; move model and data to the CPU, or build with INFLUENCE_EXT_CUDA=1 against a CUDA build of torch.");
  }

  c10::OptionalDeviceGuard guard;
  Context ctx;
};

// Of the device that a context is for; null on the CPU.
inline LaunchRecorder* launch_recorder([[maybe_unused]] const Context& ctx) {
#ifdef INFL_WITH_CUDA
  if (ctx.runtime != nullptr && ctx.runtime != emulated_runtime) return cuda_recorder(ctx);
#endif
  return ctx.runtime == nullptr ? nullptr : emulated_recorder;
}

// For what only the CPU has a kernel for, whatever stands in for a device.
inline Context cpu_context() { return {.num_threads = at::get_num_threads()}; }

inline at::Device torch_device(const Context& ctx) {
#ifdef INFL_WITH_CUDA
  if (ctx.runtime != nullptr && ctx.runtime != emulated_runtime) return cuda_device(ctx);
#endif
  return at::kCPU;
}

template <class T>
constexpr at::ScalarType scalar_type() {
  return std::is_same_v<T, float> ? at::kFloat : at::kDouble;
}

template <class T>
const T* data(const at::Tensor& t, int64_t size, at::Device device, const char* what) {
  TORCH_CHECK(t.device() == device && t.is_contiguous() && t.scalar_type() == scalar_type<T>() && t.numel() == size, what, ": expected a contiguous ",
              scalar_type<T>(), " tensor of ", size, " elements on ", device, ", got ", t.toString(), " of ", t.numel(), " on ", t.device(),
              t.is_contiguous() ? "" : ", not contiguous", ".");
  return t.const_data_ptr<T>();
}

// Memory of results from the core's blocks, which serve again (common/memory.h). torch's profiler of memory hears of them as of its own.
class BlockAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>();
    *block = take_block(bytes);
    void* data = block->data;
    c10::profiledCPUMemoryReporter().New(data, block->bytes);
    return {data, block.release(), &release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Never destroyed, as torch's own: a storage that grows asks the allocator that it came from.
  static BlockAllocator* get() {
    static auto* const only = new BlockAllocator;
    return only;
  }

 private:
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    give_back(*block);
  }
};

template <class T>
at::Tensor empty(at::IntArrayRef shape, at::Device device) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(shape)) * sizeof(T);
  if (!device.is_cpu() || bytes < kSmallestKeptBlock) return at::empty(shape, at::TensorOptions().dtype(scalar_type<T>()).device(device));
  return at::detail::empty_generic(shape, BlockAllocator::get(), c10::DispatchKeySet(c10::DispatchKey::CPU), scalar_type<T>(), std::nullopt);
}

}  // namespace infl
