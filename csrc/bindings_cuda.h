// CUDA tensors for the core: torch's streams, caching allocator and cuBLAS handles. In builds with CUDA only.
#pragma once

#include <c10/core/Device.h>

#include "common/context.h"
#include "common/launch_graph.h"

namespace infl {

// Of the device's current stream; the device must be current.
Context cuda_context(at::Device device);
at::Device cuda_device(const Context& ctx);
LaunchRecorder* cuda_recorder(const Context& ctx);

}  // namespace infl
