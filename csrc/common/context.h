// Where a kernel runs and with how many threads.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace infl {

enum class Device : int { cpu = 0, cuda = 1 };

// Vector instruction sets a CPU kernel is compiled for; chosen once per process, see active_isa().
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

inline constexpr int kNumIsas = 3;

constexpr int vector_bytes(Isa isa) { return isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

// The best instruction set of this processor, or what INFLUENCE_EXT_ISA (baseline | avx2 | avx512 | avx512_bf16) asks for; throws if the
// processor lacks it or the name is unknown.
Isa active_isa();
const char* active_isa_name();

// Whether it is avx512_bf16: avx512 with instructions that multiply bfloat16 (Precision::bfloat16); without them operands are rounded.
bool multiplies_bfloat16();

struct Context {
  Device device = Device::cpu;
  int num_threads = 1;               // threads a kernel may use; 1 inside a schedule that is parallel itself, and on a device
  DeviceRuntime* runtime = nullptr;  // of the device, and the stream that orders what is done on it; null on the CPU
  void* stream = nullptr;
  Precision precision = Precision::full;

  bool on_device() const { return runtime != nullptr; }
};

}  // namespace infl
