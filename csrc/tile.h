// The work on one pair of tiles, written once over the vector width: the register kernel, exp2,
// and one small epilogue for each thing that is done with a similarity. Each ISA's file compiles
// it in a namespace of its own; everything here has internal linkage, so that the linker can
// never take one ISA's copy of a function for another's.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "supcon.h"

#ifdef __FAST_MATH__
#error "-ffast-math folds away the rounding in exp2 and the test for non-finite rows"
#endif

namespace supcon {
namespace {

template <int I>
struct Int {
  static constexpr int value = I;
};

// Rows and vectors of a row of the register kernel. Sanitizers take minutes over the unrolled
// kernel of a release; they check a smaller one, of the same source.
#ifdef SUPCON_SMALL_KERNEL
constexpr int kRows = 3;
#else
constexpr int kRows = SUPCON_KERNEL_ROWS;
#endif
constexpr int kVectors = 2;

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
// Loops around the register kernel stay apart: constants that the compiler hoists from one into
// another push accumulators out of registers.
#define SUPCON_APART __attribute__((noinline))

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

// 2^x for x <= 0: zero below the normal numbers.
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

// C(R x NR) = A(R x K) B(K x NR), one row of vectors of B at a time against R broadcast elements of
// A. The accumulators are local and leave through the epilogue: finish(row, vector, value).
template <typename Real, int R, typename Finish>
SUPCON_INLINE void multiply(ptrdiff_t k_size, const Real* a, ptrdiff_t a_row, ptrdiff_t a_k,
                            const Real* b, ptrdiff_t b_k, Finish finish) {
  typedef typename Simd<Real>::V V;
  constexpr int kLanes = Simd<Real>::kLanes;
  V acc[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V{};
  }
  for (ptrdiff_t k = 0; k < k_size; ++k) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_k + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V x = splat<V>(a[r * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(r, v, acc[r][v]);
  }
}

// Calls body(Int<R>, i) for blocks of R = kRows rows and a last one of fewer.
static_assert(kRows <= 12, "a last block of more than 11 rows has no case below");
template <typename Body>
SUPCON_INLINE void for_each_block(int num_rows, Body body) {
  int i = 0;
  for (; i + kRows <= num_rows; i += kRows) body(Int<kRows>(), i);
  switch (num_rows - i) {
#define SUPCON_REST(R)                          \
  case R:                                       \
    if constexpr (R < kRows) body(Int<R>(), i); \
    break;
    SUPCON_REST(1)
    SUPCON_REST(2)
    SUPCON_REST(3)
    SUPCON_REST(4)
    SUPCON_REST(5)
    SUPCON_REST(6)
    SUPCON_REST(7)
    SUPCON_REST(8)
    SUPCON_REST(9)
    SUPCON_REST(10)
    SUPCON_REST(11)
#undef SUPCON_REST
    default:
      break;
  }
}

template <typename Real>
SUPCON_INLINE typename Simd<Real>::I lane_numbers() {
  typename Simd<Real>::I lanes;
  for (int k = 0; k < Simd<Real>::kLanes; ++k) lanes[k] = k;
  return lanes;
}

// Which pairs take part: all (kDense), or those of a ragged tile, above the diagonal, not the row
// itself, of one class or of two.
template <typename Real, bool kDense>
struct Mask {
  typedef typename Simd<Real>::V V;
  typedef typename Simd<Real>::I I;

  explicit Mask(const TilePair<Real>& t) : t(t), lanes(lane_numbers<Real>()) {}

  // x in the columns j + lane that row i meets among `pairs`, `other` elsewhere.
  SUPCON_INLINE V keep(Pairs pairs, int i, int j, V x, V other) const {
    if constexpr (kDense) return x;
    const I col = lanes + j;
    I kept = (col < t.num_cols) & (col > (t.triangle ? i : -1));
    if (t.own != nullptr) kept &= col != t.own[i];
    if (pairs != Pairs::kAll && t.classes.row != nullptr) {
      const I same = load_classes<Real>(t.classes.col + j) == t.classes.row[i];
      kept &= pairs == Pairs::kPositives ? same : ~same;
    }
    return kept ? x : other;
  }

  const TilePair<Real>& t;
  const I lanes;
};

// Similarities of the pair, handed to pass.finish(i, panel, vector, value) between
// pass.begin(panel) and pass.end(panel): where the tile is dense straight from the registers,
// elsewhere by way of the scratch tile, so that the register kernel is not compiled for every mask.
template <typename Real, bool kDense, typename Pass>
SUPCON_INLINE void for_each_similarity(const TilePair<Real>& t, Pass& pass) {
  typedef typename Simd<Real>::V V;
  constexpr int kLanes = Simd<Real>::kLanes;
  constexpr int kPanel = kVectors * kLanes;
  for (int j = 0; j < t.num_cols; j += kPanel) {
    const Real* b = t.b_packed + j * t.dim;
    const int end = t.triangle && j + kPanel < t.num_rows ? j + kPanel : t.num_rows;
    if constexpr (kDense) pass.begin(j);
    for_each_block(end, [&](auto rows, int i) {
      multiply<Real, decltype(rows)::value>(
          t.dim, t.a + i * t.stride, t.stride, 1, b, kPanel, [&](int r, int v, V x) {
            if constexpr (kDense)
              pass.finish(i + r, j, v, x);
            else
              store(t.scratch + (i + r) * kScratchStride + j + v * kLanes, x);
          });
    });
    if constexpr (!kDense) {
      pass.begin(j);
      for (int i = 0; i < end; ++i)
        for (int v = 0; v < kVectors; ++v)
          pass.finish(i, j, v, load(t.scratch + i * kScratchStride + j + v * kLanes));
    }
    pass.end(j);
  }
}

// The terms of a forward pass, with l and shift those of the row or of the column.

struct Maximum {
  template <typename V, typename Real>
  static SUPCON_INLINE V start(Real) {
    return splat<V>(-static_cast<Real>(__builtin_inf()));
  }
  template <typename X>
  static SUPCON_INLINE X fold(X a, X b) {
    return a > b ? a : b;
  }
  static constexpr bool kCommon = true;  // one value for the row and the column
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V, V) {
    return x;
  }
};

struct Sum {
  template <typename V, typename Real>
  static SUPCON_INLINE V start(Real) {
    return V{};
  }
  template <typename X>
  static SUPCON_INLINE X fold(X a, X b) {
    return a + b;
  }
  static constexpr bool kCommon = false;
};

struct SumExpUnshifted : Sum {
  static constexpr bool kCommon = true;
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V, V) {
    return exp2_in_range<Real>(x);
  }
};

struct SumExp : Sum {
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V, V shift) {
    return exp2_or_zero<Real>(x - shift);
  }
};

