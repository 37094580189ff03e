// The forward: passes that fold the pairs of all tiles into rows, and what it knows of every row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "positives.h"
#include "side.h"
#include "supcon.h"
#include "weights.h"

namespace supcon {

// What a forward pass is made with besides the pairs: numbers for each of the anchors.
template <typename Real>
struct Inputs {
  const std::vector<Real>* lse = nullptr;
  const std::vector<Real>* shifts = nullptr;
};

// A thread's part of a forward pass: the term of every pair, folded into rows, and into columns
// that are anchors, by fold(anchor, of one tile's columns).
template <typename Real, typename Fold>
class Reducer {
 public:
  Reducer(const Weights<Real>& weights, Pairs pairs, Term term, const Inputs<Real>& inputs,
          Fold fold, PairMemory<Real> memory)
      : weights_(weights),
        sides_(weights.sides()),
        pairs_(pairs),
        term_(term),
        inputs_(inputs),
        fold_(fold),
        memory_(memory) {}

  void compute(int64_t i, int64_t j) {
    row_begin_ = sides_.rows.tile_begin(i);
    col_begin_ = sides_.cols.tile_begin(j);
    t_ = sides_.pair(i, j);
    const bool weighted = weights_.in_tile(i, j) && weights_.in_pass(pairs_);
    if (pairs_ != Pairs::kAll && !weights_.given()) t_.classes = sides_.classes(i, j);
    is_empty_ = pairs_ == Pairs::kPositives && !weighted && t_.classes.row == nullptr;
    if (is_empty_) return;
    if (sides_.own_in_tile(i, j, own_)) t_.own = own_;
    if (weighted) weights_.set(i, j, memory_, &t_);
    t_.pairs = pairs_;
    t_.term = term_;
    t_.shifted = sides_.shifted || (term_ != Term::kMaximum && term_ != Term::kExp);
    sides_.set_memory(i, j, memory_, &t_);
    if (inputs_.lse != nullptr) t_.lse = sides_.lines(*inputs_.lse, i, j);
    if (inputs_.shifts != nullptr) t_.shifts = sides_.lines(*inputs_.shifts, i, j);
    t_.row_out = row_out_;
    t_.col_out = col_out_;
    sides_.functions.forward(t_);
  }
  void begin_rows(int64_t, int64_t) {}
  void begin_cols(int64_t, int64_t) {}
  void add_to_rows(int64_t) { add(row_out_, t_.num_rows, row_begin_); }
  void add_to_cols(int64_t) { add(col_out_, t_.num_cols, sides_.first_col() + col_begin_); }

 private:
  void add(const Real* out, int count, int64_t begin) {
    for (int k = 0; k < (is_empty_ ? 0 : count); ++k) fold_(begin + k, out[k]);
  }

