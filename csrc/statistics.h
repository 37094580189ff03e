// The forward: passes that fold the pairs of all tiles into rows, and what it knows of every row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "positives.h"
#include "side.h"
#include "supcon.h"

namespace supcon {

// What a forward pass is made with besides the pairs: numbers for each sorted row.
template <typename Real>
struct Inputs {
  const std::vector<Real>* lse = nullptr;
  const std::vector<Real>* shifts = nullptr;
};

// A thread's part of a forward pass: the term of every pair, folded into rows, and into columns
// that are rows, by fold(sorted row, of one tile's columns).
template <typename Real, typename Fold>
class Reducer {
 public:
  Reducer(const Sides<Real>& sides, Pairs pairs, Term term, const Inputs<Real>& inputs, Fold fold,
          Real* scratch)
      : sides_(sides),
        pairs_(pairs),
        term_(term),
        inputs_(inputs),
        fold_(fold),
        scratch_(scratch) {}

  void compute(int64_t i, int64_t j) {
    row_begin_ = sides_.rows.tile_begin(i);
    col_begin_ = sides_.cols.tile_begin(j);
    t_ = sides_.pair(i, j);
    if (pairs_ != Pairs::kAll) t_.classes = sides_.classes(i, j);
    is_empty_ = pairs_ == Pairs::kPositives && t_.classes.row == nullptr;
    if (is_empty_) return;
    if (sides_.own_in_tile(i, j, own_)) t_.own = own_;
    t_.pairs = pairs_;
    t_.term = term_;
    t_.shifted = sides_.shifted || (term_ != Term::kMaximum && term_ != Term::kExp);
    t_.scratch = scratch_;
    if (inputs_.lse != nullptr) t_.lse = sides_.lines(*inputs_.lse, i, j);
    if (inputs_.shifts != nullptr) t_.shifts = sides_.lines(*inputs_.shifts, i, j);
    t_.row_out = row_out_;
    t_.col_out = col_out_;
    sides_.functions.forward(t_);
  }
  void add_to_rows(int64_t) { add(row_out_, t_.num_rows, row_begin_); }
  void add_to_cols(int64_t) { add(col_out_, t_.num_cols, col_begin_); }

 private:
  void add(const Real* out, int count, int64_t begin) {
    for (int k = 0; k < (is_empty_ ? 0 : count); ++k) fold_(begin + k, out[k]);
  }

