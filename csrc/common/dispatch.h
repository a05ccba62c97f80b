// Kernel stubs: a kernel is declared once, registered by each backend's file, and called without the caller knowing the device.
//
//   kernels/scale.h        template <class T> inline KernelStub<void(const Context&, int64_t, T*)> scale_stub{"scale"};
//   kernels/cpu/scale.cpp  INFL_REGISTER_CPU(scale_stub, scale)      // scale<T> defined in this file, for float and double
//   a rule                 scale_stub<T>(ctx, n, x);
#pragma once

#include <stdexcept>
#include <string>

#include "common/context.h"
#include "common/macros.h"

namespace infl {

template <class Signature>
class KernelStub;

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

 private:
  const char* name_;
  Function cpu_[kNumIsas] = {};
  Function cuda_ = nullptr;
};

}  // namespace infl

// Each kernels/cpu file is compiled once per instruction set, with INFL_ISA naming it (setup.py).
#define INFL_REGISTER_CPU(stub, fn)                                         \
  [[maybe_unused]] static const bool INFL_CONCAT(fn, _is_registered) = [] { \
    ::infl::stub<float>.set_cpu(::infl::Isa::INFL_ISA, &fn<float>);         \
    ::infl::stub<double>.set_cpu(::infl::Isa::INFL_ISA, &fn<double>);       \
    return true;                                                            \
  }();
