// torch's tensors as the core takes them: pointers that were checked, and the context of the device they lie on.
#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include "common/context.h"
#include "common/launch_graph.h"
#include "common/pages.h"

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

template <class T>
at::Tensor empty(at::IntArrayRef shape, at::Device device) {
  at::Tensor fresh = at::empty(shape, at::TensorOptions().dtype(scalar_type<T>()).device(device));
  if (device.is_cpu()) prefer_large_pages(fresh.mutable_data_ptr(), fresh.nbytes());
  return fresh;
}

}  // namespace infl
