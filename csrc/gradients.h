// The backward: what every anchor weighs pairs with, what pairs give to the gradients of both
// sides, and the way back to the gradient of the input.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "positives.h"
#include "side.h"
#include "supcon.h"
#include "weights.h"

namespace supcon {

// A power of two near the largest gradient: weights divided by sums of 2^x have no range to spare.
template <typename Real>
double unit_of(const Sides<Real>& sides, const Gradients<Real>& out) {
  Real largest = 0;
  for (int64_t i : sides.rows.order) largest = std::max(largest, std::abs(out.loss[i]));
  if (out.col_loss != nullptr)
    for (int64_t j : sides.cols.order) largest = std::max(largest, std::abs(out.col_loss[j]));
  if (largest == 0 || !std::isfinite(largest)) return 1.0;
  constexpr int kReach = std::numeric_limits<Real>::max_exponent * 3 / 4;
  return std::ldexp(1.0, std::clamp(std::ilogb(largest), -kReach, kReach));
}

// Of each sorted anchor of a side what the backward weighs pairs with, base 2 where it is a
// logarithm. All weights and pulls, and gradients made of them, are in the given unit.
template <typename Real>
struct Upstream {
  Upstream(const Weights<Real>& weights, const Side<Real>& side, const Real* grad_loss,
           const RowStatistics& statistics, double unit)
      : lse(side.padded, std::numeric_limits<Real>::infinity()),
        shifted_weight(side.padded, 0),
        plain_weight(side.padded, 0),
        normalizer(side.padded, std::numeric_limits<Real>::infinity()),
        shifted_pull(side.padded, 0),
        plain_pull(side.padded, 0),
        pull_by_class(side.padded, 0.0),
        pulls_in_tile(side.num_tiles, weights.sides().problem.summation == Summation::kIn),
        summation_(weights.sides().problem.summation) {
    const Sides<Real>& sides = weights.sides();
    const AnchorWeights& of = &side == &sides.rows ? weights.rows() : weights.cols();
    parallel_ranges(sides.team, side.size, kRange, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = side.order[k];
        const double total = weights.given() ? of.total[k] : 1.0;
        weigh(k, static_cast<double>(grad_loss[i]) / unit, statistics.lse[i],
              statistics.normalizer[i], statistics.softmax_weight[i], total);
        if (weights.given() && of.by_pair[k] && summation_ == Summation::kOut) {
          shifted_pull[k] = static_cast<Real>(pull_by_class[k] * total);
          pull_by_class[k] = 0;
        }
      }
    });
    if (sides.problem.summation == Summation::kOut && !weights.given()) pull_in_tiles(sides, side);
  }

  std::vector<Real> lse;             // infinite where the anchor does not contribute
  std::vector<Real> shifted_weight;  // of 2^(x - lse)
  std::vector<Real> plain_weight;    // of 2^x
  std::vector<Real> normalizer;      // kIn
  std::vector<Real> shifted_pull;    // of 2^(x - normalizer), or of every positive in a tile
  std::vector<Real> plain_pull;      // of 2^x, or of every positive in a tile
  std::vector<double> pull_by_class;
  std::vector<bool> pulls_in_tile;  // whether a tile has positives that it looks at itself

 private:
  // Weights in tiles are relative to a total, which the forward may have had more of than is here.
  void weigh(int64_t k, double grad, double exact, double normalizes, double softmax_weight,
             double total) {
    if (normalizes == std::numeric_limits<double>::infinity()) return;  // but not where it is NaN
    const double weight = grad * softmax_weight;
    lse[k] = static_cast<Real>(exact);
    if (weight != 0) {
      shifted_weight[k] = static_cast<Real>(weight * std::exp2(rounding(lse[k], exact)));
      plain_weight[k] = static_cast<Real>(weight * std::exp2(-exact));
    }
    if (!(total > 0)) return;
    if (summation_ == Summation::kOut) {
      pull_by_class[k] = grad / normalizes;
    } else {
      normalizes -= std::log2(total);
      normalizer[k] = static_cast<Real>(normalizes);
      shifted_pull[k] = static_cast<Real>(grad * std::exp2(rounding(normalizer[k], normalizes)));
      plain_pull[k] = static_cast<Real>(grad * std::exp2(-normalizes));
    }
  }

  // Takes the pull of positives that are looked at one by one from the classes to the tiles.
  void pull_in_tiles(const Sides<Real>& sides, const Side<Real>& side) {
    const bool all = all_pull_in_tiles(sides), of_cols = &side != &sides.rows;
    for (const Segment& segment : side.segments) {
      if (!all && !sides.few_positives(segment, of_cols)) continue;
      for (int64_t k = segment.begin; k < segment.end; ++k) {
        shifted_pull[k] = plain_pull[k] = static_cast<Real>(pull_by_class[k]);
        pull_by_class[k] = 0;
        pulls_in_tile[k / side.tile] = true;
      }
    }
  }

  // What a logarithm gained by being rounded: weights are made smaller by as much.
  static double rounding(Real rounded, double exact) {
    return static_cast<double>(rounded) - exact;
  }

  const Summation summation_;
};

