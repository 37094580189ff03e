// The forward: passes that fold the pairs of all tiles into rows, and what it knows of every row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "parallel.h"
#include "positives.h"
#include "side.h"
#include "supcon.h"
#include "weights.h"

namespace supcon {

// A term of a forward pass: of which pairs it is made, and with which numbers of the anchors.
template <typename Real>
struct PassTerm {
  Pairs pairs;
  Term term;
  const std::vector<Real>* lse = nullptr;
  const std::vector<Real>* shifts = nullptr;
};

// A thread's part of a forward pass: terms of every pair, whose exponent is made once. Each is
// folded into rows, and into columns that are anchors, by fold(term, anchor, of one tile's
// columns).
template <typename Real, typename Fold>
class Reducer {
 public:
  Reducer(const Weights<Real>& weights, const std::vector<PassTerm<Real>>& terms, Fold fold,
          PairMemory<Real> memory)
      : weights_(weights), sides_(weights.sides()), terms_(terms), fold_(fold), memory_(memory) {}

  void compute(int64_t i, int64_t j) {
    row_begin_ = sides_.rows.tile_begin(i);
    col_begin_ = sides_.cols.tile_begin(j);
    t_ = sides_.pair(i, j);
    find_terms(i, j);
    if (num_here_ == 0) return;
    if (sides_.own_in_tile(i, j, own_)) t_.own = own_;
    sides_.set_memory(i, j, memory_, &t_);
    if (num_here_ > 1 && t_.kept == Kept::kNothing && t_.keeps == Kept::kNothing)
      t_.keeps = Kept::kExponents;
    for (int h = 0; h < num_here_; ++h) {
      fold_pairs(i, j, here_[h]);
      if (t_.keeps == Kept::kNothing) continue;
      t_.kept = t_.keeps;
      t_.keeps = Kept::kNothing;
    }
  }
  void begin_rows(int64_t, int64_t) {}
  void begin_cols(int64_t, int64_t) {}
  void add_to_rows(int64_t) { add(row_out_, t_.num_rows, row_begin_); }
  void add_to_cols(int64_t) { add(col_out_, t_.num_cols, sides_.first_col() + col_begin_); }

 private:
  static constexpr int kMaxTerms = 2;

  // The terms that have pairs in this pair of tiles.
  void find_terms(int64_t i, int64_t j) {
    num_here_ = 0;
    for (size_t k = 0; k < terms_.size(); ++k)
      if (terms_[k].pairs != Pairs::kPositives || is_weighted(i, j, k) ||
          (!weights_.given() && sides_.classes(i, j).row != nullptr))
        here_[num_here_++] = k;
  }
  bool is_weighted(int64_t i, int64_t j, size_t k) const {
    return weights_.in_tile(i, j) && weights_.in_pass(terms_[k].pairs);
  }
  // Where one term looks at the pairs' weights, those after it do, too: they leave out what the
  // terms before have not multiplied, below the diagonal.
  void fold_pairs(int64_t i, int64_t j, size_t k) {
    const PassTerm<Real>& of = terms_[k];
    if (of.pairs != Pairs::kAll && !weights_.given()) t_.classes = sides_.classes(i, j);
    if (t_.pair_weights.row == nullptr && is_weighted(i, j, k)) weights_.set(i, j, memory_, &t_);
    t_.pairs = of.pairs;
    t_.term = of.term;
    t_.shifted = sides_.shifted || (of.term != Term::kMaximum && of.term != Term::kExp);
    if (of.lse != nullptr) t_.lse = sides_.lines(*of.lse, i, j);
    if (of.shifts != nullptr) t_.shifts = sides_.lines(*of.shifts, i, j);
    t_.row_out = row_out_[k];
    t_.col_out = col_out_[k];
    sides_.functions.forward(t_);
  }
  template <int kSize>
  void add(const Real (&out)[kMaxTerms][kSize], int count, int64_t begin) {
    for (int h = 0; h < num_here_; ++h)
      for (int n = 0; n < count; ++n) fold_(here_[h], begin + n, out[here_[h]][n]);
  }

