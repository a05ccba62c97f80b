// Macros shared by host and device code.
#pragma once

#ifdef __CUDACC__
#define INFL_HD __host__ __device__ inline
#else
#define INFL_HD inline
#endif

#define INFL_CONCAT_(a, b) a##b
#define INFL_CONCAT(a, b) INFL_CONCAT_(a, b)
