// The work on single rows, written once, mostly as plain loops, that each ISA's file compiles for
// its own vectors, in a namespace of its own as vectors.h.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "products.h"

namespace supcon {
namespace {

// Squares of a row whose sum lies between these bounds neither over- nor underflowed so as to show.
template <typename Real>
struct SafeSquare;

template <>
struct SafeSquare<float> {
  static constexpr float kLow = 1e-20f, kHigh = 1e30f;
};

template <>
struct SafeSquare<double> {
  static constexpr double kLow = 1e-250, kHigh = 1e250;
};

template <typename Real>
Real sum_of_squares(const Real* x, int64_t dim, Real scale) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) sum += (x[d] / scale) * (x[d] / scale);
  return sum;
}

template <typename Real>
Real sum_of_squares(const Real* x, int64_t dim) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) sum += x[d] * x[d];
  return sum;
}

template <typename Real>
Real largest_magnitude(const Real* x, int64_t dim) {
  Real largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const Real magnitude = x[d] < 0 ? -x[d] : x[d];
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The exponent of the largest magnitude is what stands above its seven bits of mantissa.
template <typename Real>
Real widen_row(const uint16_t* x, int64_t dim, Real power, Real* out) {
  if (power == 0) {
    int largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t d = 0; d < dim; ++d) largest = (x[d] & 0x7fff) > largest ? x[d] & 0x7fff : largest;
    const int exponent = (largest >> 7) - 127;
    const int clamped = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    power = static_cast<Real>(__builtin_ldexp(1.0, -clamped));
  }
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t bits = static_cast<uint32_t>(x[d]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    out[d] = static_cast<Real>(value) * power;
  }
  return power;
}

// The sum of squares bounds every product with the row: where it overflows, similarities may be
// differences of infinities, which maxima and exponentials would not show. That of a normalised row
// is unit^2, if it is finite at all. May work in place.
template <typename Real>
bool embed_row(const Real* x, int64_t dim, bool normalize, Real unit, Real* out, Real* scale,
               Real* norm) {
  *scale = *norm = 1;
  Real reach = unit * unit;
  if (normalize) {
    Real square = sum_of_squares(x, dim);
    if (!(square > SafeSquare<Real>::kLow && square < SafeSquare<Real>::kHigh)) {
      const Real largest = largest_magnitude(x, dim);
      *scale = largest > 0 ? largest : Real(1);
      square = sum_of_squares(x, dim, *scale);
    }
    *norm = static_cast<Real>(__builtin_sqrt(square));
    if (square > 0) unit /= *norm;
    reach += square;
  }
  if (*scale == 1) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) out[d] = x[d] * unit;
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = x[d] / *scale * unit;
  }
  if (!normalize) reach = sum_of_squares(out, dim);
  return reach - reach == 0;
}

template <typename Real>
void pack_rows(const Real* rows, ptrdiff_t stride, int64_t dim, Real* packed) {
  constexpr int kLanes = Simd<Real>::kLanes, kPanel = kVectors * kLanes;
  for (int64_t d = 0; d < dim; d += kLanes)
    for (int v = 0; v < kVectors; ++v) {
      typename Simd<Real>::V block[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) block[k] = load(rows + (v * kLanes + k) * stride + d);
      transpose<Real>(block);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) store(packed + (d + k) * kPanel + v * kLanes, block[k]);
    }
}

// As compilers contract the register kernel's products and sums. Of plain loops they make vectors
// of products first, where there is a multiply-add.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// One feature after the other, as the register kernel adds them up. A few columns at a time, so
// that additions need not wait for each other.
template <typename Real>
double dots_of_tile(const TilePair<Real>& t, int i, int j, int count) {
  constexpr int kChains = 4;
  const Real* const row = t.a + i * t.stride;
  const Real* const cols = t.b + j * t.stride;
  double total = 0;
  for (int k = 0; k < count; k += kChains) {
    const Real* col[kChains];
    Real sum[kChains] = {};
    for (int c = 0; c < kChains; ++c) col[c] = cols + (k + c < count ? k + c : k) * t.stride;
    for (ptrdiff_t d = 0; d < t.dim; ++d)
      for (int c = 0; c < kChains; ++c) sum[c] = multiply_add(row[d], col[c][d], sum[c]);
    for (int c = 0; c < kChains && k + c < count; ++c) total += static_cast<double>(sum[c]);
  }
  return total;
}

template <typename Real>
double dot(const Real* a, const Real* b, int64_t dim) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

template <typename Real>
double dot_sum(const Real* a, const double* sum, double own_weight, const Real* own, int64_t dim) {
  double total = 0;
  if (own == nullptr) {
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < dim; ++d) total += static_cast<double>(a[d]) * sum[d];
    return total;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < dim; ++d)
    total += static_cast<double>(a[d]) * (sum[d] - own_weight * static_cast<double>(own[d]));
  return total;
}

template <typename Real>
void add_row(double weight, const Real* x, int64_t dim, double* sum) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) sum[d] += weight * static_cast<double>(x[d]);
}

template <typename Real>
void attract_row(double weight, const double* sum, double own_weight, const Real* own, int64_t dim,
                 Real* grad) {
  if (own == nullptr) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) grad[d] -= static_cast<Real>(weight * sum[d]);
    return;
  }
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d)
    grad[d] -= static_cast<Real>(weight * (sum[d] - own_weight * static_cast<double>(own[d])));
}

template <typename Real>
void finish_row(const Real* grad, Real along, const Real* row, Real factor, Real scale, int64_t dim,
                Real* out) {
  if (scale == 1) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) out[d] = (grad[d] - along * row[d]) * factor;
    return;
  }
  for (int64_t d = 0; d < dim; ++d) out[d] = (grad[d] - along * row[d]) * factor / scale;
}

}  // namespace
}  // namespace supcon
