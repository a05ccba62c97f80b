// A block for each set, one launch for all: its threads sum the values, its warps clear the rows that are dropped. Reads 1 byte and sizeof(T) an
// example; a row is written only where it is dropped, which few are.
#include "kernels/drop.h"

#include "kernels/cuda/launch.h"

namespace infl {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void drop_kernel(int64_t S, int64_t N, int64_t C, const bool* kept, const T* value, T* gradient, T* total) {
  __shared__ double of_warp[kThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t s = blockIdx.x; s < S; s += gridDim.x) {
    double sum = 0;
    for (int64_t n = threadIdx.x; n < N; n += kThreads) sum += kept[s * N + n] ? static_cast<double>(value[s * N + n]) : 0.0;
    for (int64_t n = warp; n < N; n += kThreads / kWarp) {
      if (kept[s * N + n]) continue;
      for (int64_t c = lane; c < C; c += kWarp) gradient[(s * N + n) * C + c] = T(0);
    }
    sum = warp_sum(sum);
    __syncthreads();  // the set before has been read
    if (lane == 0) of_warp[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int w = 1; w < kThreads / kWarp; ++w) sum += of_warp[w];
    total[s] = static_cast<T>(sum);
  }
}

template <class T>
void drop(const Context& ctx, int64_t S, int64_t N, int64_t C, const bool* kept, const T* value, T* gradient, T* total) {
  if (S == 0) return;
  const auto blocks = static_cast<unsigned>(std::min(S, kMaxBlocks));
  launch(ctx, "drop", &drop_kernel<T>, dim3(blocks), dim3(kThreads), 0, S, N, C, kept, value, gradient, total);
}

INFL_REGISTER_CUDA(drop_stub, drop)

}  // namespace
}  // namespace cuda
}  // namespace infl