template <typename Real>
Attraction attraction_of(const Problem<Real>& problem) {
  if (positives_by_class(problem)) return Attraction::kOne;
  if (problem.denominator != Denominator::kOnePositive) return Attraction::kExp;
  return problem.summation == Summation::kOut ? Attraction::kNotQ : Attraction::kQTimesNotQ;
}

// The gradient of one side's scaled embeddings, in as many copies as the schedule adds to.
template <typename Real>
class SideGradient {
 public:
  SideGradient(const Side<Real>& side, const ClassPulls<Real>& pulls, int64_t num_copies)
      : side_(side),
        pulls_(pulls),
        size_(side.padded * side.stride),
        num_copies_(num_copies),
        memory_(size_ * num_copies) {}

  Real* get(int64_t copy = 0) { return memory_.get() + copy * size_; }
  // Of a tile: what its classes pull, by the thread that adds to it first and has it in its cache.
  void begin(int64_t tile, int64_t copy) {
    const bool is_last = tile + 1 == side_.num_tiles;
    const int64_t begin = side_.tile_begin(tile);
    Real* const rows = get(copy);
    std::fill(rows + begin * side_.stride,
              rows + (is_last ? side_.padded : side_.tile_begin(tile + 1)) * side_.stride, Real(0));
    if (copy == 0) pulls_.subtract(begin, begin + side_.tile_size(tile), rows);
  }
  void fill_with(const Team& team, Real value) { fill(team, get(), size_ * num_copies_, value); }
  // Adds all copies to the first, which then is of the embeddings, whatever was multiplied. Rows
  // with a factor have no pulls of classes.
  void add_up(const Team& team) {
    add_copies(team);
    parallel_ranges(team, side_.factor.size(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Real inverse = 1 / side_.factor[k];
        for (int64_t d = 0; d < side_.dim; ++d) get()[k * side_.stride + d] *= inverse;
      }
    });
  }

 private:
  void add_copies(const Team& team) {
    if (num_copies_ == 1) return;
    parallel_ranges(team, size_, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t c = 1; c < num_copies_; ++c)
        for (int64_t k = begin; k < end; ++k) get()[k] += get()[c * size_ + k];
    });
  }

  const Side<Real>& side_;
  const ClassPulls<Real>& pulls_;
  const int64_t size_, num_copies_;
  Array<Real> memory_;
};

// A thread's part of what pairs give to both sides' gradients: G cols and G^T rows, or (G + G^T)
// rows. `of_cols` is the upstream of the columns where they are anchors, or null.
template <typename Real>
class Differentiator {
 public:
  Differentiator(const Weights<Real>& weights, const Upstream<Real>& of_rows,
                 const Upstream<Real>* of_cols, SideGradient<Real>* grad_rows,
                 SideGradient<Real>* grad_cols, PairMemory<Real> memory)
      : weights_(weights),
        sides_(weights.sides()),
        of_rows_(of_rows),
        of_cols_(of_cols),
        grad_rows_(grad_rows),
        grad_cols_(grad_cols),
        memory_(memory) {}

