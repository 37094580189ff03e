// AVX-512: 16 floats a vector, 16 of 32 registers accumulate.

#define SUPCON_VECTOR_BYTES 64
#define SUPCON_KERNEL_ROWS 8
#include "functions.h"

namespace supcon {
extern const Isa kAvx512;
const Isa kAvx512 = {"avx512", functions<float>(), functions<double>()};
}  // namespace supcon