  const Weights<Real>& weights_;
  const Sides<Real>& sides_;
  const std::vector<PassTerm<Real>>& terms_;
  const Fold fold_;
  const PairMemory<Real> memory_;
  TilePair<Real> t_;
  int num_here_;
  size_t here_[kMaxTerms];
  int64_t row_begin_, col_begin_;
  int32_t own_[kMaxTile];
  Real row_out_[kMaxTerms][kMaxTile], col_out_[kMaxTerms][kMaxTile + kMaxPanel];
};

template <typename Real, typename Fold>
void reduce_pairs(const Weights<Real>& weights, const std::vector<PassTerm<Real>>& terms,
                  Fold fold) {
  const Sides<Real>& sides = weights.sides();
  PairMemories<Real> memory(weights);
  sides.schedule.run(sides.team, false, sides.both_anchor,
                     [&] { return Reducer<Real, Fold>(weights, terms, fold, memory.claim()); });
  if (terms[0].pairs != Pairs::kPositives) sides.have_kept();
}

// Of each term, numbers of every anchor.
template <typename T>
using PerTerm = std::vector<std::vector<T>>;

// The largest; -infinity where an anchor has no such pair.
template <typename Real>
PerTerm<Real> maxima(const Weights<Real>& weights, const std::vector<PassTerm<Real>>& terms) {
  const Real none = -std::numeric_limits<Real>::infinity();
  PerTerm<Real> largest(terms.size(), std::vector<Real>(weights.sides().num_anchors(), none));
  reduce_pairs(weights, terms, [&](size_t term, int64_t k, Real x) {
    largest[term][k] = std::max(largest[term][k], x);
  });
  return largest;
}

template <typename Real>
PerTerm<double> sums(const Weights<Real>& weights, const std::vector<PassTerm<Real>>& terms) {
  PerTerm<double> sum(terms.size(), std::vector<double>(weights.sides().num_anchors(), 0.0));
  reduce_pairs(weights, terms,
               [&](size_t term, int64_t k, Real x) { sum[term][k] += static_cast<double>(x); });
  return sum;
}

// Base-2 logarithms of the sums of 2^x, given those of 2^(x - shift).
template <typename Real>
std::vector<double> logarithms(const Team& team, std::vector<double> sum,
                               const std::vector<Real>& shift) {
  parallel_ranges(team, sum.size(), kRange, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      sum[k] = static_cast<double>(shift[k]) + std::log2(sum[k]);
  });
  return sum;
}

// Base-2 log-sum-exps of every anchor over sets of pairs, -infinity where there is none, and of the
// same exponents the positives' mean by their weights, if it is wanted.
template <typename Real>
class LogSumExps {
 public:
  LogSumExps(const Weights<Real>& weights, std::vector<Pairs> sets,
             const std::vector<double>& total_weight, bool wants_mean)
      : of(sets.size()),
        weights_(weights),
        sides_(weights.sides()),
        sets_(std::move(sets)),
        total_weight_(total_weight),
        wants_mean_(wants_mean) {
    left_.resize(sets_.size());
    std::iota(left_.begin(), left_.end(), 0);
    if (const std::optional<Real> shift = common_shift()) {
      const std::vector<Real> shifts(sides_.num_anchors(), *shift);
      const bool has_kernel = sides_.shifted && !weights.given();
      add_up(has_kernel ? Term::kExpByOneShift : Term::kExp, PerTerm<Real>(left_.size(), shifts),
             sides_.shifted);
    }
    if (left_.empty()) return;
    add_up(Term::kExp, maxima(weights, terms(Term::kMaximum)), false);
  }

  PerTerm<double> of;  // of each set
  std::vector<double> mean;

 private:
  // One shift for all anchors, which needs no maxima: 0 where sums fit as they are. Unit rows whose
  // largest exponents are far below what they could be are rare.
  std::optional<Real> common_shift() const {
    if (!sides_.shifted) return Real(0);
    const double reach = kLog2E / sides_.problem.temperature;
    if (!sides_.problem.normalize || reach > 1.6 * Limits::max_exponent) return std::nullopt;
    // No sum over a tile overflows; and a whole number takes no bits off the largest exponents.
    const double excess = std::ceil(reach - (Limits::max_exponent - 10));
    return static_cast<Real>(std::max(excess, 0.0));
  }

  std::vector<PassTerm<Real>> terms(Term term) const {
    std::vector<PassTerm<Real>> found;
    for (size_t s : left_) found.push_back({sets_[s], term});
    return found;
  }

