// Vector types of the instruction set this file is compiled for.
// Included only by kernels/cpu/*.cpp, each compiled once per instruction set with INFL_ISA and INFL_VECTOR_BYTES set (setup.py).
#pragma once

#include <cstdint>

#ifndef INFL_ISA
#error "kernels/cpu files are compiled once per instruction set with INFL_ISA defined; see setup.py"
#endif

namespace infl {
namespace INFL_ISA {

template <class T>
struct VecOf;

template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(INFL_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(INFL_VECTOR_BYTES), aligned(4), may_alias));
};

template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(INFL_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(INFL_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline constexpr int kLanes = INFL_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
inline __attribute__((always_inline)) Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

}  // namespace INFL_ISA
}  // namespace infl