struct SumLogQ : Sum {
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V lse, V) {
    return Logistic<Real>(lse - x).log2_q();
  }
};

struct SumQ : Sum {
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V lse, V shift) {
    return exp2_or_zero<Real>(Logistic<Real>(lse - x).log2_q() - shift);
  }
};

struct SumNotQ : Sum {
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V lse, V) {
    return Logistic<Real>(lse - x).not_q();
  }
};

struct SumQTimesNotQ : Sum {
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V lse, V shift) {
    const Logistic<Real> logistic(lse - x);
    return exp2_or_zero<Real>(logistic.log2_q() - shift) * logistic.not_q();
  }
};

// A forward pass: folds the term of each pair into its row and its column.
template <typename Real, bool kDense, typename Fold>
struct Reduce {
  typedef typename Simd<Real>::V V;
  static constexpr int kLanes = Simd<Real>::kLanes;

  explicit Reduce(const TilePair<Real>& t) : t(t), mask(t), none(Fold::template start<V>(Real())) {
    for (int i = 0; i < t.num_rows; ++i) rows[i] = none;
  }
  SUPCON_INLINE void begin(int) {
    for (int v = 0; v < kVectors; ++v) cols[v] = none;
  }
  SUPCON_INLINE void finish(int i, int j, int v, V x) {
    j += v * kLanes;
    V term;
    if constexpr (Fold::kCommon)
      term = Fold::template of<Real>(x, V{}, V{});
    else
      term = Fold::template of<Real>(x, of_row(t.lse, i), of_row(t.shifts, i));
    term = mask.keep(t.pairs, i, j, term, none);
    rows[i] = Fold::fold(rows[i], term);
    if (!Fold::kCommon && t.square) {
      term = Fold::template of<Real>(x, of_col(t.lse, j), of_col(t.shifts, j));
      term = mask.keep(t.pairs, i, j, term, none);
    }
    if (Fold::kCommon || t.square) cols[v] = Fold::fold(cols[v], term);
  }
  SUPCON_INLINE void end(int j) {
    if (!t.square) return;
    for (int v = 0; v < kVectors; ++v) store(t.col_out + j + v * kLanes, cols[v]);
  }
  void write_rows() {
    for (int i = 0; i < t.num_rows; ++i) {
      Real total = rows[i][0];
      for (int k = 1; k < kLanes; ++k) total = Fold::fold(total, rows[i][k]);
      t.row_out[i] = total;
    }
  }

