// The epilogues of a pair of tiles whose pairs have weights of their own: of a mask, or of soft
// labels. docs/kernels.md has what a weight's code means.

#pragma once

#include "epilogues.h"
#include "supcon.h"

namespace supcon {
namespace {

// Which pairs take part, told by the codes of their weights.
template <typename V>
SUPCON_INLINE V keep_weighted(Pairs pairs, V code, V x, V other) {
  switch (pairs) {
    case Pairs::kPositives:
      return code > 0 ? x : other;
    case Pairs::kNegatives:
      return code == 0 ? x : other;
    default:
      return code >= 0 ? x : other;
  }
}

// A term of one pair with the code of its weight. Positives are weighted by a factor, or by what
// is taken off their exponent.
template <typename Real, typename Term>
struct WithFactor : Sum {
  template <typename V>
  static SUPCON_INLINE V of(V x, V lse, V shift, V code) {
    return code * Term::template of<Real>(x, lse, shift);
  }
};

template <typename Real, typename Term>
struct WithExponent : Sum {
  template <typename V>
  static SUPCON_INLINE V of(V x, V lse, V shift, V code) {
    return Term::template of<Real>(x, lse, shift + code);
  }
};

struct Exponent {
  template <typename Real, typename V>
  static SUPCON_INLINE V of(V x, V, V) {
    return x;
  }
};

template <typename Real>
struct MaximumWithExponent : Maximum {
  template <typename V>
  static SUPCON_INLINE V of(V x, V, V, V code) {
    return x - code;
  }
};

template <typename Real>
struct MaximumQWithExponent : Maximum {
  template <typename V>
  static SUPCON_INLINE V of(V x, V lse, V, V code) {
    return Logistic<Real>(lse - x).log2_q() - code;
  }
};

// A forward pass: folds the term of each pair into its row and its column. It leaves exponents in
// the scratch tile, by way of which they come.
template <typename Real, typename Fold>
struct WeightedReduce {
  typedef typename Simd<Real>::V V;
  static constexpr int kLanes = Simd<Real>::kLanes;

  explicit WeightedReduce(const TilePair<Real>& t) : t(t), none(Fold::template start<V>(Real())) {
    for (int i = 0; i < t.num_rows; ++i) rows[i] = none;
  }
  void begin(int) {
    for (int v = 0; v < kVectors; ++v) cols[v] = none;
  }
  void finish(int i, int j, int v, V x) {
    j += v * kLanes;
    rows[i] = Fold::fold(rows[i], term(x, t.pair_weights.row + i * kScratchStride + j,
                                       of_row(t.lse, i), of_row(t.shifts, i)));
    if (!t.square) return;
    cols[v] = Fold::fold(cols[v], term(x, t.pair_weights.col + i * kScratchStride + j,
                                       of_col(t.lse, j), of_col(t.shifts, j)));
  }
  void end(int j) {
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

 private:
  V term(V x, const Real* code_at, V lse, V shift) const {
    const V code = load(code_at);
    const V weight = t.pairs == Pairs::kPositives ? code : V{};
    return keep_weighted(t.pairs, code, Fold::of(x, lse, shift, weight), none);
  }
  static V of_row(const PerLine<Real>& x, int i) {
    return x.row == nullptr ? V{} : splat<V>(x.row[i]);
  }
  static V of_col(const PerLine<Real>& x, int j) {
    return x.col == nullptr ? V{} : load(x.col + j);
  }

  const TilePair<Real>& t;
  const V none;
  V cols[kVectors];
  V rows[kMaxTile];
};

// A backward pass: G + G^T, written to the scratch tile.
template <typename Real>
struct WeightedWeigh {
  typedef typename Simd<Real>::V V;
  static constexpr int kLanes = Simd<Real>::kLanes;

  explicit WeightedWeigh(const TilePair<Real>& t) : t(t) {}
  void begin(int) {}
  void finish(int i, int j, int v, V x) {
    j += v * kLanes;
    const ptrdiff_t at = i * kScratchStride + j;
    V g =
        derivative(x, load(t.pair_weights.row + at), splat<V>(t.weight.row[i]),
                   splat<V>(t.lse.row[i]), splat<V>(t.pull.row[i]), splat<V>(t.normalizer.row[i]));
    if (t.square)
      g += derivative(x, load(t.pair_weights.col + at), load(t.weight.col + j), load(t.lse.col + j),
                      load(t.pull.col + j), load(t.normalizer.col + j));
    store(t.scratch + at, g);
  }
  void end(int) {}

 private:
  V derivative(V x, V code, V weight, V lse, V pull, V normalizer) const {
    const V softmax = weight * exp2_or_zero<Real>(x - lse);
    return keep_weighted(t.pairs, code, softmax, V{}) -
           (code > 0 ? pull * attraction(x, code, lse, normalizer) : V{});
  }
  V attraction(V x, V code, V lse, V normalizer) const {
    switch (t.attraction) {
      case Attraction::kOne:
        return code;
      case Attraction::kExp:
        return exp2_or_zero<Real>(x - (normalizer + code));
      case Attraction::kNotQ:
        return code * SumNotQ::of<Real>(x, lse, normalizer);
      case Attraction::kQTimesNotQ:
        return SumQTimesNotQ::of<Real>(x, lse, normalizer + code);
      default:
        return V{};
    }
  }

  const TilePair<Real>& t;
};

template <typename Real, typename Fold>
SUPCON_APART void reduce_weighted(const TilePair<Real>& t) {
  WeightedReduce<Real, Fold> pass(t);
  for_each_similarity<Products<Real>, false>(t, pass);
  pass.write_rows();
}

template <typename Real>
void weighted_forward(const TilePair<Real>& t) {
  switch (t.term) {
    case Term::kMaximum:
      return reduce_weighted<Real, MaximumWithExponent<Real>>(t);
    case Term::kMaximumQ:
      return reduce_weighted<Real, MaximumQWithExponent<Real>>(t);
    case Term::kMean:
      return reduce_weighted<Real, WithFactor<Real, Exponent>>(t);
    case Term::kExp:
      return reduce_weighted<Real, WithExponent<Real, SumExp>>(t);
    case Term::kLogQ:
      return reduce_weighted<Real, WithFactor<Real, SumLogQ>>(t);
    case Term::kQ:
      return reduce_weighted<Real, WithExponent<Real, SumQ>>(t);
    case Term::kNotQ:
      return reduce_weighted<Real, WithFactor<Real, SumNotQ>>(t);
    case Term::kExpByOneShift:
      return;
    case Term::kQTimesNotQ:
      return reduce_weighted<Real, WithExponent<Real, SumQTimesNotQ>>(t);
  }
}

template <typename Real>
SUPCON_APART void weighted_weigh(const TilePair<Real>& t) {
  WeightedWeigh<Real> pass(t);
  for_each_similarity<Products<Real>, false>(t, pass);
}

template <typename Real>
void any_forward(const TilePair<Real>& t) {
  t.pair_weights.row != nullptr ? weighted_forward(t) : tile_forward<Products<Real>>(t);
}

template <typename Real>
void any_weigh(const TilePair<Real>& t) {
  t.pair_weights.row != nullptr ? weighted_weigh(t) : tile_weigh<Products<Real>>(t);
}

}  // namespace
}  // namespace supcon
