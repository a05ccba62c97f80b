// Owned memory of a device, aligned to 64 bytes or more, not initialised.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/context.h"
#include "common/memory.h"

namespace infl {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Context& ctx, int64_t size) { resize(ctx, size); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // Contents are lost when it grows or moves to another device; never shrinks.
  void resize(const Context& ctx, int64_t size) {
    if (size <= size_ && (size == 0 || ctx.runtime == runtime_)) return;
    release();
    const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
    if (ctx.runtime != nullptr) {
      data_ = static_cast<T*>(ctx.runtime->allocate(static_cast<int64_t>(bytes), ctx.stream));
    } else {
      block_ = take_block(bytes);
      data_ = static_cast<T*>(block_.data);
    }
    runtime_ = ctx.runtime;
    size_ = size;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

 private:
  void release() {
    if (runtime_ != nullptr) {
      runtime_->release(data_);
    } else {
      give_back(block_);
    }
    block_ = {};
    data_ = nullptr;
    size_ = 0;
    runtime_ = nullptr;
  }
  void swap(Buffer& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(runtime_, other.runtime_);
  }
  Block block_;  // on the CPU
  T* data_ = nullptr;
  int64_t size_ = 0;
  DeviceRuntime* runtime_ = nullptr;  // null: the CPU's
};

// Host numbers as the device reads them.
template <class T>
Buffer<T> upload(const Context& ctx, const std::vector<T>& from) {
  Buffer<T> to(ctx, static_cast<int64_t>(from.size()));
  if (from.empty()) return to;
  if (ctx.runtime != nullptr) {
    ctx.runtime->upload(to.data(), from.data(), to.bytes(), ctx.stream);
  } else {
    std::copy(from.begin(), from.end(), to.data());
  }
  return to;
}

// The reverse; waits for the device.
template <class T>
std::vector<T> download(const Context& ctx, const T* from, int64_t size) {
  std::vector<T> to(size);
  if (size == 0) return to;
  if (ctx.runtime != nullptr) {
    ctx.runtime->download(to.data(), from, size * static_cast<int64_t>(sizeof(T)), ctx.stream);
  } else {
    std::copy(from, from + size, to.data());
  }
  return to;
}

}  // namespace infl
