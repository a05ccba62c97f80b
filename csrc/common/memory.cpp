#include "common/memory.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <pthread.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "common/out_of_memory.h"
#include "common/pages.h"

namespace infl {

namespace {

constexpr int64_t kMostKept = int64_t{1} << 30;
constexpr int64_t kShareOfMemory = 16;
constexpr size_t kMostBlocks = 128;  // that a search passes

// Physical memory, or what a control group leaves of it (version 2, version 1).
int64_t usable_memory() {
  int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit = 0;
    if (std::ifstream(path) >> limit) bytes = std::min(bytes, limit);
  }
  return bytes;
}

int64_t first_limit() {
  const char* wanted = std::getenv("INFLUENCE_EXT_CACHE_LIMIT");
  if (wanted == nullptr) return std::min(kMostKept, usable_memory() / kShareOfMemory);
  int64_t bytes = -1;
  const char* end = wanted + std::strlen(wanted);
  const auto [rest, error] = std::from_chars(wanted, end, bytes);
  if (error != std::errc() || rest != end || bytes < 0) {
    throw std::invalid_argument(std::string("INFLUENCE_EXT_CACHE_LIMIT: expected a number of bytes, 0 or more, got '") + wanted +
                                "'; correct or unset it.");
  }
  return bytes;
}

class Cache {
 public:
  Cache() : limit_(first_limit()) { kept_.reserve(kMostBlocks + 1); }

  Block take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto found = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      // Of several that fit equally well the youngest, which is likeliest to lie in the processor's cache.
      if (it->bytes >= bytes && it->bytes - bytes <= it->bytes / 5 && (found == kept_.end() || it->bytes <= found->bytes)) found = it;
    }
    if (found == kept_.end()) return {};
    const Block block = *found;
    kept_.erase(found);
    bytes_ -= static_cast<int64_t>(block.bytes);
    return block;
  }

  void keep(Block block) {
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    bytes_ += static_cast<int64_t>(block.bytes);
    shrink(limit_, kMostBlocks);
  }

  CacheSize size() {
    const std::lock_guard lock(mutex_);
    return {bytes_, limit_};
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    shrink(limit_, kMostBlocks);
  }

  void empty() {
    const std::lock_guard lock(mutex_);
    shrink(0, 0);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // The oldest first; of these one larger than all that may be kept would take the others with it, so it goes before them.
  void shrink(int64_t limit, size_t blocks) {
    if (!kept_.empty() && static_cast<int64_t>(kept_.back().bytes) > limit) release(kept_.end() - 1);
    while (bytes_ > limit || kept_.size() > blocks) release(kept_.begin());
  }
  void release(std::vector<Block>::iterator block) {
    bytes_ -= static_cast<int64_t>(block->bytes);
    std::free(block->data);
    kept_.erase(block);
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // in the order in which they were given back
  int64_t bytes_ = 0, limit_;
};

// Never destroyed: tensors may outlive every static object. Held during a fork, so that the child finds it whole.
Cache& cache() {
  static Cache& only = *[] {
    auto* made = new Cache;
    pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });
    return made;
  }();
  return only;
}

}  // namespace

Block take_block(size_t bytes) {
  const size_t rounded = std::max<size_t>(64, (bytes + 63) / 64 * 64);
  if (rounded >= kSmallestKeptBlock) {
    if (const Block kept = cache().take(rounded); kept.data != nullptr) return kept;
  }
  Block fresh{std::aligned_alloc(64, rounded), rounded};
  if (fresh.data == nullptr) {
    empty_cache();
    fresh.data = std::aligned_alloc(64, rounded);
  }
  if (fresh.data == nullptr) throw OutOfMemory(static_cast<int64_t>(bytes), "on the CPU");
  prefer_large_pages(fresh.data, fresh.bytes);
  return fresh;
}

void give_back(Block block) noexcept {
  if (block.bytes >= kSmallestKeptBlock) {
    cache().keep(block);
  } else {
    std::free(block.data);
  }
}

CacheSize cache_size() { return cache().size(); }

void set_cache_limit(int64_t bytes) { cache().set_limit(bytes); }

void empty_cache() {
  cache().empty();
#ifdef __GLIBC__
  malloc_trim(0);  // blocks of less than 32 MB may have come from its heap, which keeps what it is given
#endif
}

}  // namespace infl