  const Sides<Real>& sides_;
  const Pairs pairs_;
  const Term term_;
  const Inputs<Real>& inputs_;
  const Fold fold_;
  Real* const scratch_;
  TilePair<Real> t_;
  bool is_empty_;
  int64_t row_begin_, col_begin_;
  int32_t own_[kMaxTile];
  Real row_out_[kMaxTile], col_out_[kMaxTile + kMaxPanel];
};

template <typename Real, typename Fold>
void reduce_pairs(const Sides<Real>& sides, Pairs pairs, Term term, const Inputs<Real>& inputs,
                  Fold fold) {
  PerThread<Real> scratch(sides.team, kScratch);
  sides.schedule.run(sides.team, false, sides.square, [&] {
    return Reducer<Real, Fold>(sides, pairs, term, inputs, fold, scratch.claim());
  });
}

// The largest exponent of every sorted row; -infinity where it has no such pair.
template <typename Real>
std::vector<Real> maxima(const Sides<Real>& sides, Pairs pairs) {
  std::vector<Real> largest(sides.rows.padded, -std::numeric_limits<Real>::infinity());
  reduce_pairs(sides, pairs, Term::kMaximum, {},
               [&](int64_t k, Real x) { largest[k] = std::max(largest[k], x); });
  return largest;
}

template <typename Real>
std::vector<double> sums(const Sides<Real>& sides, Pairs pairs, Term term,
                         const Inputs<Real>& inputs) {
  std::vector<double> sum(sides.rows.padded, 0.0);
  reduce_pairs(sides, pairs, term, inputs,
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

// Base-2 log-sum-exp of every sorted row over such pairs; -infinity where there is none.
template <typename Real>
std::vector<double> log_sum_exp(const Sides<Real>& sides, Pairs pairs) {
  const std::vector<Real> shift =
      sides.shifted ? maxima(sides, pairs) : std::vector<Real>(sides.rows.padded, Real(0));
  return logarithms(sides.team, sums(sides, pairs, Term::kExp, {nullptr, &shift}), shift);
}

// As the kernels take them.
template <typename Real>
std::vector<Real> rounded(const std::vector<double>& x) {
  return std::vector<Real>(x.begin(), x.end());
}

// What the forward knows of every sorted row, base 2 where it is a logarithm.
template <typename Real>
struct Statistics {
  explicit Statistics(const Sides<Real>& sides)
      : num_positives(count_positives(sides)), softmax_weight(sides.rows.padded, 1.0) {
    const Problem<Real>& problem = sides.problem;
    const bool all = problem.denominator == Denominator::kAll;
    lse = log_sum_exp(sides, all ? Pairs::kAll : Pairs::kNegatives);
    if (problem.denominator == Denominator::kOnePositive)
      one_positive(sides);
    else if (problem.summation == Summation::kIn)
      log_mean = log_sum_exp(sides, Pairs::kPositives);
  }

  std::vector<double> num_positives;
  std::vector<double> lse;       // of the denominator, or of the negatives for kOnePositive
  std::vector<double> mean_log;  // kOut: the positives' mean exponent, or log2 of probability
  std::vector<double> log_mean;  // kIn: log-sum-exp over positives, or log2 of the sum of q
  std::vector<double> softmax_weight;

 private:
  void one_positive(const Sides<Real>& sides) {
    const std::vector<Real> l = rounded<Real>(lse);
    if (sides.problem.summation == Summation::kOut) {
      mean_log = sums(sides, Pairs::kPositives, Term::kLogQ, {&l, nullptr});
      softmax_weight = sums(sides, Pairs::kPositives, Term::kNotQ, {&l, nullptr});
      for (size_t k = 0; k < num_positives.size(); ++k) {
        mean_log[k] /= num_positives[k];
        softmax_weight[k] /= num_positives[k];
      }
      return;
    }
    // The largest q of a row is that of its largest exponent, by the tiles' own arithmetic: no
    // log2(q) may be far above the shift.
    std::vector<Real> shift = maxima(sides, Pairs::kPositives);
    for (size_t k = 0; k < shift.size(); ++k) {
      const double d = static_cast<double>(l[k] - shift[k]);
      shift[k] = static_cast<Real>(-std::max(d, 0.0) - std::log2(1 + std::exp2(-std::abs(d))));
    }
    const std::vector<double> sum = sums(sides, Pairs::kPositives, Term::kQ, {&l, &shift});
    softmax_weight = sums(sides, Pairs::kPositives, Term::kQTimesNotQ, {&l, &shift});
    log_mean = logarithms(sides.team, sum, shift);
    for (size_t k = 0; k < num_positives.size(); ++k) softmax_weight[k] /= sum[k];
  }
};

template <typename Real>
bool contributes(const Problem<Real>& problem, const Statistics<Real>& of, int64_t k) {
  const bool some_below = problem.denominator != Denominator::kOnlyNegatives ||
                          of.lse[k] > -std::numeric_limits<double>::infinity();
  return of.num_positives[k] > 0 && some_below;
}

// Writes what the caller gets of sorted row k, which contributes, and returns its loss.
template <typename Real>
double write_results(const Sides<Real>& sides, const Statistics<Real>& of, int64_t k,
                     const Results<Real>& out) {
  const Problem<Real>& problem = sides.problem;
  const int64_t i = sides.rows.order[k];
  const bool mean_of_logs = problem.summation == Summation::kOut;
  const bool lse_is_below = problem.denominator != Denominator::kOnePositive;
  double loss = lse_is_below ? of.lse[k] : 0.0;
  loss -= mean_of_logs ? of.mean_log[k] : of.log_mean[k] - std::log2(of.num_positives[k]);
  loss *= kLn2;
  // What the positives hold, all hold: below zero there are only roundings.
  if (problem.denominator == Denominator::kAll) loss = std::max(loss, 0.0);
  out.loss[i] = static_cast<Real>(loss);
  out.statistics.lse[i] = of.lse[k];
  out.statistics.normalizer[i] = mean_of_logs ? of.num_positives[k] : of.log_mean[k];
  out.statistics.softmax_weight[i] = of.softmax_weight[k];
  return loss;
}

}  // namespace supcon
