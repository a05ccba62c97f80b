// An exception must not leave a parallel region: it would end the process. The region keeps the first one, which is thrown after it.
//
//   RegionErrors errors;
//   #pragma omp parallel
//   try { ... } catch (...) { errors.keep(); }
//   errors.rethrow();
#pragma once

#include <exception>
#include <mutex>

namespace infl {

class RegionErrors {
 public:
  // In a catch block, by any thread.
  void keep() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!first_) first_ = std::current_exception();
  }
  // After the region, by the thread that entered it.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }
  explicit operator bool() const noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<bool>(first_);
  }

 private:
  mutable std::mutex mutex_;
  std::exception_ptr first_;
};

}  // namespace infl
