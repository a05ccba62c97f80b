// Memory for the length of a block of code. On the CPU a thread takes it from its own stack of buffers and puts it back, because memory that was
// touched before is several times faster than fresh pages (up to a size that is worth holding on to); on a device the runtime's caching allocator
// serves it in the stream's order.
#pragma once

#include <utility>
#include <vector>

#include "common/buffer.h"

namespace infl {

template <class T>
class Scratch {
 public:
  Scratch(const Context& ctx, int64_t size) : pooled_(ctx.runtime == nullptr) {
    if (pooled_ && !pool().empty()) {
      buffer_ = std::move(pool().back());
      pool().pop_back();
    }
    buffer_.resize(ctx, size);
  }
  ~Scratch() {
    constexpr int64_t kHeldBytes = 128 << 20;
    if (!pooled_ || buffer_.bytes() > kHeldBytes) return;
    try {
      pool().push_back(std::move(buffer_));
    } catch (...) {  // no room to remember it: freed instead
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return buffer_.data(); }

 private:
  // Taken and put back in the order of a stack, so a place in the code meets the same buffer again.
  static std::vector<Buffer<T>>& pool() {
    static thread_local std::vector<Buffer<T>> buffers;
    return buffers;
  }

  Buffer<T> buffer_;
  bool pooled_;
};

}  // namespace infl
