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

// What a forward pass is made with besides the pairs: numbers for each sorted row.
template <typename Real>
struct Inputs {
  const std::vector<Real>* lse = nullptr;
  const std::vector<Real>* shifts = nullptr;
};

constexpr size_t kScratch = kMaxTile * kScratchStride;
constexpr int64_t kRange = 512;  // rows that a thread takes at a time where a row is little work

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
        pulls_in_tile(side.num_tiles, sides.problem.summation == Summation::kIn),
        summation_(sides.problem.summation) {
    parallel_ranges(sides.team, side.size, kRange, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = side.order[k];
        weigh(k, static_cast<double>(grad_loss[i]) / unit, statistics.lse[i],
              statistics.normalizer[i], statistics.softmax_weight[i]);
      }
    });
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
  void weigh(int64_t k, double grad, double exact, double normalizes, double softmax_weight) {
    if (!(normalizes < std::numeric_limits<double>::infinity())) return;
    const double weight = grad * softmax_weight;
    lse[k] = static_cast<Real>(exact);
    if (weight != 0) {
      shifted_weight[k] = static_cast<Real>(weight * std::exp2(rounding(lse[k], exact)));
      plain_weight[k] = static_cast<Real>(weight * std::exp2(-exact));
    }
    if (summation_ == Summation::kOut) {
      pull_by_class[k] = grad / normalizes;
    } else {
      normalizer[k] = static_cast<Real>(normalizes);
      shifted_pull[k] = static_cast<Real>(grad * std::exp2(rounding(normalizer[k], normalizes)));
      plain_pull[k] = static_cast<Real>(grad * std::exp2(-normalizes));
    }
  }

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

  const Summation summation_;
};

template <typename Real>
Attraction attraction_of(const Problem<Real>& problem) {
  if (problem.row_soft != nullptr) return Attraction::kNone;
  if (positives_by_class(problem)) return Attraction::kOne;
  if (problem.denominator != Denominator::kOnePositive) return Attraction::kExp;
  return problem.summation == Summation::kOut ? Attraction::kNotQ : Attraction::kQTimesNotQ;
}

// A thread's part of what pairs give to both sides' gradients: G cols and G^T rows, or (G + G^T)
// rows. `of_cols` is the upstream of the columns where they are anchors, or null.
template <typename Real>
class Differentiator {
 public:
  Differentiator(const Sides<Real>& sides, const Upstream<Real>& of_rows,
                 const Upstream<Real>* of_cols, Real* grad_rows, Real* grad_cols, Real* scratch)
      : sides_(sides),
        of_rows_(of_rows),
        of_cols_(of_cols),
        grad_rows_(grad_rows),
        grad_cols_(grad_cols),
        scratch_(scratch) {}

  void compute(int64_t i, int64_t j) {
    typedef Upstream<Real> U;
    const Attraction attraction = attraction_of(sides_.problem);
    const bool all = sides_.problem.denominator == Denominator::kAll;
    row_begin_ = sides_.rows.tile_begin(i);
    col_begin_ = sides_.cols.tile_begin(j);
    t_ = sides_.pair(i, j);
    t_.square = of_cols_ != nullptr;
    if (sides_.own_in_tile(i, j, own_)) t_.own = own_;
    const bool pulls = attraction != Attraction::kNone && of_rows_.pulls_in_tile[i];
    if (!all || pulls) t_.classes = sides_.classes(i, j);
    t_.pairs = all ? Pairs::kAll : Pairs::kNegatives;
    t_.attraction = pulls && t_.classes.row != nullptr ? attraction : Attraction::kNone;
    t_.shifted = sides_.shifted || t_.attraction == Attraction::kNotQ ||
                 t_.attraction == Attraction::kQTimesNotQ;
    t_.scratch = scratch_;
    t_.lse = lines(&U::lse);
    t_.weight = lines(t_.shifted ? &U::shifted_weight : &U::plain_weight);
    t_.normalizer = lines(&U::normalizer);
    t_.pull = lines(t_.shifted ? &U::shifted_pull : &U::plain_pull);
    sides_.functions.weigh(t_);
  }
  void add_to_rows(int64_t copy) {
    t_.grad_a = grad_rows_ + (copy * sides_.rows.padded + row_begin_) * t_.stride;
    sides_.functions.add_to_rows(t_);
  }
  void add_to_cols(int64_t copy) {
    t_.grad_b = grad_cols_ + (copy * sides_.cols.padded + col_begin_) * t_.stride;
    sides_.functions.add_to_cols(t_);
  }

