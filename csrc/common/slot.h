// Slot: a parameter or constant that nodes read.
#pragma once

#include <cstdint>

namespace infl {

// `offset` is its place in the flat vector of parameters, −1 if it is not differentiated.
struct Slot {
  int64_t size = 0;
  int64_t offset = -1;
};

}  // namespace infl
