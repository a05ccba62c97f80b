// Class indices as the losses take them.
#pragma once

#include <cstdint>

namespace infl {

// out[i] = target[i], or -1 where it is `ignored`; returns the first i whose target is neither ignored nor in [0, K), or -1.
inline int64_t class_indices(int64_t size, const int64_t* target, int64_t ignored, int64_t K, int64_t* out) {
  for (int64_t i = 0; i < size; ++i) {
    const int64_t t = target[i];
    if (t != ignored && (t < 0 || t >= K)) return i;
    out[i] = t == ignored ? -1 : t;
  }
  return -1;
}

}  // namespace infl
