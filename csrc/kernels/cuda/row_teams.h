// Rows taken by a team each, a warp or a block, whose threads keep their elements in registers from one pass to the next: every element is read once.
// Rows that are too long for that are read once a pass, from the caches where they still have them.
#pragma once

#include <type_traits>

#include "kernels/cuda/vector.h"

namespace infl::cuda::row_teams {

constexpr int kThreads = 256;

// Elements of a row that a thread keeps: 64 bytes of each array.
template <class T>
constexpr int kKept = 64 / static_cast<int>(sizeof(T));

// Sums over a team of kTeam threads, a warp or the whole block, in every thread of it.
template <int kTeam, int kSums, class T>
__device__ void team_sums(T (&values)[kSums]) {
  INFL_UNROLL(20)
  for (int s = 0; s < kSums; ++s) values[s] = warp_sum(values[s]);
  if constexpr (kTeam > kWarp) {
    __shared__ T partial[kSums][kTeam / kWarp];
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
      INFL_UNROLL(20)
      for (int s = 0; s < kSums; ++s) partial[s][threadIdx.x / kWarp] = values[s];
    }
    __syncthreads();
    INFL_UNROLL(20)
    for (int s = 0; s < kSums; ++s) {
      values[s] = partial[s][0];
      for (int k = 1; k < kTeam / kWarp; ++k) values[s] += partial[s][k];
    }
  }
}

// body(step, j) for the elements j of a row that are this thread's, W at a time; as many steps as kSteps says, of which each has registers of its
// own and j is an int, or with kSteps = 0 as many as the row has.
template <int kTeam, int W, int kSteps, class Body>
__device__ void for_each_of_row(int64_t size, const Body& body) {
  const int first = static_cast<int>(threadIdx.x) % kTeam * W;
  if constexpr (kSteps > 0) {
    INFL_UNROLL(16)
    for (int step = 0; step < kSteps; ++step) {
      if (first + step * kTeam * W < size) body(step, first + step * kTeam * W);
    }
  } else {
    for (int64_t j = first; j < size; j += kTeam * W) body(0, j);
  }
}

// The number of the thread's row, which no team may have.
template <int kTeam>
__device__ int64_t team_index() {
  return int64_t{blockIdx.x} * (kThreads / kTeam) + threadIdx.x / kTeam;
}

// Blocks for as many rows.
template <int kTeam>
dim3 teams(int64_t count) {
  return dim3(static_cast<unsigned>(ceil_div(count, kThreads / kTeam)));
}

// Whose a row is, and whether they keep it: calls body with the team, the elements of a step and the steps, as compile-time numbers.
template <class T, class Body>
void choose_team(int64_t size, bool vectorised, const Body& body) {
  const auto of_width = [&]<int W>(std::integral_constant<int, W>) {
    if (size <= kWarp * kKept<T>) {
      body.template operator()<kWarp, W, kKept<T> / W>();
    } else if (size <= kThreads * kKept<T>) {
      body.template operator()<kThreads, W, kKept<T> / W>();
    } else {
      body.template operator()<kThreads, W, 0>();
    }
  };
  constexpr int W = kVectorWidth<T>;
  vectorised&& size % W == 0 ? of_width(std::integral_constant<int, W>{}) : of_width(std::integral_constant<int, 1>{});
}

}  // namespace infl::cuda::row_teams
