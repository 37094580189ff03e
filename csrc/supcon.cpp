// The core: what the tiles of both sides give to the loss and to the gradients, and the positives
// that are added by sums over each class. docs/kernels.md describes it.

#include "supcon.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "parallel.h"
#include "positives.h"
#include "side.h"

namespace supcon {
namespace {

// Calls body(row tile, column tile, scratch tile) for every pair of tiles, on all threads.
template <typename Real, typename Body>
void for_each_pair(const Sides<Real>& sides, Body body) {
  sides.schedule.template run<Real>(sides.team, kMaxTile * kScratchStride, body);
}

// What a forward pass is made with besides the pairs: numbers for each sorted row.
template <typename Real>
struct Inputs {
  const std::vector<Real>* lse = nullptr;
  const std::vector<Real>* shifts = nullptr;
};

// Folds the term of every pair into its row, and calls fold(sorted row, of one tile's columns).
template <typename Real, typename Fold>
void reduce_pairs(const Sides<Real>& sides, Pairs pairs, Term term, const Inputs<Real>& inputs,
                  Fold fold) {
  for_each_pair(sides, [&](int64_t i, int64_t j, Real* scratch) {
    Real row_out[kMaxTile], col_out[kMaxTile + kMaxPanel];
    int32_t own[kMaxTile];
    TilePair<Real> t = sides.pair(i, j);
    if (pairs != Pairs::kAll) t.classes = sides.classes(i, j);
    if (pairs == Pairs::kPositives && t.classes.row == nullptr) return;
    if (sides.own_in_tile(i, j, own)) t.own = own;
    t.pairs = pairs;
    t.term = term;
    t.shifted = sides.shifted || (term != Term::kMaximum && term != Term::kExp);
    t.scratch = scratch;
    if (inputs.lse != nullptr) t.lse = sides.lines(*inputs.lse, i, j);
    if (inputs.shifts != nullptr) t.shifts = sides.lines(*inputs.shifts, i, j);
    t.row_out = row_out;
    t.col_out = col_out;
    sides.functions.forward(t);
    for (int k = 0; k < t.num_rows; ++k) fold(sides.rows.tile_begin(i) + k, row_out[k]);
    if (!sides.square) return;
    for (int k = 0; k < t.num_cols; ++k) fold(sides.cols.tile_begin(j) + k, col_out[k]);
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
std::vector<double> logarithms(std::vector<double> sum, const std::vector<Real>& shift) {
  for (size_t k = 0; k < sum.size(); ++k)
    sum[k] = static_cast<double>(shift[k]) + std::log2(sum[k]);
  return sum;
}

// Base-2 log-sum-exp of every sorted row over such pairs; -infinity where there is none.
template <typename Real>
std::vector<double> log_sum_exp(const Sides<Real>& sides, Pairs pairs) {
  const std::vector<Real> shift =
      sides.shifted ? maxima(sides, pairs) : std::vector<Real>(sides.rows.padded, Real(0));
  return logarithms(sums(sides, pairs, Term::kExp, {nullptr, &shift}), shift);
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
    log_mean = logarithms(sum, shift);
    for (size_t k = 0; k < num_positives.size(); ++k) softmax_weight[k] /= sum[k];
  }
};

// Whether positives are dealt with by class, without a look at pairs.
template <typename Real>
bool positives_by_class(const Problem<Real>& problem) {
  return problem.summation == Summation::kOut && problem.denominator != Denominator::kOnePositive;
}

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
  Upstream(const Sides<Real>& sides, const Side<Real>& side, const Real* grad_loss,
           const RowStatistics& statistics, double unit)
      : lse(side.padded, std::numeric_limits<Real>::infinity()),
        shifted_weight(side.padded, 0),
        plain_weight(side.padded, 0),
        normalizer(side.padded, std::numeric_limits<Real>::infinity()),
        shifted_pull(side.padded, 0),
        plain_pull(side.padded, 0),
        pull_by_class(side.padded, 0.0),
        pulls_in_tile(side.num_tiles, sides.problem.summation == Summation::kIn) {
    for (int64_t k = 0; k < side.size; ++k) {
      const int64_t i = side.order[k];
      const double exact = statistics.lse[i], normalizes = statistics.normalizer[i];
      if (!(normalizes < std::numeric_limits<double>::infinity())) continue;
      const double grad = static_cast<double>(grad_loss[i]) / unit;
      const double weight = grad * statistics.softmax_weight[i];
      lse[k] = static_cast<Real>(exact);
      if (weight != 0) {
        shifted_weight[k] = static_cast<Real>(weight * std::exp2(rounding(lse[k], exact)));
        plain_weight[k] = static_cast<Real>(weight * std::exp2(-exact));
      }
      if (sides.problem.summation == Summation::kOut) {
        pull_by_class[k] = grad / normalizes;
      } else {
        normalizer[k] = static_cast<Real>(normalizes);
        shifted_pull[k] = static_cast<Real>(grad * std::exp2(rounding(normalizer[k], normalizes)));
        plain_pull[k] = static_cast<Real>(grad * std::exp2(-normalizes));
      }
    }
    if (sides.problem.summation == Summation::kOut && sides.problem.row_soft == nullptr)
      pull_in_tiles(sides, side);
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
  // Takes the pull of positives that are looked at one by one from the classes to the tiles.
  void pull_in_tiles(const Sides<Real>& sides, const Side<Real>& side) {
    const bool all = !positives_by_class(sides.problem), of_cols = &side != &sides.rows;
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
};

template <typename Real>
Attraction attraction_of(const Problem<Real>& problem) {
  if (problem.row_soft != nullptr) return Attraction::kNone;
  if (positives_by_class(problem)) return Attraction::kOne;
  if (problem.denominator != Denominator::kOnePositive) return Attraction::kExp;
  return problem.summation == Summation::kOut ? Attraction::kNotQ : Attraction::kQTimesNotQ;
}

// What pairs give to both sides' gradients: G cols and G^T rows, or (G + G^T) rows. `of_cols` is
// the upstream of the columns where they are anchors, or null.
template <typename Real>
void pair_gradients(const Sides<Real>& sides, const Upstream<Real>& upstream,
                    const Upstream<Real>* of_cols, Real* grad_rows, Real* grad_cols) {
  const Attraction attraction = attraction_of(sides.problem);
  const bool all = sides.problem.denominator == Denominator::kAll;
  for_each_pair(sides, [&](int64_t i, int64_t j, Real* scratch) {
    int32_t own[kMaxTile];
    const auto lines = [&](std::vector<Real> Upstream<Real>::* of) {
      const int64_t row = sides.rows.tile_begin(i), col = sides.cols.tile_begin(j);
      return PerLine<Real>{(upstream.*of).data() + row,
                           of_cols == nullptr ? nullptr : (of_cols->*of).data() + col};
    };
    TilePair<Real> t = sides.pair(i, j);
    t.square = of_cols != nullptr;
    if (sides.own_in_tile(i, j, own)) t.own = own;
    const bool pulls = attraction != Attraction::kNone && upstream.pulls_in_tile[i];
    if (!all || pulls) t.classes = sides.classes(i, j);
    t.pairs = all ? Pairs::kAll : Pairs::kNegatives;
    t.attraction = pulls && t.classes.row != nullptr ? attraction : Attraction::kNone;
    t.shifted = sides.shifted || t.attraction == Attraction::kNotQ ||
                t.attraction == Attraction::kQTimesNotQ;
    t.scratch = scratch;
    typedef Upstream<Real> U;
    t.lse = lines(&U::lse);
    t.weight = lines(t.shifted ? &U::shifted_weight : &U::plain_weight);
    t.normalizer = lines(&U::normalizer);
    t.pull = lines(t.shifted ? &U::shifted_pull : &U::plain_pull);
    t.grad_a = grad_rows + sides.rows.tile_begin(i) * t.stride;
    t.grad_b = grad_cols == nullptr ? nullptr : grad_cols + sides.cols.tile_begin(j) * t.stride;
    sides.functions.backward(t);
  });
}

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

}  // namespace

template <typename Real>
void forward(const Problem<Real>& problem, const Isa& isa, const Team& team,
             const Results<Real>& out) {
  const int64_t n = problem.num_rows;
  const double infinity = std::numeric_limits<double>::infinity();
  std::fill(out.loss, out.loss + n, Real(0));
  const RowStatistics& s = out.statistics;
  for (double* of_row : {s.lse, s.normalizer, s.softmax_weight})
    std::fill(of_row, of_row + n, infinity);
  const Sides<Real> sides(problem, isa, team);
  *out.total = 0;
  out.counts[0] = static_cast<Real>(std::max<int64_t>(sides.rows.size, 1));
  out.counts[1] = 1;
  if (!sides.finite) {
    for (int64_t i : sides.rows.order)
      *out.total = out.loss[i] = std::numeric_limits<Real>::quiet_NaN();
    return;
  }
  Statistics<Real> statistics(sides);
  if (problem.row_soft != nullptr) {
    mean_soft_exponents(sides, &statistics.num_positives, &statistics.mean_log);
  } else if (positives_by_class(problem)) {
    const std::vector<Segment>& segments = sides.rows.segments;
    statistics.mean_log.resize(sides.rows.size);
    parallel_for(team, segments.size(), [&](int64_t c) {
      mean_exponents(sides, segments[c], statistics.num_positives, statistics.mean_log.data());
    });
  }
  double total = 0;
  int64_t count = 0;
  for (int64_t k = 0; k < sides.rows.size; ++k) {
    if (!contributes(problem, statistics, k)) continue;
    total += write_results(sides, statistics, k, out);
    ++count;
  }
  *out.total = static_cast<Real>(total);
  out.counts[1] = static_cast<Real>(std::max<int64_t>(count, 1));
}

template <typename Real>
void backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
              const Gradients<Real>& out) {
  const Sides<Real> sides(problem, isa, team);
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const double unit = unit_of(sides, out);
  const Upstream<Real> upstream(sides, rows, out.loss, out.statistics, unit);
  std::unique_ptr<const Upstream<Real>> apart;
  if (out.col_loss != nullptr)
    apart.reset(new Upstream<Real>(sides, cols, out.col_loss, out.col_statistics, unit));
  const Upstream<Real>* const of_cols = sides.square ? &upstream : apart.get();
  const bool wants_cols = !sides.square && out.cols != nullptr;
  const Real start = sides.finite ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
  Array<Real> grad_rows(rows.padded * rows.stride);
  Array<Real> col_memory(wants_cols ? cols.padded * cols.stride : 0);
  fill(team, grad_rows.get(), rows.padded * rows.stride, start);
  if (wants_cols) fill(team, col_memory.get(), cols.padded * cols.stride, start);
  Real* grad_cols = sides.square ? grad_rows.get() : wants_cols ? col_memory.get() : nullptr;

  if (sides.finite) {
    pair_gradients(sides, upstream, of_cols, grad_rows.get(), grad_cols);
    if (problem.row_soft != nullptr) {
      attract_soft(sides, upstream.pull_by_class, grad_rows.get(), grad_cols);
      if (apart) attract_soft_to_cols(sides, apart->pull_by_class, grad_rows.get());
    } else if (positives_by_class(problem)) {
      parallel_for(team, rows.segments.size(), [&](int64_t c) {
        const Segment& segment = rows.segments[c];
        if (sides.few_positives(segment)) return;
        attract_class(sides, segment, upstream.pull_by_class, grad_rows.get(), grad_cols);
        if (apart) attract_class_to_cols(sides, segment, apart->pull_by_class, grad_rows.get());
      });
    }
  }
  const double product =
      finish_side(rows, sides, grad_rows.get(), unit, problem.num_rows, out.rows);
  // Where both sides are anchors, every pair is in the gradient of both its rows.
  if (out.temperature != nullptr)
    *out.temperature = -product / problem.temperature / (of_cols != nullptr ? 2 : 1);
  if (wants_cols) finish_side(cols, sides, grad_cols, unit, problem.num_cols, out.cols);
}

template <typename Real>
double peak_flops(const Isa& isa, const Team& team) {
  typedef std::chrono::steady_clock Clock;
  constexpr int64_t kIterations = 1 << 22;
  double best = 0;
  for (int repetition = 0; repetition < 5; ++repetition) {
    std::atomic<int64_t> total{0};
    const Clock::time_point start = Clock::now();
    on_all(team, [&] {
      Real values[] = {Real(1), Real(0.999), Real(1e-3), Real(0)};
      auto* const multiply = isa.functions(Real()).multiply_in_registers;
      total += static_cast<int64_t>(multiply(kIterations, values));
    });
    const std::chrono::duration<double> elapsed = Clock::now() - start;
    best = std::max(best, static_cast<double>(total) / elapsed.count());
  }
  return best;
}

#define SUPCON_INSTANTIATE(Real)                                                              \
  template double peak_flops<Real>(const Isa&, const Team&);                                  \
  template void forward(const Problem<Real>&, const Isa&, const Team&, const Results<Real>&); \
  template void backward(const Problem<Real>&, const Isa&, const Team&, const Gradients<Real>&);
SUPCON_INSTANTIATE(float)
SUPCON_INSTANTIATE(double)
#undef SUPCON_INSTANTIATE

}  // namespace supcon
