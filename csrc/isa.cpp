// Which of the compiled instruction sets this CPU runs.

#include <vector>

#include "supcon.h"

namespace supcon {

#if defined(__x86_64__)
extern const Isa kAvx512, kAvx2, kBaseline;

const std::vector<const Isa*>& available_isas() {
  static const std::vector<const Isa*> isas = [] {
    std::vector<const Isa*> found;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef SUPCON_EMULATE_AVX512
    const bool avx512 = avx2;
#else
    const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
#endif
    if (avx512) found.push_back(&kAvx512);
    if (avx2) found.push_back(&kAvx2);
    found.push_back(&kBaseline);
    return found;
  }();
  return isas;
}
#else
extern const Isa kBaseline;

const std::vector<const Isa*>& available_isas() {
  static const std::vector<const Isa*> isas = {&kBaseline};
  return isas;
}
#endif

}  // namespace supcon