  static SUPCON_INLINE V of_row(const PerLine<Real>& x, int i) {
    return x.row == nullptr ? V{} : splat<V>(x.row[i]);
  }
  static SUPCON_INLINE V of_col(const PerLine<Real>& x, int j) {
    return x.col == nullptr ? V{} : load(x.col + j);
  }

  const TilePair<Real>& t;
  const Mask<Real, kDense> mask;
  const V none;
  V cols[kVectors];
  V rows[kMaxTile];
};

// A backward pass: G + G^T, written to the scratch tile.
template <typename Real, bool kDense, bool kShifted>
struct Weigh {
  typedef typename Simd<Real>::V V;
  static constexpr int kLanes = Simd<Real>::kLanes;

  explicit Weigh(const TilePair<Real>& t) : t(t), mask(t) {}
  SUPCON_INLINE void begin(int) {}
  SUPCON_INLINE void finish(int i, int j, int v, V x) {
    j += v * kLanes;
    V g = mask.keep(t.pairs, i, j, softmax(i, j, x), V{});
    if constexpr (!kDense)
      if (t.attraction != Attraction::kNone)
        g -= mask.keep(Pairs::kPositives, i, j, attraction(i, j, x), V{});
    store(t.scratch + i * kScratchStride + j, g);
  }
  SUPCON_INLINE void end(int) {}

  SUPCON_INLINE V softmax(int i, int j, V x) const {
    V weight = splat<V>(t.weight.row[i]);
    if constexpr (!kShifted) {
      if (t.square) weight += load(t.weight.col + j);
      return weight * exp2_in_range<Real>(x);
    }
    V g = weight * exp2_or_zero<Real>(x - t.lse.row[i]);
    if (t.square) g += load(t.weight.col + j) * exp2_or_zero<Real>(x - load(t.lse.col + j));
    return g;
  }
  V attraction(int i, int j, V x) const {
    if (!kShifted || t.attraction == Attraction::kOne) {
      V pull = splat<V>(t.pull.row[i]);
      if (t.square) pull += load(t.pull.col + j);
      return t.attraction == Attraction::kOne ? pull : pull * exp2_in_range<Real>(x);
    }
    V g = t.pull.row[i] * attraction(x, splat<V>(t.lse.row[i]), splat<V>(t.normalizer.row[i]));
    if (t.square)
      g += load(t.pull.col + j) * attraction(x, load(t.lse.col + j), load(t.normalizer.col + j));
    return g;
  }
  V attraction(V x, V lse, V normalizer) const {
    switch (t.attraction) {
      case Attraction::kExp:
        return exp2_or_zero<Real>(x - normalizer);
      case Attraction::kNotQ:
        return SumNotQ::of<Real>(x, lse, normalizer);
      case Attraction::kQTimesNotQ:
        return SumQTimesNotQ::of<Real>(x, lse, normalizer);
      default:
        return V{};
    }
  }

  const TilePair<Real>& t;
  const Mask<Real, kDense> mask;
};

// c += x, for the register kernel's results.
template <typename Real>
SUPCON_INLINE auto adding_to(Real* c, ptrdiff_t stride) {
  return [=](int r, int v, typename Simd<Real>::V x) {
    Real* p = c + r * stride + v * Simd<Real>::kLanes;
    store(p, load(p) + x);
  };
}

