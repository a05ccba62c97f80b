// Macros shared by host and device code.
#pragma once

#ifdef __CUDACC__
#define INFL_HD __host__ __device__ inline
#define INFL_UNROLL(n) _Pragma("unroll")
#else
// Always inlined: CPU kernels are compiled for several instruction sets, and of functions of one name the linker would keep one set's.
#define INFL_HD inline __attribute__((always_inline))
#define INFL_PRAGMA(text) _Pragma(#text)
#define INFL_UNROLL(n) INFL_PRAGMA(GCC unroll n)
#endif

#define INFL_CONCAT_(a, b) a##b
#define INFL_CONCAT(a, b) INFL_CONCAT_(a, b)
