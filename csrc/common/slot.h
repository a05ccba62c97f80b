// Slot: a parameter or constant that nodes read, or a run of a parameter's elements.
#pragma once

#include <cstdint>

namespace infl {

// `offset` is its place in the flat vector of parameters, −1 if it is not differentiated. Slots may overlap (tied weights, slices of a parameter):
// `region` is the run of elements that a slot covers together with all that overlap it, directly or by way of others (Plan finds it).
struct Slot {
  int64_t size = 0;
  int64_t offset = -1;
  struct Region {
    int64_t begin = -1, size = 0;
  } region = {};
};

}  // namespace infl