 private:
  PerLine<Real> lines(std::vector<Real> Upstream<Real>::* of) const {
    return {(of_rows_.*of).data() + row_begin_,
            of_cols_ == nullptr ? nullptr : (of_cols_->*of).data() + col_begin_};
  }

  const Sides<Real>& sides_;
  const Upstream<Real>& of_rows_;
  const Upstream<Real>* const of_cols_;
  Real *const grad_rows_, *const grad_cols_, *const scratch_;
  TilePair<Real> t_;
  int64_t row_begin_, col_begin_;
  int32_t own_[kMaxTile];
};

// The gradient of one side's scaled embeddings, in as many copies as the schedule adds to.
template <typename Real>
class SideGradient {
 public:
  SideGradient(const Side<Real>& side, int64_t num_copies, const Team& team, Real start)
      : size_(side.padded * side.stride), num_copies_(num_copies), memory_(size_ * num_copies) {
    fill(team, memory_.get(), size_ * num_copies, start);
  }

  Real* get() { return memory_.get(); }
  // Adds all copies to the first.
  void add_up(const Team& team) {
    if (num_copies_ == 1) return;
    parallel_ranges(team, size_, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t c = 1; c < num_copies_; ++c)
        for (int64_t k = begin; k < end; ++k) get()[k] += get()[c * size_ + k];
    });
  }

 private:
  const int64_t size_, num_copies_;
  Array<Real> memory_;
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

template <typename Real>
void forward(const Sides<Real>& sides, const Results<Real>& out) {
  const Problem<Real>& problem = sides.problem;
  const Team& team = sides.team;
  const int64_t n = problem.num_rows;
  const double infinity = std::numeric_limits<double>::infinity();
  std::fill(out.loss, out.loss + n, Real(0));
  const RowStatistics& s = out.statistics;
  for (double* of_row : {s.lse, s.normalizer, s.softmax_weight})
    std::fill(of_row, of_row + n, infinity);
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
    statistics.mean_log = mean_exponents(sides, statistics.num_positives);
  }
  struct Part {
    double total;
    int64_t count;
  };
  std::vector<Part> parts((sides.rows.size + kRange - 1) / kRange);
  parallel_ranges(team, sides.rows.size, kRange, [&](int64_t begin, int64_t end) {
    Part part = {0, 0};
    for (int64_t k = begin; k < end; ++k) {
      if (!contributes(problem, statistics, k)) continue;
      part.total += write_results(sides, statistics, k, out);
      ++part.count;
    }
    parts[begin / kRange] = part;
  });
  Part all = {0, 0};
  for (const Part& part : parts) all = {all.total + part.total, all.count + part.count};
  *out.total = static_cast<Real>(all.total);
  out.counts[1] = static_cast<Real>(std::max<int64_t>(all.count, 1));
}

