#include "bindings_cuda.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>

#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/out_of_memory.h"

namespace infl {

namespace {

int narrow(int64_t value, const char* what) {
  TORCH_CHECK(value <= std::numeric_limits<int>::max(), "influence_ext: expected ", what, " of a matrix below 2^31, got ", value,
              "; give a memory_budget so that fewer examples are multiplied at a time.");
  return static_cast<int>(value);
}

// torch sets the handle's math mode from its global flags; the precision asked for here must not depend on them.
class MathMode {
 public:
  explicit MathMode(cublasHandle_t handle) : handle_(handle) {
    TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle_, &before_));
    TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle_, CUBLAS_DEFAULT_MATH));
  }
  ~MathMode() { cublasSetMathMode(handle_, before_); }
  MathMode(const MathMode&) = delete;
  MathMode& operator=(const MathMode&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_;
};

class TorchRuntime final : public DeviceRuntime {
 public:
  explicit TorchRuntime(at::Device device) : device_(device) {}

  at::Device device() const { return device_; }

  void* allocate(int64_t bytes, void* stream) override {
    if (bytes == 0) return nullptr;
    try {
      return c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(bytes, static_cast<cudaStream_t>(stream));
    } catch (const c10::OutOfMemoryError&) {  // its caches were emptied before it gave up
      size_t free_bytes = 0, all_bytes = 0;
      const bool known = cudaMemGetInfo(&free_bytes, &all_bytes) == cudaSuccess;
      throw OutOfMemory(bytes, "on " + device_.str(), known ? static_cast<int64_t>(free_bytes) : -1);
    }
  }
  void release(void* p) noexcept override {
    if (p != nullptr) c10::cuda::CUDACachingAllocator::raw_delete(p);
  }
  void upload(void* to, const void* from, int64_t bytes, void* stream) override {
    // From pageable memory: staged before the call returns.
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
  }
  void download(void* to, const void* from, int64_t bytes, void* stream) override {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
    C10_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
  }
  void multiply(const MatrixProduct<float>& p, Precision precision, void*) override {
    const cublasComputeType_t compute = precision == Precision::tf32       ? CUBLAS_COMPUTE_32F_FAST_TF32
                                        : precision == Precision::bfloat16 ? CUBLAS_COMPUTE_32F_FAST_16BF
                                                                           : CUBLAS_COMPUTE_32F;
    product(p, CUDA_R_32F, compute);
  }
  void multiply(const MatrixProduct<double>& p, Precision, void*) override { product(p, CUDA_R_64F, CUBLAS_COMPUTE_64F); }

 private:
  // Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ: the operands change places, and what is stored row by row counts as not transposed.
  template <class T>
  static void product(const MatrixProduct<T>& p, cudaDataType_t type, cublasComputeType_t compute) {
    const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
    const MathMode mode(handle);
    const T one = 1, beta = p.accumulate ? 1 : 0;
    TORCH_CUDABLAS_CHECK(cublasGemmStridedBatchedEx(
        handle, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, narrow(p.N, "columns"), narrow(p.M, "rows"),
        narrow(p.K, "terms"), &one, p.b, type, narrow(p.ldb, "a leading dimension"), p.b_batch, p.a, type, narrow(p.lda, "a leading dimension"),
        p.a_batch, &beta, p.c, type, narrow(p.ldc, "a leading dimension"), p.c_batch, narrow(p.batch, "products"), compute, CUBLAS_GEMM_DEFAULT));
  }

  at::Device device_;
};

TorchRuntime& runtime_of(at::DeviceIndex index) {
  static std::mutex mutex;
  static auto* runtimes = new std::vector<std::unique_ptr<TorchRuntime>>;  // outlives every tape, whatever order a process ends in
  const std::lock_guard<std::mutex> guard(mutex);
  if (runtimes->size() <= static_cast<size_t>(index)) runtimes->resize(index + 1);
  auto& runtime = (*runtimes)[index];
  if (!runtime) runtime = std::make_unique<TorchRuntime>(at::Device(at::kCUDA, index));
  return *runtime;
}

}  // namespace

Context cuda_context(at::Device device) {
  const auto stream = at::cuda::getCurrentCUDAStream(device.index());
  return {.device = Device::cuda, .runtime = &runtime_of(device.index()), .stream = stream.stream()};
}

at::Device cuda_device(const Context& ctx) { return static_cast<const TorchRuntime*>(ctx.runtime)->device(); }

}  // namespace infl
