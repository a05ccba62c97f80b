#include "common/build_info.h"

#include <omp.h>

#include "common/context.h"

namespace infl {

std::map<std::string, std::string> build_info() {
  // Seen, not believed: without -fopenmp this region runs on one thread without a word.
  int threads = 0;
#pragma omp parallel
  {
#pragma omp single
    threads = omp_get_num_threads();
  }
  return {
      {"compiler", "g++ " __VERSION__},
      {"openmp", std::to_string(_OPENMP)},
      {"openmp_threads", std::to_string(threads)},
      {"instruction_sets", "baseline avx2 avx512 avx512_bf16"},
      {"active_instruction_set", active_isa_name()},
      {"float32_lanes", std::to_string(vector_bytes(active_isa()) / 4)},
      {"bfloat16_products", multiplies_bfloat16() ? "two terms an instruction" : "operands rounded, multiplied as float32"},
      {"instruction_set_override", "INFLUENCE_EXT_ISA"},
#ifdef INFL_WITH_CUDA
      {"cuda", "yes"},
#else
      {"cuda", "no (this build has no CUDA kernels)"},
#endif
  };
}

}  // namespace infl