  const Weights<Real>& weights_;
  const Sides<Real>& sides_;
  const Pairs pairs_;
  const Term term_;
  const Inputs<Real>& inputs_;
  const Fold fold_;
  const PairMemory<Real> memory_;
  TilePair<Real> t_;
  bool is_empty_;
  int64_t row_begin_, col_begin_;
  int32_t own_[kMaxTile];
  Real row_out_[kMaxTile], col_out_[kMaxTile + kMaxPanel];
};

template <typename Real, typename Fold>
void reduce_pairs(const Weights<Real>& weights, Pairs pairs, Term term, const Inputs<Real>& inputs,
                  Fold fold) {
  const Sides<Real>& sides = weights.sides();
  PairMemories<Real> memory(weights);
  sides.schedule.run(sides.team, false, sides.both_anchor, [&] {
    return Reducer<Real, Fold>(weights, pairs, term, inputs, fold, memory.claim());
  });
  if (pairs != Pairs::kPositives) sides.have_kept();
}

// The largest exponent of every anchor, or log2(q); -infinity where it has no such pair.
template <typename Real>
std::vector<Real> maxima(const Weights<Real>& weights, Pairs pairs, Term term = Term::kMaximum,
                         const Inputs<Real>& inputs = {}) {
  std::vector<Real> largest(weights.sides().num_anchors(), -std::numeric_limits<Real>::infinity());
  reduce_pairs(weights, pairs, term, inputs,
               [&](int64_t k, Real x) { largest[k] = std::max(largest[k], x); });
  return largest;
}

template <typename Real>
std::vector<double> sums(const Weights<Real>& weights, Pairs pairs, Term term,
                         const Inputs<Real>& inputs) {
  std::vector<double> sum(weights.sides().num_anchors(), 0.0);
  reduce_pairs(weights, pairs, term, inputs,
               [&](int64_t k, Real x) { sum[k] += static_cast<double>(x); });
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

// The same as log_sum_exp with one shift for all anchors, which needs no maxima; empty where some
// sum leaves Real's range. Unit rows whose largest exponents are far below what they could be are
// rare.
template <typename Real>
std::vector<double> by_one_shift(const Weights<Real>& weights, Pairs pairs) {
  typedef std::numeric_limits<Real> Limits;
  const Sides<Real>& sides = weights.sides();
  const double reach = kLog2E / sides.problem.temperature;
  const bool is_hopeless = reach > 1.6 * Limits::max_exponent;
  if (!sides.problem.normalize || is_hopeless || pairs == Pairs::kPositives || weights.given())
    return {};
  // No sum over a tile overflows; and a whole number takes no bits off the largest exponents.
  const double excess = std::ceil(reach - (Limits::max_exponent - 10));
  const std::vector<Real> shift(sides.num_anchors(), static_cast<Real>(std::max(excess, 0.0)));
  std::vector<double> sum = sums(weights, pairs, Term::kExpByOneShift, {nullptr, &shift});
  // Powers that are no normal numbers are lost: all of them together shall be a rounding.
  const double most = static_cast<double>(std::max(sides.rows.size, sides.cols.size));
  const double least = std::ldexp(most, Limits::min_exponent + Limits::digits + 1);
  const auto all_are_in_range = [&](int64_t first, int64_t size) {
    return std::all_of(sum.begin() + first, sum.begin() + first + size,
                       [&](double s) { return s >= least; });
  };
  if (!all_are_in_range(0, sides.rows.size)) return {};
  if (sides.problem.symmetric && !all_are_in_range(sides.first_col(), sides.cols.size)) return {};
  return logarithms(sides.team, std::move(sum), shift);
}

// Base-2 log-sum-exp of every anchor over such pairs; -infinity where there is none.
template <typename Real>
std::vector<double> log_sum_exp(const Weights<Real>& weights, Pairs pairs) {
  const Sides<Real>& sides = weights.sides();
  if (sides.shifted) {
    std::vector<double> found = by_one_shift(weights, pairs);
    if (!found.empty()) return found;
  }
  const std::vector<Real> shift =
      sides.shifted ? maxima(weights, pairs) : std::vector<Real>(sides.num_anchors(), Real(0));
  return logarithms(sides.team, sums(weights, pairs, Term::kExp, {nullptr, &shift}), shift);
}

// As the kernels take them.
template <typename Real>
std::vector<Real> rounded(const std::vector<double>& x) {
  return std::vector<Real>(x.begin(), x.end());
}

// What the forward knows of every anchor, base 2 where it is a logarithm.
template <typename Real>
struct Statistics {
  // `mirrored` is of the other way where the problem is symmetric, else null.
  Statistics(const Weights<Real>& weights, const Weights<Real>* mirrored)
      : softmax_weight(weights.sides().num_anchors(), 1.0), mirrored_(mirrored) {
    total_weight = of_anchors(weights, [](const Weights<Real>& way) {
      return way.given() ? way.rows().total : count_positives(way.sides());
    });
    const Problem<Real>& problem = weights.sides().problem;
    const bool all = problem.denominator == Denominator::kAll;
    lse = log_sum_exp(weights, all ? Pairs::kAll : Pairs::kNegatives);
    if (problem.denominator == Denominator::kOnePositive)
      one_positive(weights);
    else if (problem.summation == Summation::kIn)
      log_mean = log_sum_exp(weights, Pairs::kPositives);
    else
      mean_log = mean_exponents(weights);
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

  std::vector<double> mean_exponents(const Weights<Real>& weights) const {
    if (!weights.given())
      return of_anchors(weights, [](const Weights<Real>& way) {
        return supcon::mean_exponents(way.sides(), count_positives(way.sides()));
      });
    std::vector<double> mean(weights.sides().num_anchors(), 0.0);
    if (weights.any()) mean = sums(weights, Pairs::kPositives, Term::kMean, {});
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

  void one_positive(const Weights<Real>& weights) {
    const std::vector<Real> l = rounded<Real>(lse);
    if (weights.sides().problem.summation == Summation::kOut) {
      mean_log = sums(weights, Pairs::kPositives, Term::kLogQ, {&l, nullptr});
      softmax_weight = sums(weights, Pairs::kPositives, Term::kNotQ, {&l, nullptr});
      if (weights.given()) return;  // each is divided by the total as it is
      for (size_t k = 0; k < total_weight.size(); ++k) {
        mean_log[k] /= total_weight[k];
        softmax_weight[k] /= total_weight[k];
      }
      return;
    }
    const std::vector<Real> shift = largest_log_q(weights, l);
    const std::vector<double> sum = sums(weights, Pairs::kPositives, Term::kQ, {&l, &shift});
    softmax_weight = sums(weights, Pairs::kPositives, Term::kQTimesNotQ, {&l, &shift});
    log_mean = logarithms(weights.sides().team, sum, shift);
    for (size_t k = 0; k < total_weight.size(); ++k) softmax_weight[k] /= sum[k];
  }

  // By the tiles' own arithmetic: no log2(q) may be far above the shift.
  static std::vector<Real> largest_log_q(const Weights<Real>& weights, const std::vector<Real>& l) {
    if (weights.given()) return maxima(weights, Pairs::kPositives, Term::kMaximumQ, {&l, nullptr});
    // The largest q of a row is that of its largest exponent.
    std::vector<Real> shift = maxima(weights, Pairs::kPositives);
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
