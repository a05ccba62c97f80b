// Memory of the CPU in blocks. Large ones that are given back are kept, and serve again: their pages have been touched, and touching fresh ones
// takes several times as long as writing what they are for.
//
// A block is kept until another needs its room, oldest first, or until `empty_cache`. It serves requests of 4/5 of its size or more.
#pragma once

#include <cstddef>
#include <cstdint>

namespace infl {

// Smaller blocks are left to malloc, which by default hands back to the system what is larger (M_MMAP_THRESHOLD).
inline constexpr size_t kSmallestKeptBlock = 128 << 10;

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

// At least so many bytes, aligned to 64, not initialised. Where the system has none, what is kept goes back to it first; then OutOfMemory.
Block take_block(size_t bytes);
// From any thread, and after any static object's end.
void give_back(Block block) noexcept;

struct CacheSize {
  int64_t bytes = 0, limit = 0;
};
// What is kept, and how much it may be: INFLUENCE_EXT_CACHE_LIMIT in bytes, else 1 GiB or 1/16 of the memory that this process may use if
// that is less. Raises std::invalid_argument where the variable is no such number.
CacheSize cache_size();
void set_cache_limit(int64_t bytes);
void empty_cache();  // to the system

}  // namespace infl
