#include "common/device_library.h"

#include <dlfcn.h>

namespace infl {

DeviceLibrary load_device_library(const std::string& path) {
  const std::string who = "load_device_library: ";
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(who + "expected a library of device kernels at " + path + ", got: " + dlerror() + ".");
  const auto function = reinterpret_cast<DeviceLibraryFunction>(dlsym(handle, kDeviceLibrarySymbol));
  if (function == nullptr) throw std::runtime_error(who + "expected " + path + " to export " + kDeviceLibrarySymbol + ", got no such symbol.");
  const DeviceLibrary library = function();
  for (int64_t i = 0; i < library.num_kernels; ++i) {
    const auto installer = device_kernel_installers().find(library.kernels[i].name);
    if (installer == device_kernel_installers().end()) {
      throw std::runtime_error(who + "expected kernels that this build declares, got '" + library.kernels[i].name +
                               "'; rebuild both from one source.");
    }
    installer->second(library.kernels[i]);
  }
  return library;
}

}  // namespace infl
