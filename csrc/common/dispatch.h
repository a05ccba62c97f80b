// Kernel stubs: a kernel is declared once, registered by each backend's file, and called without the caller knowing the device.
//
//   kernels/scale.h        template <class T> inline KernelStub<void(const Context&, int64_t, T*)> scale_stub{"scale"};
//   kernels/cpu/scale.cpp  INFL_REGISTER_CPU(scale_stub, scale)      // scale<T> defined in this file, for float and double
//   a rule                 scale_stub<T>(ctx, n, x);
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/context.h"
#include "common/macros.h"

namespace infl {

template <class Signature>
class KernelStub;

// What a device has for a kernel, of no particular signature: for float and for double.
using AnyFunction = void (*)();

struct DeviceKernel {
  const char* name;
  AnyFunction for_float, for_double;
};

// Every kernel of this binary by name: sets what a device has for it. So kernels that live in another library can be installed (emulation/).
using InstallDeviceKernel = void (*)(const DeviceKernel&);

inline std::map<std::string, InstallDeviceKernel>& device_kernel_installers() {
  static std::map<std::string, InstallDeviceKernel> installers;
  return installers;
}

template <class... Args>
class KernelStub<void(const Context&, Args...)> {
 public:
  using Function = void (*)(const Context&, Args...);

  explicit constexpr KernelStub(const char* name) : name_(name) {}

  void operator()(const Context& ctx, Args... args) const {
    Function fn = ctx.device == Device::cpu ? cpu_[static_cast<int>(active_isa())] : cuda_;
    if (fn == nullptr) {
      throw std::runtime_error(std::string(name_) +
                               ": expected an implementation for the requested device, this build has none; rebuild with "
                               "INFLUENCE_EXT_CUDA=1.");
    }
    fn(ctx, args...);
  }

  void set_cpu(Isa isa, Function fn) { cpu_[static_cast<int>(isa)] = fn; }
  void set_cuda(Function fn) { cuda_ = fn; }
  void set_cuda(AnyFunction fn) { cuda_ = reinterpret_cast<Function>(fn); }
  const char* name() const { return name_; }

 private:
  const char* name_;
  Function cpu_[kNumIsas] = {};
  Function cuda_ = nullptr;
};

}  // namespace infl

// A kernel that another library may bring for a device.
#define INFL_MAKE_INSTALLABLE(stub)                                                                         \
  ::infl::device_kernel_installers()[::infl::stub<float>.name()] = [](const ::infl::DeviceKernel& kernel) { \
    ::infl::stub<float>.set_cuda(kernel.for_float);                                                         \
    ::infl::stub<double>.set_cuda(kernel.for_double);                                                       \
  };

// Each kernels/cpu file is compiled once per instruction set, with INFL_ISA naming it (setup.py).
#define INFL_REGISTER_CPU(stub, fn)                                         \
  [[maybe_unused]] static const bool INFL_CONCAT(fn, _is_registered) = [] { \
    ::infl::stub<float>.set_cpu(::infl::Isa::INFL_ISA, &fn<float>);         \
    ::infl::stub<double>.set_cpu(::infl::Isa::INFL_ISA, &fn<double>);       \
    INFL_MAKE_INSTALLABLE(stub)                                             \
    return true;                                                            \
  }();

// Beside the stub, in its header: a kernel that has no implementation for the CPU.
#define INFL_DEVICE_KERNEL(stub)                              \
  inline const bool INFL_CONCAT(stub, _is_installable) = [] { \
    INFL_MAKE_INSTALLABLE(stub)                               \
    return true;                                              \
  }();