template <typename Real>
void backward(const Sides<Real>& sides, const Gradients<Real>& out) {
  const Problem<Real>& problem = sides.problem;
  const Team& team = sides.team;
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const double unit = unit_of(sides, out);
  const Upstream<Real> upstream(sides, rows, out.loss, out.statistics, unit);
  std::unique_ptr<const Upstream<Real>> apart;
  if (out.col_loss != nullptr)
    apart.reset(new Upstream<Real>(sides, cols, out.col_loss, out.col_statistics, unit));
  const Upstream<Real>* const of_cols = sides.square ? &upstream : apart.get();
  const bool wants_cols = !sides.square && out.cols != nullptr;
  const Real start = sides.finite ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
  SideGradient<Real> of_row_side(rows, sides.schedule.copies_of_rows(), team, start);
  const int64_t col_copies = wants_cols ? sides.schedule.copies_of_cols() : 0;
  SideGradient<Real> of_col_side(cols, col_copies, team, start);
  Real* const grad_rows = of_row_side.get();
  Real* const grad_cols = sides.square ? grad_rows : wants_cols ? of_col_side.get() : nullptr;

  if (sides.finite) {
    PerThread<Real> scratch(team, kScratch);
    sides.schedule.run(team, true, grad_cols != nullptr, [&] {
      return Differentiator<Real>(sides, upstream, of_cols, grad_rows, grad_cols, scratch.claim());
    });
    of_row_side.add_up(team);
    if (wants_cols) of_col_side.add_up(team);
    if (problem.row_soft != nullptr) {
      attract_soft(sides, upstream.pull_by_class, grad_rows, grad_cols);
      if (apart) attract_soft_to_cols(sides, apart->pull_by_class, grad_rows);
    } else if (positives_by_class(problem)) {
      attract_classes(sides, upstream.pull_by_class, apart ? &apart->pull_by_class : nullptr,
                      grad_rows, grad_cols);
    }
  }
  const double product = finish_side(rows, sides, grad_rows, unit, problem.num_rows, out.rows);
  // Where both sides are anchors, every pair is in the gradient of both its rows.
  if (out.temperature != nullptr)
    *out.temperature = -product / problem.temperature / (of_cols != nullptr ? 2 : 1);
  if (wants_cols) finish_side(cols, sides, grad_cols, unit, problem.num_cols, out.cols);
}

}  // namespace

template <typename Real>
void forward(const Problem<Real>& problem, const Isa& isa, const Team& team,
             const Results<Real>& out) {
  forward(Sides<Real>(problem, isa, team), out);
}

template <typename Real>
void backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
              const Gradients<Real>& out) {
  backward(Sides<Real>(problem, isa, team), out);
}

template <typename Real>
void forward_and_backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
                          const Results<Real>& results, const Real* count,
                          Gradients<Real> gradients) {
  const Sides<Real> sides(problem, isa, team);
  forward(sides, results);
  const std::vector<Real> weight(problem.num_rows, count == nullptr ? Real(1) : 1 / *count);
  gradients.loss = weight.data();
  gradients.statistics = results.statistics;
  backward(sides, gradients);
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

std::vector<std::vector<ScheduledPair>> scheduled_jobs(int64_t num_rows, int64_t num_cols,
                                                       bool square, bool to_cols, int threads) {
  const auto tiles = [](int64_t n) { return (n + tile_rows(n) - 1) / tile_rows(n); };
  const Schedule schedule(tiles(num_rows), tiles(num_cols), square);
  std::vector<std::vector<ScheduledPair>> jobs(schedule.num_jobs(threads));
  for (size_t k = 0; k < jobs.size(); ++k)
    schedule.job(k, threads, schedule.copies(), [&](const Schedule::Pair& pair) {
      jobs[k].push_back({pair.to_row.counter, pair.to_row.turn, to_cols ? pair.to_col.counter : -1,
                         pair.to_col.turn, pair.is_whole()});
    });
  return jobs;
}

#define SUPCON_INSTANTIATE(Real)                                                                 \
  template double peak_flops<Real>(const Isa&, const Team&);                                     \
  template void forward(const Problem<Real>&, const Isa&, const Team&, const Results<Real>&);    \
  template void backward(const Problem<Real>&, const Isa&, const Team&, const Gradients<Real>&); \
  template void forward_and_backward(const Problem<Real>&, const Isa&, const Team&,              \
                                     const Results<Real>&, const Real*, Gradients<Real>);
SUPCON_INSTANTIATE(float)
SUPCON_INSTANTIATE(double)
#undef SUPCON_INSTANTIATE

}  // namespace supcon
