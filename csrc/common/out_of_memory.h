// An allocation that failed, as a sentence. A std::bad_alloc, so it is Python's MemoryError wherever it comes from.
#pragma once

#include <cstdint>
#include <new>
#include <string>

namespace infl {

class OutOfMemory : public std::bad_alloc {
 public:
  // where: "on the CPU", "on cuda:0"; free_bytes: -1 where that is not known.
  OutOfMemory(int64_t bytes, const std::string& where, int64_t free_bytes = -1)
      : message_("influence_ext: expected " + std::to_string(bytes) + " bytes for one buffer " + where + ", got none" +
                 (free_bytes >= 0 ? " (" + std::to_string(free_bytes) + " bytes are free there)" : std::string()) +
                 "; give memory_budget=, or pass fewer right-hand sides or fewer examples in one call.") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace infl
