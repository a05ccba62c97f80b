// A shared library with kernels of a device and the runtime they run on, installed into the stubs of this binary. The tests' emulation is one.
#pragma once

#include <cstdint>
#include <string>

#include "common/dispatch.h"
#include "common/launch_graph.h"

namespace infl {

struct DeviceLibrary {
  DeviceRuntime* runtime = nullptr;
  LaunchRecorder* recorder = nullptr;
  const DeviceKernel* kernels = nullptr;
  int64_t num_kernels = 0;
};

// The function that such a library exports.
inline constexpr char kDeviceLibrarySymbol[] = "influence_ext_device_library";
using DeviceLibraryFunction = DeviceLibrary (*)();

// Loads it (once; it stays) and installs its kernels. Throws std::runtime_error if it is not one, or names a kernel that this binary has not.
DeviceLibrary load_device_library(const std::string& path);

}  // namespace infl