  // One pass over the sets that are left, each with shifts of its own. Those are done whose sums,
  // if `may_leave_range`, are all within Real's range.
  void add_up(Term term, const PerTerm<Real>& shifts, bool may_leave_range) {
    std::vector<PassTerm<Real>> of_pass = terms(term);
    for (size_t n = 0; n < left_.size(); ++n) of_pass[n].shifts = &shifts[n];
    const bool makes_mean = wants_mean_ && mean.empty();
    if (makes_mean) of_pass.push_back({Pairs::kPositives, Term::kMean});
    PerTerm<double> found = sums(weights_, of_pass);
    if (makes_mean) mean = std::move(found.back());
    std::vector<size_t> left;
    for (size_t n = 0; n < left_.size(); ++n)
      if (may_leave_range && !is_in_range(found[n], sets_[left_[n]]))
        left.push_back(left_[n]);
      else
        of[left_[n]] = logarithms(sides_.team, std::move(found[n]), shifts[n]);
    left_ = std::move(left);
  }

  // Powers that are no normal numbers are lost: all of them together shall be a rounding.
  bool is_in_range(const std::vector<double>& sum, Pairs pairs) const {
    const double most = static_cast<double>(std::max(sides_.rows.size, sides_.cols.size));
    const double least = std::ldexp(most, Limits::min_exponent + Limits::digits + 1);
    const auto all_are = [&](int64_t first, int64_t size) {
      for (int64_t k = first; k < first + size; ++k)
        if (sum[k] < least && (pairs != Pairs::kPositives || total_weight_[k] > 0)) return false;
      return true;
    };
    return all_are(0, sides_.rows.size) &&
           (!sides_.problem.symmetric || all_are(sides_.first_col(), sides_.cols.size));
  }

  typedef std::numeric_limits<Real> Limits;

  const Weights<Real>& weights_;
  const Sides<Real>& sides_;
  const std::vector<Pairs> sets_;
  const std::vector<double>& total_weight_;
  const bool wants_mean_;
  std::vector<size_t> left_;  // of the sets
};

// As the kernels take them.
template <typename Real>
std::vector<Real> rounded(const std::vector<double>& x) {
  return std::vector<Real>(x.begin(), x.end());
}

// What the forward knows of every anchor, base 2 where it is a logarithm.
template <typename Real>
struct Statistics {
  // `mirrored` is of the other way where the problem is symmetric, else null; `negatives` the
  // columns' log-sum-exp, where they have others besides these rows, else null.
  Statistics(const Weights<Real>& weights, const Weights<Real>* mirrored, const double* negatives)
      : softmax_weight(weights.sides().num_anchors(), 1.0), mirrored_(mirrored) {
    total_weight = of_anchors(weights, [](const Weights<Real>& way) {
      return way.given() ? way.rows().total : count_positives(way.sides());
    });
    const Problem<Real>& problem = weights.sides().problem;
    const bool all = problem.denominator == Denominator::kAll;
    std::vector<Pairs> sets = {all ? Pairs::kAll : Pairs::kNegatives};
    const bool one_positive = problem.denominator == Denominator::kOnePositive;
    const bool is_mean = problem.summation == Summation::kOut;
    if (!is_mean && !one_positive) sets.push_back(Pairs::kPositives);
    LogSumExps<Real> found(weights, std::move(sets), total_weight,
                           is_mean && !one_positive && weights.any());
    lse = std::move(found.of[0]);
    if (negatives != nullptr) {
      const Sides<Real>& sides = weights.sides();
      for (int64_t k = 0; k < sides.cols.size; ++k)
        lse[sides.first_col() + k] = negatives[sides.cols.order[k]] / kLn2;
    }
    if (one_positive)
      look_at_positives(weights);
    else if (is_mean)
      mean_log = mean_exponents(weights, std::move(found.mean));
    else
      log_mean = std::move(found.of[1]);
    if (problem.summation == Summation::kIn && weights.given())
      for (size_t k = 0; k < log_mean.size(); ++k) log_mean[k] += std::log2(total_weight[k]);
  }

  std::vector<double> total_weight;  // of the positives: their number, where they have no weights
  std::vector<double> lse;           // of the denominator, or of the negatives for kOnePositive
  std::vector<double> mean_log;      // kOut: the positives' mean exponent, or log2 of probability
  std::vector<double> log_mean;      // kIn: log-sum-exp over positives, or log2 of the sum of q
  std::vector<double> softmax_weight;

 private:
  // What of(weights) has of each sorted row, and then of each sorted column that is an anchor of
  // its own; 0 in the padding.
  template <typename Of>
  std::vector<double> of_anchors(const Weights<Real>& weights, Of of) const {
    std::vector<double> all = of(weights);
    all.resize(weights.sides().rows.padded, 0.0);
    if (mirrored_ == nullptr) return all;
    const std::vector<double> of_cols = of(*mirrored_);
    all.insert(all.end(), of_cols.begin(), of_cols.end());
    all.resize(weights.sides().num_anchors(), 0.0);
    return all;
  }

