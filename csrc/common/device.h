// A device other than the CPU, as the core sees it: memory, copies, and the vendor's matrix product. Implemented on torch's allocator, streams and
// cuBLAS handles by bindings_cuda.cpp, and on plain host memory by the tests (emulation/). Everything is ordered by the stream it is given.
#pragma once

#include <cstdint>

namespace infl {

// How float32 operands are multiplied; sums are float32 in all of them. float64 is always float64.
enum class Precision : int { full = 0, tf32 = 1, bfloat16 = 2 };

// C[i] = (accumulate ? C[i] : 0) + A[i] B[i] for i < batch, row-major: A [M, K], B [K, N], C [M, N]. A transposed operand is stored the other way
// round; leading dimensions are of what is stored; a batch stride of 0 shares an operand.
template <class T>
struct MatrixProduct {
  int64_t batch = 1, M = 0, N = 0, K = 0;
  const T *a = nullptr, *b = nullptr;
  T* c = nullptr;
  bool a_transposed = false, b_transposed = false;
  int64_t lda = 0, ldb = 0, ldc = 0;
  int64_t a_batch = 0, b_batch = 0, c_batch = 0;
  bool accumulate = false;
};

class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;

  // Throws OutOfMemory with the bytes wanted and those free if there are not enough.
  virtual void* allocate(int64_t bytes, void* stream) = 0;
  virtual void release(void* p) noexcept = 0;

  // Host memory may be reused as soon as they return, for which both wait for the stream.
  virtual void upload(void* to, const void* from, int64_t bytes, void* stream) = 0;
  virtual void download(void* to, const void* from, int64_t bytes, void* stream) = 0;

  virtual void multiply(const MatrixProduct<float>& product, Precision precision, void* stream) = 0;
  virtual void multiply(const MatrixProduct<double>& product, Precision precision, void* stream) = 0;
};

}  // namespace infl
