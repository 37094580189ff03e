// What is done with the similarities of one pair of tiles: which pairs take part, the terms of a
// forward pass, and H of the backward.

#pragma once

#include <type_traits>

#include "products.h"

namespace supcon {
namespace {

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

// Of one shift for all pairs.
struct SumExpByOneShift : Sum {
  static constexpr bool kCommon = true;
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V, V shift) {
    return exp2_or_zero<Real>(x - shift);
  }
};

// Of 2^x that an earlier pass has kept.
struct SumKept : Sum {
  static constexpr bool kCommon = true;
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V power, V, V) {
    return power;
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
      term = Fold::template of<Real>(x, V{}, of_row(t.shifts, 0));
    else
      term = Fold::template of<Real>(x, of_row(t.lse, i), of_row(t.shifts, i));
    if (t.keeps != Kept::kNothing)
      store(t.scratch + i * kScratchStride + j, t.keeps == Kept::kPowers ? term : x);
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

// What a backward pass is handed: exponents of which a logarithm is to be subtracted, exponents, or
// 2^x.
enum class Given { kShifted, kExponents, kPowers };

// A backward pass: G + G^T, written to the scratch tile.
template <typename Real, bool kDense, Given kGiven>
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
  SUPCON_INLINE void end(int j) {
    for (int i = last_row(t, j, kVectors * kLanes); i < t.num_rows; ++i)
      for (int v = 0; v < kVectors; ++v)
        store(t.scratch + i * kScratchStride + j + v * kLanes, V{});
  }

  SUPCON_INLINE V softmax(int i, int j, V x) const {
    V weight = splat<V>(t.weight.row[i]);
    if constexpr (kGiven != Given::kShifted) {
      if (t.square) weight += load(t.weight.col + j);
      return weight * power(x);
    }
    V g = weight * exp2_or_zero<Real>(x - t.lse.row[i]);
    if (t.square) g += load(t.weight.col + j) * exp2_or_zero<Real>(x - load(t.lse.col + j));
    return g;
  }
  V attraction(int i, int j, V x) const {
    if (kGiven != Given::kShifted || t.attraction == Attraction::kOne) {
      V pull = splat<V>(t.pull.row[i]);
      if (t.square) pull += load(t.pull.col + j);
      return t.attraction == Attraction::kOne ? pull : pull * power(x);
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
  static SUPCON_INLINE V power(V x) {
    if constexpr (kGiven == Given::kPowers)
      return x;
    else
      return exp2_in_range<Real>(x);
  }

  const TilePair<Real>& t;
  const Mask<Real, kDense> mask;
};

template <typename Real>
bool is_dense(const TilePair<Real>& t) {
  return !t.triangle && t.own == nullptr && t.classes.row == nullptr &&
         t.num_cols % (kVectors * Simd<Real>::kLanes) == 0;
}

template <typename P, bool kDense, typename Fold>
SUPCON_APART void reduce(const TilePair<typename P::Real>& t) {
  Reduce<typename P::Real, kDense, Fold> pass(t);
  if constexpr (std::is_same_v<Fold, SumKept>)
    for_each_kept(t, pass);
  else
    for_each_similarity<P, kDense>(t, pass);
  pass.write_rows();
}

template <typename P>
void tile_forward(const TilePair<typename P::Real>& t) {
  const bool dense = is_dense(t);
  switch (t.term) {
    case Term::kMaximum:
      return dense ? reduce<P, true, Maximum>(t) : reduce<P, false, Maximum>(t);
    case Term::kExp:
      if (t.kept == Kept::kPowers) return reduce<P, false, SumKept>(t);  // positives only
      if (t.shifted) return dense ? reduce<P, true, SumExp>(t) : reduce<P, false, SumExp>(t);
      return dense ? reduce<P, true, SumExpUnshifted>(t) : reduce<P, false, SumExpUnshifted>(t);
    case Term::kExpByOneShift:
      return dense ? reduce<P, true, SumExpByOneShift>(t) : reduce<P, false, SumExpByOneShift>(t);
    // Positives only, which a dense tile has none of.
    case Term::kLogQ:
      return reduce<P, false, SumLogQ>(t);
    case Term::kQ:
      return reduce<P, false, SumQ>(t);
    case Term::kNotQ:
      return reduce<P, false, SumNotQ>(t);
    case Term::kQTimesNotQ:
      return reduce<P, false, SumQTimesNotQ>(t);
    // Of pairs with weights only, which weighted.h deals with.
    case Term::kMaximumQ:
    case Term::kMean:
      return;
  }
}

template <typename P, bool kDense, Given kGiven>
SUPCON_APART void weigh(const TilePair<typename P::Real>& t) {
  Weigh<typename P::Real, kDense, kGiven> pass(t);
  if constexpr (kGiven == Given::kPowers)
    for_each_kept(t, pass);
  else
    for_each_similarity<P, kDense>(t, pass);
}

template <typename P, Given kGiven>
void weigh_any(const TilePair<typename P::Real>& t) {
  is_dense(t) ? weigh<P, true, kGiven>(t) : weigh<P, false, kGiven>(t);
}

template <typename P>
void tile_weigh(const TilePair<typename P::Real>& t) {
  if (t.shifted) return weigh_any<P, Given::kShifted>(t);
  t.kept == Kept::kPowers ? weigh_any<P, Given::kPowers>(t) : weigh_any<P, Given::kExponents>(t);
}

}  // namespace
}  // namespace supcon