  // `mean` is of the anchors that are looked at pair by pair.
  std::vector<double> mean_exponents(const Weights<Real>& weights, std::vector<double> mean) const {
    if (!weights.given())
      return of_anchors(weights, [](const Weights<Real>& way) {
        return supcon::mean_exponents(way.sides(), count_positives(way.sides()));
      });
    mean.resize(weights.sides().num_anchors(), 0.0);
    if (!sums_soft_classes(weights.sides().problem)) return mean;
    const std::vector<double> by_sums = of_anchors(weights, mean_soft_exponents<Real>);
    const auto take = [&](const std::vector<bool>& by_pair, int64_t first) {
      for (size_t k = 0; k < by_pair.size(); ++k)
        if (!by_pair[k]) mean[first + k] = by_sums[first + k];
    };
    take(weights.rows().by_pair, 0);
    if (mirrored_ != nullptr) take(weights.cols().by_pair, weights.sides().first_col());
    return mean;
  }

  // Each against the negatives.
  void look_at_positives(const Weights<Real>& weights) {
    const std::vector<Real> l = rounded<Real>(lse);
    const auto both = [&](Term first, Term second, const std::vector<Real>* shift) {
      return sums<Real>(
          weights, {{Pairs::kPositives, first, &l, shift}, {Pairs::kPositives, second, &l, shift}});
    };
    if (weights.sides().problem.summation == Summation::kOut) {
      PerTerm<double> found = both(Term::kLogQ, Term::kNotQ, nullptr);
      mean_log = std::move(found[0]);
      softmax_weight = std::move(found[1]);
      if (weights.given()) return;  // each is divided by the total as it is
      for (size_t k = 0; k < total_weight.size(); ++k) {
        mean_log[k] /= total_weight[k];
        softmax_weight[k] /= total_weight[k];
      }
      return;
    }
    const std::vector<Real> shift = largest_log_q(weights, l);
    PerTerm<double> found = both(Term::kQ, Term::kQTimesNotQ, &shift);
    log_mean = logarithms(weights.sides().team, found[0], shift);
    softmax_weight = std::move(found[1]);
    for (size_t k = 0; k < total_weight.size(); ++k) softmax_weight[k] /= found[0][k];
  }

  // By the tiles' own arithmetic: no log2(q) may be far above the shift.
  static std::vector<Real> largest_log_q(const Weights<Real>& weights, const std::vector<Real>& l) {
    const Term term = weights.given() ? Term::kMaximumQ : Term::kMaximum;
    std::vector<Real> shift = std::move(maxima<Real>(weights, {{Pairs::kPositives, term, &l}})[0]);
    if (weights.given()) return shift;
    // The largest q of a row is that of its largest exponent.
    for (size_t k = 0; k < shift.size(); ++k) {
      const double d = static_cast<double>(l[k] - shift[k]);
      shift[k] = static_cast<Real>(-std::max(d, 0.0) - std::log2(1 + std::exp2(-std::abs(d))));
    }
    return shift;
  }

  const Weights<Real>* const mirrored_;
};

template <typename Real>
bool contributes(const Problem<Real>& problem, const Statistics<Real>& of, int64_t k) {
  const bool some_below = problem.denominator != Denominator::kOnlyNegatives ||
                          of.lse[k] > -std::numeric_limits<double>::infinity();
  return of.total_weight[k] > 0 && some_below;
}

// Writes what the caller gets of anchor k, which contributes, as of row i of the input, and returns
// its loss.
template <typename Real>
double write_results(const Problem<Real>& problem, const Statistics<Real>& of, int64_t k, int64_t i,
                     const Results<Real>& out) {
  const bool mean_of_logs = problem.summation == Summation::kOut;
  const bool lse_is_below = problem.denominator != Denominator::kOnePositive;
  double loss = lse_is_below ? of.lse[k] : 0.0;
  loss -= mean_of_logs ? of.mean_log[k] : of.log_mean[k] - std::log2(of.total_weight[k]);
  loss *= kLn2;
  // What the positives hold, all hold: below zero there are only roundings.
  if (problem.denominator == Denominator::kAll) loss = std::max(loss, 0.0);
  out.loss[i] = static_cast<Real>(loss);
  out.statistics.lse[i] = of.lse[k];
  out.statistics.normalizer[i] = mean_of_logs ? of.total_weight[k] : of.log_mean[k];
  out.statistics.softmax_weight[i] = of.softmax_weight[k];
  return loss;
}

}  // namespace supcon
