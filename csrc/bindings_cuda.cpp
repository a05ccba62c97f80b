#include "bindings_cuda.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <atomic>
#include <limits>
#include <map>
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

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) cudaGetLastError();  // the default stream, while another thread captures in a way that it would break
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

// A graph, and the memory that its launches use: torch's allocator takes what is allocated on the capturing stream from a pool of the graph's own.
// Not at::cuda::CUDAGraph: when a capture fails, that one leaves the allocator with the pool, and it keeps others from drawing random numbers
// meanwhile.
class CudaGraph final : public LaunchGraph {
 public:
  CudaGraph(c10::DeviceIndex device, std::shared_ptr<void> workspace)
      : device_(device), pool_(at::cuda::graph_pool_handle()), workspace_(std::move(workspace)) {}
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  ~CudaGraph() override {
    try {
      const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);  // whatever this thread captures meanwhile
      if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
      if (owns_pool_) c10::cuda::CUDACachingAllocator::releasePool(device_, pool_);
    } catch (...) {  // the process ends
    }
  }

  void capture(cudaStream_t stream, const std::function<void()>& body) {
    // Before the capture begins, so that nothing that another thread frees in between is recorded as an event in it.
    c10::cuda::CUDACachingAllocator::beginAllocateToPool(device_, pool_, [stream](cudaStream_t other) { return other == stream; });
    owns_pool_ = true;
    cudaGraph_t graph = nullptr;
    try {
      C10_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      body();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);  // the stream is usable again, whatever has become of the capture
      c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool_);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool_);
    C10_CUDA_CHECK(ended);
    size_t count = 0;
    cudaError_t error = cudaGraphGetNodes(graph, nullptr, &count);
    num_launches_ = static_cast<int64_t>(count);
    // The flag is for memory that torch may have the driver allocate inside the graph (its cudaMallocAsync backend).
    if (error == cudaSuccess) error = cudaGraphInstantiateWithFlags(&exec_, graph, cudaGraphInstantiateFlagAutoFreeOnLaunch);
    cudaGraphDestroy(graph);
    C10_CUDA_CHECK(error);
  }
  void replay(void* stream) override { C10_CUDA_CHECK(cudaGraphLaunch(exec_, static_cast<cudaStream_t>(stream))); }
  int64_t num_launches() const override { return num_launches_; }

 private:
  c10::DeviceIndex device_;
  c10::cuda::MempoolId_t pool_;
  bool owns_pool_ = false;
  std::shared_ptr<void> workspace_;
  cudaGraphExec_t exec_ = nullptr;
  int64_t num_launches_ = 0;
};

// What captures run on: a stream of our own, since others may be handed one of torch's, and a cuBLAS handle of our own, since torch's would keep a
// workspace that came from a graph's pool.
struct CaptureStream {
  CaptureStream() {
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    TORCH_CUDABLAS_CHECK(cublasCreate(&handle));
    TORCH_CUDABLAS_CHECK(cublasSetStream(handle, stream));
  }
  cudaStream_t stream = nullptr;
  cublasHandle_t handle = nullptr;
};

class TorchRuntime final : public DeviceRuntime, public LaunchRecorder {
 public:
  explicit TorchRuntime(at::Device device) : device_(device) {}

  at::Device device() const { return device_; }

  bool is_recording(void* stream) override { return is_capturing(stream); }
  std::unique_ptr<LaunchGraph> record(void* stream, const std::function<void()>& body) override {
    const std::lock_guard<std::mutex> guard(recording_);
    if (capture_.load() == nullptr) capture_ = new CaptureStream;  // stays, like its device's runtime
    const CaptureStream& side = *capture_.load();
    const size_t bytes = at::cuda::getChosenWorkspaceSize();  // torch's own: a replay gives the same numbers as the calls it was recorded from
    const std::shared_ptr<void> workspace = workspace_of(stream, bytes);
    auto graph = std::make_unique<CudaGraph>(device_.index(), workspace);
    TORCH_CUDABLAS_CHECK(cublasSetWorkspace(side.handle, workspace.get(), bytes));
    const c10::cuda::CUDAStreamGuard current(c10::cuda::getStreamFromExternal(side.stream, device_.index()));
    graph->capture(side.stream, body);
    return graph;
  }

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
    refuse_capture(stream, "from");
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
    // `from` may go, and threads on other streams, which no event orders behind the copy, may read what it wrote (the lists of a shared plan).
    C10_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
  }
  void download(void* to, const void* from, int64_t bytes, void* stream) override {
    refuse_capture(stream, "to");
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
    C10_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
  }
  void multiply(const MatrixProduct<float>& p, Precision precision, void* stream) override {
    const cublasComputeType_t compute = precision == Precision::tf32       ? CUBLAS_COMPUTE_32F_FAST_TF32
                                        : precision == Precision::bfloat16 ? CUBLAS_COMPUTE_32F_FAST_16BF
                                                                           : CUBLAS_COMPUTE_32F;
    product(p, CUDA_R_32F, compute, stream);
  }
  void multiply(const MatrixProduct<double>& p, Precision, void* stream) override { product(p, CUDA_R_64F, CUBLAS_COMPUTE_64F, stream); }

 private:
  // A copy would be repeated at every replay, from or to host memory that is gone by then.
  static void refuse_capture(void* stream, const char* way) {
    TORCH_CHECK(!is_capturing(stream), "influence_ext: expected launches alone while a CUDA graph is captured, got a copy ", way,
                " the host; run the same call once before the capture, or leave it out.");
  }

  // For the matrix products of all graphs that are replayed on a stream, where they take turns; as long as there is such a graph.
  std::shared_ptr<void> workspace_of(void* stream, size_t bytes) {
    std::shared_ptr<void> workspace = workspaces_[stream].lock();
    if (workspace == nullptr) {
      workspace = {allocate(static_cast<int64_t>(bytes), stream), [this](void* p) { release(p); }};
      workspaces_[stream] = workspace;
    }
    return workspace;
  }

  // Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ: the operands change places, and what is stored row by row counts as not transposed.
  template <class T>
  void product(const MatrixProduct<T>& p, cudaDataType_t type, cublasComputeType_t compute, void* stream) {
    const CaptureStream* side = capture_.load();
    const cublasHandle_t handle = side != nullptr && side->stream == stream ? side->handle : at::cuda::getCurrentCUDABlasHandle();
    const MathMode mode(handle);
    const T one = 1, beta = p.accumulate ? 1 : 0;
    TORCH_CUDABLAS_CHECK(cublasGemmStridedBatchedEx(
        handle, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, narrow(p.N, "columns"), narrow(p.M, "rows"),
        narrow(p.K, "terms"), &one, p.b, type, narrow(p.ldb, "a leading dimension"), p.b_batch, p.a, type, narrow(p.lda, "a leading dimension"),
        p.a_batch, &beta, p.c, type, narrow(p.ldc, "a leading dimension"), p.c_batch, narrow(p.batch, "products"), compute, CUBLAS_GEMM_DEFAULT));
  }

  at::Device device_;
  std::mutex recording_;                             // one capture at a time on a device
  std::atomic<CaptureStream*> capture_ = nullptr;    // made by the first
  std::map<void*, std::weak_ptr<void>> workspaces_;  // of cuBLAS, by the stream of the replays; guarded by recording_
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

LaunchRecorder* cuda_recorder(const Context& ctx) { return static_cast<TorchRuntime*>(ctx.runtime); }

}  // namespace infl
