// Numbers of the caller's in any type: read where they are, as float64, and written as the kernels
// take them.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "supcon.h"

namespace supcon {
namespace {

struct Half {
  uint16_t bits;

  // By integers alone: a thread may be told to take denormal numbers for zero.
  operator double() const {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const int64_t scale = exponent > 0 ? exponent : 1;
    const uint64_t power = static_cast<uint64_t>(scale - 25 + 1023) << 52;
    double unit;
    __builtin_memcpy(&unit, &power, sizeof(unit));
    const double magnitude = unit * (exponent > 0 ? mantissa + 1024 : mantissa);
    return bits >> 15 ? -magnitude : magnitude;
  }
};

struct Bfloat16 {
  uint16_t bits;

  operator double() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, sizeof(x));
    return static_cast<double>(x);
  }
};

template <typename T>
void read_as(const Matrix& from, int64_t row, int64_t col, int64_t count, double* out) {
  const T* const x =
      static_cast<const T*>(from.data) + row * from.row_stride + col * from.col_stride;
  if (from.col_stride != 1) {
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<double>(x[k * from.col_stride]);
    return;
  }
  // Rows follow each other, mostly a part of each, which the processor does not foresee.
  constexpr int64_t kRowsAhead = 4, kLine = 64 / sizeof(T);
  for (int64_t k = 0; k < count; k += kLine)
    __builtin_prefetch(x + kRowsAhead * from.row_stride + k);
  for (int64_t k = 0; k < count; ++k) out[k] = static_cast<double>(x[k]);
}

void read_elements(const Matrix& from, int64_t row, int64_t col, int64_t count, double* out) {
  switch (from.element) {
    case Element::kUint8:
      return read_as<uint8_t>(from, row, col, count, out);
    case Element::kInt8:
      return read_as<int8_t>(from, row, col, count, out);
    case Element::kInt16:
      return read_as<int16_t>(from, row, col, count, out);
    case Element::kInt32:
      return read_as<int32_t>(from, row, col, count, out);
    case Element::kInt64:
      return read_as<int64_t>(from, row, col, count, out);
    case Element::kHalf:
      return read_as<Half>(from, row, col, count, out);
    case Element::kBfloat16:
      return read_as<Bfloat16>(from, row, col, count, out);
    case Element::kFloat:
      return read_as<float>(from, row, col, count, out);
    case Element::kDouble:
      return read_as<double>(from, row, col, count, out);
  }
}

template <typename Real>
struct Normal;

template <>
struct Normal<float> {
  static constexpr float kSmallest = 0x1p-126f;
};

template <>
struct Normal<double> {
  static constexpr double kSmallest = 0x1p-1022;
};

template <typename Real>
void scale_elements(const double* x, double factor, int64_t count, Real* out) {
  for (int64_t k = 0; k < count; ++k) {
    const double scaled = x[k] * factor;
    const double magnitude = scaled < 0 ? -scaled : scaled;
    out[k] = magnitude < static_cast<double>(Normal<Real>::kSmallest) ? Real(0)
                                                                      : static_cast<Real>(scaled);
  }
}

template <typename Real>
void accumulate_elements(const Real* x, int64_t count, double* sum) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) sum[k] += static_cast<double>(x[k]);
}

template <typename Real>
void encode_weights(const PairWeights& of, bool logarithms, Real* out) {
  constexpr double kSmallest = static_cast<double>(Normal<Real>::kSmallest);
  if (!logarithms) {
    for (int k = 0; k < of.count; ++k) {
      const double w = of.weights[k], share = w / of.totals[k * of.total_stride];
      const double kept = share > kSmallest ? share : kSmallest;
      out[k * of.out_stride] = static_cast<Real>(w > 0 ? kept : w < 0 ? -1.0 : 0.0);
    }
    return;
  }
  double last_share = 1, last_code = kSmallest;  // of a mask most weights are the same
  for (int k = 0; k < of.count; ++k) {
    const double w = of.weights[k], share = w / of.totals[k * of.total_stride];
    if (w > 0 && share != last_share) {
      const double code = -__builtin_log2(share);
      last_share = share;
      last_code = code > kSmallest ? code : kSmallest;
    }
    out[k * of.out_stride] = static_cast<Real>(w > 0 ? last_code : w < 0 ? -1.0 : 0.0);
  }
}

}  // namespace
}  // namespace supcon
