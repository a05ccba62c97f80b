#include "kernels/drop.h"

#include <algorithm>

#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

template <class T>
void drop(const Context& ctx, int64_t S, int64_t N, int64_t C, const bool* kept, const T* value, T* gradient, T* total) {
  parallel_for(threads_for(ctx, S * N), S, [&](int64_t s) {
    double sum = 0;
    for (int64_t i = s * N; i < (s + 1) * N; ++i) {
      if (kept[i]) {
        sum += static_cast<double>(value[i]);
      } else {
        std::fill_n(gradient + i * C, C, T(0));
      }
    }
    total[s] = static_cast<T>(sum);
  });
}

INFL_REGISTER_CPU(drop_stub, drop)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