// grad_a += H b, H being the scratch tile. In a triangle H is zero below the diagonal, and the
// product leaves that out.
template <typename Real>
SUPCON_APART void add_to_rows(const TilePair<Real>& t) {
  constexpr int kPanel = kVectors * Simd<Real>::kLanes;
  for (ptrdiff_t d = 0; d < t.dim; d += kPanel)
    for_each_block(t.num_rows, [&](auto rows, int i) {
      const int k = t.triangle ? i / kPanel * kPanel : 0;
      multiply<Real, decltype(rows)::value>(t.num_cols - k, t.scratch + i * kScratchStride + k,
                                            kScratchStride, 1, t.b + k * t.stride + d, t.stride,
                                            adding_to(t.grad_a + i * t.stride + d, t.stride));
    });
}

// grad_b += H^T a.
template <typename Real>
SUPCON_APART void add_to_cols(const TilePair<Real>& t) {
  constexpr int kPanel = kVectors * Simd<Real>::kLanes;
  for (ptrdiff_t d = 0; d < t.dim; d += kPanel)
    for_each_block(t.num_cols, [&](auto cols, int j) {
      constexpr int kCols = decltype(cols)::value;
      const int k_size = t.triangle && j + kCols < t.num_rows ? j + kCols : t.num_rows;
      multiply<Real, kCols>(k_size, t.scratch + j, 1, kScratchStride, t.a + d, t.stride,
                            adding_to(t.grad_b + j * t.stride + d, t.stride));
    });
}

template <typename Real>
bool is_dense(const TilePair<Real>& t) {
  return !t.triangle && t.own == nullptr && t.classes.row == nullptr &&
         t.num_cols % (kVectors * Simd<Real>::kLanes) == 0;
}

template <typename Real, bool kDense, typename Fold>
SUPCON_APART void reduce(const TilePair<Real>& t) {
  Reduce<Real, kDense, Fold> pass(t);
  for_each_similarity<Real, kDense>(t, pass);
  pass.write_rows();
}

template <typename Real>
void tile_forward(const TilePair<Real>& t) {
  const bool dense = is_dense(t);
  switch (t.term) {
    case Term::kMaximum:
      return dense ? reduce<Real, true, Maximum>(t) : reduce<Real, false, Maximum>(t);
    case Term::kExp:
      if (t.shifted) return dense ? reduce<Real, true, SumExp>(t) : reduce<Real, false, SumExp>(t);
      return dense ? reduce<Real, true, SumExpUnshifted>(t)
                   : reduce<Real, false, SumExpUnshifted>(t);
    // Positives only, which a dense tile has none of.
    case Term::kLogQ:
      return reduce<Real, false, SumLogQ>(t);
    case Term::kQ:
      return reduce<Real, false, SumQ>(t);
    case Term::kNotQ:
      return reduce<Real, false, SumNotQ>(t);
    case Term::kQTimesNotQ:
      return reduce<Real, false, SumQTimesNotQ>(t);
    // Of pairs with weights only, which weighted.h deals with.
    case Term::kMaximumQ:
    case Term::kMean:
      return;
  }
}

template <typename Real, bool kDense, bool kShifted>
SUPCON_APART void weigh(const TilePair<Real>& t) {
  Weigh<Real, kDense, kShifted> pass(t);
  for_each_similarity<Real, kDense>(t, pass);
}

template <typename Real>
void tile_weigh(const TilePair<Real>& t) {
  if (t.triangle)
    for (int i = 0; i < t.num_rows; ++i)
      for (int j = 0; j < t.num_cols; ++j) t.scratch[i * kScratchStride + j] = 0;
  if (is_dense(t))
    t.shifted ? weigh<Real, true, true>(t) : weigh<Real, true, false>(t);
  else
    t.shifted ? weigh<Real, false, true>(t) : weigh<Real, false, false>(t);
}

// Multiplies and adds in registers alone, as often as the register kernel does for k_size terms:
// the peak that it is measured against. Returns the number of floating-point operations.
template <typename Real>
double multiply_in_registers(int64_t k_size, Real* out) {
  typedef typename Simd<Real>::V V;
  constexpr int kChains = 12;
  V x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = splat<V>(out[0] + static_cast<Real>(c));
  V factor = splat<V>(out[1]), term = splat<V>(out[2]);
  for (int64_t k = 0; k < k_size; ++k) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * factor + term;
  }
  V sum = V{};
  for (int c = 0; c < kChains; ++c) sum += x[c];
  out[3] = sum[0];
  return 2.0 * kChains * Simd<Real>::kLanes * static_cast<double>(k_size);
}

}  // namespace
}  // namespace supcon