  void compute(int64_t i, int64_t j) {
    typedef Upstream<Real> U;
    const Attraction attraction = attraction_of(sides_.problem);
    const bool all = sides_.problem.denominator == Denominator::kAll;
    row_begin_ = sides_.rows.tile_begin(i);
    col_begin_ = sides_.cols.tile_begin(j);
    t_ = sides_.pair(i, j);
    t_.square = of_cols_ != nullptr;
    if (sides_.own_in_tile(i, j, own_)) t_.own = own_;
    const bool pulls = of_rows_.pulls_in_tile[i], weighted = weights_.in_tile(i, j);
    if ((!all || pulls) && !weights_.given()) t_.classes = sides_.classes(i, j);
    if (weighted) weights_.set(i, j, memory_, &t_);
    t_.pairs = all ? Pairs::kAll : Pairs::kNegatives;
    t_.attraction =
        weighted || (pulls && t_.classes.row != nullptr) ? attraction : Attraction::kNone;
    t_.shifted = sides_.shifted || weighted || t_.attraction == Attraction::kNotQ ||
                 t_.attraction == Attraction::kQTimesNotQ;
    sides_.set_memory(i, j, memory_, &t_);
    t_.lse = lines(&U::lse);
    t_.weight = lines(t_.shifted ? &U::shifted_weight : &U::plain_weight);
    t_.normalizer = lines(&U::normalizer);
    t_.pull = lines(t_.shifted ? &U::shifted_pull : &U::plain_pull);
    sides_.functions.weigh(t_);
  }
  void begin_rows(int64_t i, int64_t copy) { grad_rows_->begin(i, copy); }
  void begin_cols(int64_t j, int64_t copy) { grad_cols_->begin(j, copy); }
  void add_to_rows(int64_t copy) {
    t_.grad_a = grad_rows_->get(copy) + row_begin_ * t_.stride;
    sides_.functions.add_to_rows(t_);
  }
  void add_to_cols(int64_t copy) {
    t_.grad_b = grad_cols_->get(copy) + col_begin_ * t_.stride;
    sides_.functions.add_to_cols(t_);
  }

 private:
  PerLine<Real> lines(std::vector<Real> Upstream<Real>::* of) const {
    return {(of_rows_.*of).data() + row_begin_,
            of_cols_ == nullptr ? nullptr : (of_cols_->*of).data() + col_begin_};
  }

  const Weights<Real>& weights_;
  const Sides<Real>& sides_;
  const Upstream<Real>& of_rows_;
  const Upstream<Real>* const of_cols_;
  SideGradient<Real>*const grad_rows_, *const grad_cols_;
  const PairMemory<Real> memory_;
  TilePair<Real> t_;
  int64_t row_begin_, col_begin_;
  int32_t own_[kMaxTile];
};

// Turns the gradient of a side's scaled embeddings, which is in `grad_unit`, into that of its
// input, and returns the sum of the products of both, which the temperature's gradient is made of.
template <typename Real>
double finish_side(const Side<Real>& side, const Sides<Real>& sides, const Real* grad,
                   double grad_unit, int64_t count, Real* out) {
  const Problem<Real>& problem = sides.problem;
  const Functions<Real>& functions = sides.functions;
  const double unit = std::sqrt(kLog2E / problem.temperature);
  const double factor = grad_unit / (problem.temperature * unit);
  std::vector<double> products(count, 0.0);
  const int64_t chunk = 64;
  parallel_for(sides.team, (count + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) {
      const int64_t k = side.position[i];
      Real* to = out == nullptr ? nullptr : out + i * problem.dim;
      if (k < 0 || (problem.normalize && side.norm[k] == 0)) {
        if (to != nullptr) std::fill(to, to + problem.dim, Real(0));
        continue;
      }
      const Real *row = side.row(k), *g = grad + k * side.stride;
      const double product = functions.dot(row, g, problem.dim);
      products[i] = product * factor / unit;
      if (to == nullptr) continue;
      // The part along the row is no gradient of a normalised row.
      const Real along = problem.normalize ? static_cast<Real>(product / (unit * unit)) : Real(0);
      functions.finish(g, along, row, static_cast<Real>(factor) / side.norm[k], side.scale[k],
                       problem.dim, to);
    }
  });
  return std::accumulate(products.begin(), products.end(), 0.0);
}

}  // namespace supcon
