// Vectors of an instruction set and their functions, written once over the vector width. Each ISA's
// file compiles them in a namespace of its own; everything here, in products.h and in epilogues.h
// has internal linkage, so that the linker can never take one ISA's copy of a function for
// another's.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "supcon.h"

#ifdef __FAST_MATH__
#error "-ffast-math folds away the rounding in exp2 and the test for non-finite rows"
#endif

namespace supcon {
namespace {

template <typename Real>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = SUPCON_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(SUPCON_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(SUPCON_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(SUPCON_VECTOR_BYTES)));
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLowest = -126.0f;     // exponent of the smallest normal number
  static constexpr int kLogTerms = 7;           // (1/3)^(2 * 7 + 1) / 15 is below half an ulp
};

template <>
struct Simd<double> {
  static constexpr int kLanes = SUPCON_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(SUPCON_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(SUPCON_VECTOR_BYTES), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(SUPCON_VECTOR_BYTES)));
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -1022.0;
  static constexpr int kLogTerms = 15;
};

#define SUPCON_INLINE inline __attribute__((always_inline))

template <typename V, typename Real>
SUPCON_INLINE V splat(Real x) {
  return x - V{};  // x + 0 would be an addition: it turns -0 into 0
}

template <typename Real>
SUPCON_INLINE typename Simd<Real>::V load(const Real* p) {
  return *reinterpret_cast<const typename Simd<Real>::V*>(p);
}

template <typename Real>
SUPCON_INLINE typename Simd<Real>::I load_classes(const Class<Real>* p) {
  return *reinterpret_cast<const typename Simd<Real>::I*>(p);
}

template <typename Real>
SUPCON_INLINE void store(Real* p, typename Simd<Real>::V x) {
  *reinterpret_cast<typename Simd<Real>::V*>(p) = x;
}

template <typename Real>
SUPCON_INLINE typename Simd<Real>::I lane_numbers() {
  typename Simd<Real>::I lanes;
  for (int k = 0; k < Simd<Real>::kLanes; ++k) lanes[k] = k;
  return lanes;
}

// Lanes l of a where l has no such bit, and lanes l - bit of b elsewhere; with kHigh lanes l + bit
// of a, and lanes l of b. Compilers make one shuffle of it. (The choices within keep the index that
// is not used in range.)
template <int kBit, bool kHigh, typename V, int... l>
SUPCON_INLINE V exchanged(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int kUp = kHigh ? kBit : 0, kDown = kHigh ? 0 : kBit;
  return V{(l & kBit ? b[l & kBit ? l - kDown : 0] : a[l & kBit ? 0 : l + kUp])...};
}

// A square of numbers, whose rows become its columns: bit by bit, row and lane change places.
template <typename Real, int kBit = 1>
SUPCON_INLINE void transpose(typename Simd<Real>::V* rows) {
  constexpr int kLanes = Simd<Real>::kLanes;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kBit) continue;
    const typename Simd<Real>::V a = rows[i], b = rows[i + kBit];
    rows[i] = exchanged<kBit, false>(a, b, lanes);
    rows[i + kBit] = exchanged<kBit, true>(a, b, lanes);
  }
  if constexpr (2 * kBit < kLanes) transpose<Real, 2 * kBit>(rows);
}

// 2^f on [-1/2, 1/2]: Taylor's coefficients bent to the minimax polynomial.
template <typename V>
SUPCON_INLINE V exp2_fraction(V f, float) {
  V p = splat<V>(1.5353362e-4f);
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  return p * f + 1.0f;
}

template <typename V>
SUPCON_INLINE V exp2_fraction(V f, double) {
  constexpr double kCoefficients[] = {
      2.5678435993488205e-11, 4.4455382718708115e-10, 7.0549116208011240e-09,
      1.0178086009239699e-07, 1.3215486790144308e-06, 1.5252733804059841e-05,
      1.5403530393381608e-04, 1.3333558146428443e-03, 9.6181291076284772e-03,
      5.5504108664821580e-02, 2.4022650695910072e-01, 6.9314718055994531e-01};
  V p = splat<V>(kCoefficients[0]);
  for (int k = 1; k < 12; ++k) p = p * f + kCoefficients[k];
  return p * f + 1.0;
}

// 2^x for x in [kLowest, -kLowest]: the integer part is added to the exponent's bits.
template <typename Real>
SUPCON_INLINE typename Simd<Real>::V exp2_in_range(typename Simd<Real>::V x) {
  typedef typename Simd<Real>::V V;
  typedef typename Simd<Real>::Bits Bits;
  V rounded = x + Simd<Real>::kRound;
  V fraction = x - (rounded - Simd<Real>::kRound);
  V p = exp2_fraction<V>(fraction, Real());
  return (V)((Bits)p + ((Bits)rounded << Simd<Real>::kMantissaBits));
}

// 2^x below the overflow: zero below the normal numbers.
template <typename Real>
SUPCON_INLINE typename Simd<Real>::V exp2_or_zero(typename Simd<Real>::V x) {
  typedef typename Simd<Real>::V V;
  V lowest = splat<V>(Simd<Real>::kLowest);
  V inside = x > lowest ? x : lowest;
  return x > lowest ? exp2_in_range<Real>(inside) : V{};
}

// With d = l - x and e = 2^-|d|, everything about q = 1 / (1 + 2^d) without overflow.
template <typename Real>
struct Logistic {
  typedef typename Simd<Real>::V V;

  SUPCON_INLINE explicit Logistic(V d) : d(d), e(exp2_or_zero<Real>(d > 0 ? -d : d)) {}
  SUPCON_INLINE V not_q() const { return (d > 0 ? splat<V>(Real(1)) : e) / (e + Real(1)); }
  // -max(d, 0) - log2(1 + e), the logarithm by the series of the inverse hyperbolic tangent of
  // z = e / (2 + e) <= 1/3.
  SUPCON_INLINE V log2_q() const {
    const V z = e / (e + Real(2));
    const V square = z * z;
    V series = splat<V>(Real(1) / (2 * Simd<Real>::kLogTerms + 1));
    for (int k = Simd<Real>::kLogTerms - 1; k >= 0; --k)
      series = series * square + Real(1) / (2 * k + 1);
    const V log = z * series * static_cast<Real>(2 * 1.4426950408889634);
    return -((d > 0 ? d : V{}) + log);
  }

  const V d, e;
};

}  // namespace
}  // namespace supcon
