// Memory handed out piece by piece and given back all at once, at the end of a block of code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/scratch.h"

namespace infl {

template <class T>
class Arena {
 public:
  explicit Arena(const Context& ctx) : ctx_(ctx) {}
  ~Arena() {
    while (!blocks_.empty()) blocks_.pop_back();  // in reverse, as a stack of scratch buffers wants it
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `size` elements, aligned to 64 bytes, not initialised.
  T* allocate(int64_t size) {
    constexpr int64_t kLine = 64 / sizeof(T), kFirstBlock = int64_t{32} << 10;
    const int64_t rounded = (size + kLine - 1) / kLine * kLine;
    if (rounded > free_) {
      free_ = std::max({rounded, total_, kFirstBlock});  // each block as large as all before it: few blocks
      total_ += free_;
      blocks_.push_back(std::make_unique<Scratch<T>>(ctx_, free_));
      next_ = blocks_.back()->data();
    }
    T* piece = next_;
    next_ += rounded;
    free_ -= rounded;
    return piece;
  }

 private:
  Context ctx_;
  std::vector<std::unique_ptr<Scratch<T>>> blocks_;
  T* next_ = nullptr;
  int64_t free_ = 0, total_ = 0;
};

}  // namespace infl
