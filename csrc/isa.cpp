// Which of the compiled instruction sets this CPU runs.

#include <vector>

#include "supcon.h"

namespace supcon {

#if defined(__x86_64__) && !defined(SUPCON_BASELINE_ONLY)
extern const Isa kAvx512, kAvx2, kBaseline;
#ifdef SUPCON_BFLOAT16
extern const Functions<float> kBfloat16OfAvx512;

namespace {

bool runs_bfloat16() {
#ifdef SUPCON_EMULATE_AVX512
  return true;
#else
  return __builtin_cpu_supports("avx512bf16");
#endif
}

// Whether registers multiply bfloat16 faster than float32, which not all CPUs with the instruction
// do. The rates are equal or two to one, so that noise does not decide.
bool bfloat16_is_faster(const Isa& isa) {
  const Team alone = {1, [](int, void (*body)(void*), void* context) { body(context); }};
  constexpr int64_t kIterations = 1 << 13;
  return peak_flops(*isa.bfloat16, alone, kIterations) >
         1.5 * peak_flops(isa.f32, alone, kIterations);
}

}  // namespace
#endif

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
#ifdef SUPCON_BFLOAT16
    static const Isa bf16 = {"avx512_bf16", kAvx512.f32, kAvx512.f64, &kBfloat16OfAvx512};
    if (avx512 && runs_bfloat16())
      found.insert(bfloat16_is_faster(bf16) ? found.begin() : found.end(), &bf16);
#endif
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
