// What every CPU of the architecture has: SSE2 on x86-64, NEON on arm64, 4 floats a vector.

#define SUPCON_VECTOR_BYTES 16
#ifdef __aarch64__
#define SUPCON_KERNEL_ROWS 12
#else
#define SUPCON_KERNEL_ROWS 6
#endif
#include "functions.h"

namespace supcon {
extern const Isa kBaseline;
#ifdef __aarch64__
const Isa kBaseline = {"neon", functions<float>(), functions<double>()};
#else
const Isa kBaseline = {"baseline", functions<float>(), functions<double>()};
#endif
}  // namespace supcon
