// Three passes a step: direction (reads r or z, and p; writes p), the two inner products (p, q), update with the residual's norm (reads p, q, x, r;
// writes x, r). Chunks of fixed size are shared between threads, and their sums added up in order.
#include "kernels/krylov.h"

#include <limits>

#include "common/scratch.h"
#include "kernels/cpu/parallel.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr int64_t kChunk = 8192;
constexpr int64_t kBlock = 512;  // elements that are summed in their own type

// body(column, begin, end, chunk's number) for all chunks of running columns.
template <class Body>
void for_each_chunk(const Context& ctx, int64_t V, int64_t P, const CgColumn* columns, const Body& body) {
  const int64_t chunks = (P + kChunk - 1) / kChunk;
  parallel_for(threads_for(ctx, V * P), V * chunks, [&](int64_t task) {
    const int64_t v = task / chunks, begin = task % chunks * kChunk;
    if (columns[v].is_running()) body(v, begin, std::min(P, begin + kChunk), task);
  });
}

template <class T>
double dot(const T* a, const T* b, int64_t size) {
  double sum = 0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t end = std::min(size, first + kBlock);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < end; ++i) part += a[i] * b[i];
    sum += part;
  }
  return sum;
}

double total(const double* parts, int64_t chunks) {
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += parts[c];
  return sum;
}

template <class T>
void cg_direction(const Context& ctx, int64_t V, int64_t P, const T* r, const T* z, T* p, CgColumn* columns) {
  const int64_t chunks = (P + kChunk - 1) / kChunk;
  Scratch<double> scratch(ctx, V * chunks);
  double* parts = scratch.data();
  if (z != nullptr) {
    for_each_chunk(ctx, V, P, columns, [=](int64_t v, int64_t begin, int64_t end, int64_t task) {
      parts[task] = dot(r + v * P + begin, z + v * P + begin, end - begin);
    });
  }
  for (int64_t v = 0; v < V; ++v) {
    if (columns[v].is_running()) columns[v].rz_next = z != nullptr ? total(parts + v * chunks, chunks) : columns[v].rr;
  }
  const T* from = z != nullptr ? z : r;
  for_each_chunk(ctx, V, P, columns, [=](int64_t v, int64_t begin, int64_t end, int64_t) {
    const T beta = static_cast<T>(cg_beta(columns[v], columns[v].rz_next));
    const T* source = from + v * P;
    T* to = p + v * P;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) to[i] = source[i] + beta * to[i];
  });
}

template <class T>
void cg_step(const Context& ctx, int64_t V, int64_t P, double lower, const T* p, const T* q, T* x, T* r, CgColumn* columns) {
  const CgLimits limits{std::numeric_limits<T>::epsilon(), lower};
  const int64_t chunks = (P + kChunk - 1) / kChunk;
  Scratch<double> scratch(ctx, 2 * V * chunks);
  double *first = scratch.data(), *second = first + V * chunks;
  for_each_chunk(ctx, V, P, columns, [=](int64_t v, int64_t begin, int64_t end, int64_t task) {
    const T *a = p + v * P + begin, *b = q + v * P + begin;
    first[task] = dot(a, b, end - begin);
    second[task] = dot(a, a, end - begin);
  });
  for (int64_t v = 0; v < V; ++v) {
    if (!columns[v].is_running()) continue;
    columns[v].curvature = total(first + v * chunks, chunks);
    columns[v].squares = total(second + v * chunks, chunks);
  }
  for_each_chunk(ctx, V, P, columns, [=](int64_t v, int64_t begin, int64_t end, int64_t task) {
    const CgColumn& c = columns[v];
    const T alpha = static_cast<T>(cg_alpha(c, limits, c.curvature, c.squares));
    const T *a = p + v * P, *b = q + v * P;
    T *to = x + v * P, *rest = r + v * P;
    double sum = 0;
    for (int64_t start = begin; start < end; start += kBlock) {
      const int64_t stop = std::min(end, start + kBlock);
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = start; i < stop; ++i) {
        to[i] += alpha * a[i];
        const T left = rest[i] - alpha * b[i];
        rest[i] = left;
        part += left * left;
      }
      sum += part;
    }
    first[task] = sum;
  });
  for (int64_t v = 0; v < V; ++v) {
    if (columns[v].is_running()) cg_judge(columns[v], limits, total(first + v * chunks, chunks));
  }
}

}  // namespace

INFL_REGISTER_CPU(cg_direction_stub, cg_direction)
INFL_REGISTER_CPU(cg_step_stub, cg_step)

}  // namespace INFL_ISA
}  // namespace infl
