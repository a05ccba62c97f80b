#include "common/context.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace infl {

namespace {

struct Choice {
  const char* name;
  Isa isa;
  bool bfloat16;
};

constexpr Choice kChoices[] = {
    {"baseline", Isa::baseline, false}, {"avx2", Isa::avx2, false}, {"avx512", Isa::avx512, false}, {"avx512_bf16", Isa::avx512, true}};

// How many of the choices this processor offers: each has what those before it have.
int num_offered() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
#else
  return 1;
#endif
}

const Choice& choose() {
  const int offered = num_offered();
  const char* wanted = std::getenv("INFLUENCE_EXT_ISA");
  if (wanted == nullptr) return kChoices[offered - 1];
  for (int i = 0; i < offered; ++i) {
    if (std::strcmp(wanted, kChoices[i].name) == 0) return kChoices[i];
  }
  throw std::invalid_argument(std::string("INFLUENCE_EXT_ISA: expected baseline, avx2, avx512 or avx512_bf16, at most ") +
                              kChoices[offered - 1].name + " on this processor, got '" + wanted + "'; correct or unset it.");
}

const Choice& chosen() {
  static const Choice& choice = choose();
  return choice;
}

}  // namespace

Isa active_isa() { return chosen().isa; }

const char* active_isa_name() { return chosen().name; }

bool multiplies_bfloat16() { return chosen().bfloat16; }

}  // namespace infl
