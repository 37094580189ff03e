// AVX2 with FMA: 8 floats a vector, 12 of 16 registers accumulate.

#define SUPCON_VECTOR_BYTES 32
#define SUPCON_KERNEL_ROWS 6
#include "functions.h"

namespace supcon {
extern const Isa kAvx2;
const Isa kAvx2 = {"avx2", functions<float>(), functions<double>()};
}  // namespace supcon
