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
#include "side.h"
#include "soft.h"

namespace supcon {
namespace {

// Both sides of a problem, and what their tiles have in common.
template <typename Real>
struct Sides {
  Sides(const Problem<Real>& problem, const Isa& isa, const Team& team)
      : problem(problem),
        functions(isa.functions(Real())),
        team(team),
        square(problem.square),
        rows(problem.rows, problem.row_labels, problem.num_rows, problem, functions, team),
        other(square ? nullptr
                     : new Side<Real>(problem.cols, problem.col_labels, problem.num_cols, problem,
                                      functions, team)),
        cols(square ? rows : *other),
        schedule(rows.num_tiles, cols.num_tiles, square),
        shifted(!sums_are_safe()),
        finite(rows.finite && cols.finite) {
    find_own();
    number_classes();
  }

  // The pair of tiles I and J, without what a pass writes.
  TilePair<Real> pair(int64_t i, int64_t j) const {
    TilePair<Real> t = {};
    t.num_rows = rows.tile_size(i);
    t.num_cols = cols.tile_size(j);
    t.dim = rows.dim;
    t.stride = rows.stride;
    t.a = rows.row(rows.tile_begin(i));
    t.b = cols.row(cols.tile_begin(j));
    t.b_packed = cols.packed_tile(j);
    t.triangle = square && i == j;
    t.square = square;
    t.shifted = shifted;
    return t;
  }

  // Numbers of the pair's rows and columns in arrays over each side.
  PerLine<Real> lines(const std::vector<Real>& of_rows, int64_t i, int64_t j) const {
    return {of_rows.data() + rows.tile_begin(i),
            square ? of_rows.data() + cols.tile_begin(j) : nullptr};
  }

  // Classes of the pair's rows and columns; null where they share none.
  PerLine<Real> classes(int64_t i, int64_t j) const {
    const Real* row = row_class.data() + rows.tile_begin(i);
    const Real* col = (square ? row_class : col_class).data() + cols.tile_begin(j);
    const bool apart = row[rows.tile_size(i) - 1] < col[0] || col[cols.tile_size(j) - 1] < row[0];
    return apart ? PerLine<Real>{nullptr, nullptr} : PerLine<Real>{row, col};
  }

  // Columns of tile J that rows of tile I are themselves, into `own`; whether there are any.
  bool own_in_tile(int64_t i, int64_t j, int32_t* own) const {
    if (own_col.empty()) return false;
    bool any = false;
    for (int k = 0; k < rows.tile_size(i); ++k) {
      const int64_t col = own_col[rows.tile_begin(i) + k] - cols.tile_begin(j);
      const bool here = col >= 0 && col < cols.tile_size(j);
      own[k] = here ? static_cast<int32_t>(col) : -1;
      any |= here;
    }
    return any;
  }

  // The segment of columns with the label of a segment of rows, empty where there is none.
  Segment cols_of(const Segment& of_rows) const {
    if (square) return of_rows;
    const auto before = [](const Segment& s, int64_t label) { return s.label < label; };
    const auto found =
        std::lower_bound(cols.segments.begin(), cols.segments.end(), of_rows.label, before);
    if (found == cols.segments.end() || found->label != of_rows.label) return {0, 0, 0};
    return *found;
  }

  // Column own_offset() + i is row i itself, in the order of the input; -1: no such column.
  int64_t own_offset() const { return square ? 0 : problem.self_offset; }

  // Sorted position of the column that sorted row k is itself; -1: none.
  int64_t own(int64_t k) const { return square ? k : own_col.empty() ? -1 : own_col[k]; }

  const Problem<Real>& problem;
  const TileFunctions<Real>& functions;
  const Team& team;
  const bool square;
  const Side<Real> rows;
  const std::unique_ptr<const Side<Real>> other;
  const Side<Real>& cols;
  const Schedule schedule;
  const bool shifted;  // sums of 2^x need a shift for each row and column
  const bool finite;
  // Of sorted rows and columns: ascending numbers, equal where labels are. Padded to whole panels.
  std::vector<Real> row_class, col_class;
  std::vector<int64_t> own_col;  // sorted row -> sorted column that it is itself, in rectangles

 private:
  // Exponents of unit rows reach from -log2(e) / tau to log2(e) / tau: half of the range of Real
  // for them leaves the other half for the weights that divide by their sums.
  bool sums_are_safe() const {
    const double reach = kLog2E / problem.temperature;
    return problem.normalize && 2 * reach < std::numeric_limits<Real>::max_exponent - 2.5;
  }

  void number_classes() {
    row_class.assign(rows.padded, -1);
    if (!square) col_class.assign(cols.padded, -1);
    auto col = cols.segments.begin();
    Real number = 0;
    for (const Segment& segment : rows.segments) {
      for (; !square && col != cols.segments.end() && col->label < segment.label; ++col, ++number)
        std::fill(&col_class[col->begin], &col_class[col->end - 1] + 1, number);
      std::fill(&row_class[segment.begin], &row_class[segment.end - 1] + 1, number);
      if (!square && col != cols.segments.end() && col->label == segment.label) {
        std::fill(&col_class[col->begin], &col_class[col->end - 1] + 1, number);
        ++col;
      }
      ++number;
    }
    for (; !square && col != cols.segments.end(); ++col, ++number)
      std::fill(&col_class[col->begin], &col_class[col->end - 1] + 1, number);
  }

  void find_own() {
    if (square || problem.self_offset < 0) return;
    own_col.resize(rows.size);
    for (int64_t k = 0; k < rows.size; ++k)
      own_col[k] = cols.position[problem.self_offset + rows.order[k]];
  }
};

// Scratch memory of a tile, one for each thread.
template <typename Real>
Real* tile_scratch() {
  alignas(64) thread_local Real scratch[kMaxTile * kScratchStride];
  return scratch;
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
  sides.schedule.run(sides.team, [&](int64_t i, int64_t j) {
    Real row_out[kMaxTile], col_out[kMaxTile + kMaxPanel];
    int32_t own[kMaxTile];
    TilePair<Real> t = sides.pair(i, j);
    if (pairs != Pairs::kAll) t.classes = sides.classes(i, j);
    if (pairs == Pairs::kPositives && t.classes.row == nullptr) return;
    if (sides.own_in_tile(i, j, own)) t.own = own;
    t.pairs = pairs;
    t.term = term;
    t.shifted = sides.shifted || (term != Term::kMaximum && term != Term::kExp);
    t.scratch = tile_scratch<Real>();
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

// shift + log2(sum), for every sorted row.
template <typename Real>
std::vector<Real> with_logarithm(std::vector<Real> shift, const std::vector<double>& sum) {
  for (size_t k = 0; k < shift.size(); ++k)
    shift[k] = static_cast<Real>(static_cast<double>(shift[k]) + std::log2(sum[k]));
  return shift;
}

// Base-2 log-sum-exp of every sorted row over such pairs; -infinity where there is none.
template <typename Real>
std::vector<Real> log_sum_exp(const Sides<Real>& sides, Pairs pairs) {
  std::vector<Real> shift =
      sides.shifted ? maxima(sides, pairs) : std::vector<Real>(sides.rows.padded, Real(0));
  const std::vector<double> sum = sums(sides, pairs, Term::kExp, {nullptr, &shift});
  return with_logarithm(std::move(shift), sum);
}

// The sum of the columns of a segment, in float64: in float32 one row of large norm destroys it.
template <typename Real>
void add_rows(const Side<Real>& side, const Segment& segment, const Real* weight, double* sum) {
  for (int64_t k = segment.begin; k < segment.end; ++k) {
    const Real* row = side.row(k);
    const double w = weight == nullptr ? 1.0 : static_cast<double>(weight[k]);
    for (int64_t d = 0; d < side.dim; ++d) sum[d] += w * static_cast<double>(row[d]);
  }
}

template <typename A, typename B>
double dot(const A* a, const B* b, int64_t size) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < size; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

// What the forward knows of every sorted row, base 2 where it is a logarithm.
template <typename Real>
struct Statistics {
  explicit Statistics(const Sides<Real>& sides)
      : num_positives(count_positives(sides)), softmax_weight(sides.rows.padded, Real(1)) {
    const Problem<Real>& problem = sides.problem;
    const bool all = problem.denominator == Denominator::kAll;
    lse = log_sum_exp(sides, all ? Pairs::kAll : Pairs::kNegatives);
    if (problem.denominator == Denominator::kOnePositive)
      one_positive(sides);
    else if (problem.summation == Summation::kIn)
      log_mean = log_sum_exp(sides, Pairs::kPositives);
  }

  std::vector<double> num_positives;
  std::vector<Real> lse;         // of the denominator, or of the negatives for kOnePositive
  std::vector<double> mean_log;  // kOut: the positives' mean exponent, or log2 of probability
  std::vector<Real> log_mean;    // kIn: log-sum-exp over positives, or log2 of the sum of q
  std::vector<Real> softmax_weight;

 private:
  static std::vector<double> count_positives(const Sides<Real>& sides) {
    std::vector<double> count(sides.rows.size);
    for (const Segment& segment : sides.rows.segments) {
      const Segment of_cols = sides.cols_of(segment);
      for (int64_t k = segment.begin; k < segment.end; ++k) {
        const int64_t own = sides.own(k);
        count[k] = of_cols.end - of_cols.begin - (own >= of_cols.begin && own < of_cols.end);
      }
    }
    return count;
  }

  void one_positive(const Sides<Real>& sides) {
    std::vector<double> pull;
    if (sides.problem.summation == Summation::kOut) {
      mean_log = sums(sides, Pairs::kPositives, Term::kLogQ, {&lse, nullptr});
      pull = sums(sides, Pairs::kPositives, Term::kNotQ, {&lse, nullptr});
      for (size_t k = 0; k < num_positives.size(); ++k) {
        mean_log[k] /= num_positives[k];
        pull[k] /= num_positives[k];
      }
    } else {
      // The largest q of a row is that of its largest exponent.
      std::vector<Real> shift = maxima(sides, Pairs::kPositives);
      for (size_t k = 0; k < shift.size(); ++k) {
        const double d = static_cast<double>(lse[k]) - static_cast<double>(shift[k]);
        shift[k] = static_cast<Real>(-std::max(d, 0.0) - std::log2(1 + std::exp2(-std::abs(d))));
      }
      const std::vector<double> sum = sums(sides, Pairs::kPositives, Term::kQ, {&lse, &shift});
      log_mean = with_logarithm(std::move(shift), sum);
      pull = sums(sides, Pairs::kPositives, Term::kQTimesNotQ, {&lse, &log_mean});
    }
    for (size_t k = 0; k < num_positives.size(); ++k)
      softmax_weight[k] = static_cast<Real>(pull[k]);
  }
};

// The mean exponent of the positives of one class's rows: a product with the sum of the class.
template <typename Real>
void mean_exponents(const Sides<Real>& sides, const Segment& segment,
                    const std::vector<double>& num_positives, double* mean) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Segment positives = sides.cols_of(segment);
  std::vector<double> sum(rows.dim, 0.0);
  add_rows(cols, positives, static_cast<const Real*>(nullptr), sum.data());
  for (int64_t k = segment.begin; k < segment.end; ++k) {
    double total = dot(rows.row(k), sum.data(), rows.dim);
    const int64_t own = sides.own(k);
    if (own >= positives.begin && own < positives.end)
      total -= dot(rows.row(k), cols.row(own), rows.dim);
    mean[k] = total / num_positives[k];
  }
}

// Likewise for soft labels, whose rows are in the order of the input; and the positives' weight.
template <typename Real>
void mean_soft_exponents(const Sides<Real>& sides, Statistics<Real>* statistics) {
  const Problem<Real>& problem = sides.problem;
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const int64_t n = rows.size, dim = problem.dim;
  const double* const of_cols = problem.square ? problem.row_soft : problem.col_soft;
  const bool leave_out = sides.own_offset() >= 0;
  // Feature by feature, and added up in that order: threads share features.
  std::vector<double> products(n * dim, 0.0), &weight = statistics->num_positives;
  std::fill(weight.begin(), weight.end(), 0.0);
  statistics->mean_log.assign(n, 0.0);
  const auto sum = [&](int64_t width, auto point, auto add) {
    sum_of_soft(sides.team, problem.row_soft, n, of_cols, cols.size, problem.num_soft, width,
                leave_out, sides.own_offset(), point, add);
  };
  sum(
      1, [](int64_t, int64_t) { return 1.0; },
      [&](int64_t i, int64_t, double x) { weight[i] += x; });
  sum(
      dim, [&](int64_t j, int64_t d) { return static_cast<double>(cols.row(j)[d]); },
      [&](int64_t i, int64_t d, double x) {
        products[d * n + i] += x * static_cast<double>(rows.row(i)[d]);
      });
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t i = 0; i < n; ++i) statistics->mean_log[i] += products[d * n + i];
  for (int64_t i = 0; i < n; ++i) statistics->mean_log[i] /= weight[i];
}

// Whether positives are dealt with by class, without a look at pairs.
template <typename Real>
bool positives_by_class(const Problem<Real>& problem) {
  return problem.summation == Summation::kOut && problem.denominator != Denominator::kOnePositive;
}

// Writes what the caller gets of sorted row k, if it contributes.
template <typename Real>
void write_results(const Sides<Real>& sides, const Statistics<Real>& of, int64_t k,
                   const RowResults<Real>& out) {
  const Problem<Real>& problem = sides.problem;
  const int64_t i = sides.rows.order[k];
  const bool some_below = problem.denominator != Denominator::kOnlyNegatives ||
                          of.lse[k] > -std::numeric_limits<Real>::infinity();
  out.contributes[i] = of.num_positives[k] > 0 && some_below;
  if (!out.contributes[i]) return;
  const bool mean_of_logs = problem.summation == Summation::kOut;
  const bool lse_is_below = problem.denominator != Denominator::kOnePositive;
  double loss = lse_is_below ? static_cast<double>(of.lse[k]) : 0.0;
  if (mean_of_logs)
    loss -= of.mean_log[k];
  else
    loss += std::log2(of.num_positives[k]) - static_cast<double>(of.log_mean[k]);
  out.loss[i] = static_cast<Real>(kLn2 * loss);
  out.lse[i] = of.lse[k];
  out.normalizer[i] = mean_of_logs ? static_cast<Real>(of.num_positives[k]) : of.log_mean[k];
  out.softmax_weight[i] = of.softmax_weight[k];
}

// Of each sorted row what the backward weighs pairs with, base 2 where it is a logarithm.
template <typename Real>
struct Upstream {
  Upstream(const Sides<Real>& sides, const Gradients<Real>& out)
      : lse(sides.rows.padded, std::numeric_limits<Real>::infinity()),
        shifted_weight(sides.rows.padded, 0),
        plain_weight(sides.rows.padded, 0),
        normalizer(sides.rows.padded, std::numeric_limits<Real>::infinity()),
        pull(sides.rows.padded, 0) {
    const bool mean_of_logs = sides.problem.summation == Summation::kOut;
    for (int64_t k = 0; k < sides.rows.size; ++k) {
      const int64_t i = sides.rows.order[k];
      if (!(out.normalizer[i] < std::numeric_limits<Real>::infinity())) continue;
      lse[k] = out.lse[i];
      normalizer[k] = out.normalizer[i];
      shifted_weight[k] = out.loss[i] * out.softmax_weight[i];
      if (shifted_weight[k] != 0) plain_weight[k] = shifted_weight[k] * std::exp2(-lse[k]);
      pull[k] = mean_of_logs ? out.loss[i] / out.normalizer[i] : out.loss[i];
    }
  }
  std::vector<Real> lse;             // infinite where the row does not contribute
  std::vector<Real> shifted_weight;  // of 2^(x - lse)
  std::vector<Real> plain_weight;    // of 2^x
  std::vector<Real> normalizer, pull;
};

template <typename Real>
Attraction attraction_of(const Problem<Real>& problem) {
  if (positives_by_class(problem)) return Attraction::kNone;
  if (problem.denominator != Denominator::kOnePositive) return Attraction::kExp;
  return problem.summation == Summation::kOut ? Attraction::kNotQ : Attraction::kQTimesNotQ;
}

// What pairs give to both sides' gradients: G cols and G^T rows, or (G + G^T) rows.
template <typename Real>
void pair_gradients(const Sides<Real>& sides, const Upstream<Real>& upstream, Real* grad_rows,
                    Real* grad_cols) {
  const Attraction attraction = attraction_of(sides.problem);
  const bool all = sides.problem.denominator == Denominator::kAll;
  sides.schedule.run(sides.team, [&](int64_t i, int64_t j) {
    int32_t own[kMaxTile];
    TilePair<Real> t = sides.pair(i, j);
    if (sides.own_in_tile(i, j, own)) t.own = own;
    if (!all || attraction != Attraction::kNone) t.classes = sides.classes(i, j);
    t.pairs = all ? Pairs::kAll : Pairs::kNegatives;
    t.attraction = t.classes.row == nullptr ? Attraction::kNone : attraction;
    t.shifted = sides.shifted || t.attraction != Attraction::kNone;
    t.scratch = tile_scratch<Real>();
    t.lse = sides.lines(upstream.lse, i, j);
    t.weight = sides.lines(t.shifted ? upstream.shifted_weight : upstream.plain_weight, i, j);
    t.normalizer = sides.lines(upstream.normalizer, i, j);
    t.pull = sides.lines(upstream.pull, i, j);
    t.grad_a = grad_rows + sides.rows.tile_begin(i) * t.stride;
    t.grad_b = grad_cols == nullptr ? nullptr : grad_cols + sides.cols.tile_begin(j) * t.stride;
    sides.functions.backward(t);
  });
}

// Subtracts the attraction of the positives of one class from both sides' gradients.
template <typename Real>
void attract_class(const Sides<Real>& sides, const Segment& segment, const std::vector<Real>& pull,
                   Real* grad_rows, Real* grad_cols) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Segment positives = sides.cols_of(segment);
  const int64_t dim = rows.dim;
  std::vector<double> sum(dim, 0.0), pulled(dim, 0.0);
  add_rows(cols, positives, static_cast<const Real*>(nullptr), sum.data());
  add_rows(rows, segment, pull.data(), pulled.data());
  // What a line is itself comes off before anything is rounded.
  const auto subtract = [=](Real* grad, double weight, const double* total, double own_weight,
                            const Real* own) {
    for (int64_t d = 0; d < dim; ++d) {
      const double others = total[d] - (own == nullptr ? 0.0 : own_weight * own[d]);
      grad[d] -= static_cast<Real>(weight * others);
    }
  };
  std::vector<const Real*> row_of_col(positives.end - positives.begin, nullptr);
  std::vector<double> pull_of_col(row_of_col.size(), 0.0);
  for (int64_t k = segment.begin; k < segment.end; ++k) {
    const int64_t own = sides.own(k);
    const bool among = own >= positives.begin && own < positives.end;
    if (among) {
      row_of_col[own - positives.begin] = rows.row(k);
      pull_of_col[own - positives.begin] = static_cast<double>(pull[k]);
    }
    subtract(grad_rows + k * rows.stride, static_cast<double>(pull[k]), sum.data(), 1.0,
             among ? cols.row(own) : nullptr);
  }
  if (grad_cols == nullptr) return;
  for (int64_t k = positives.begin; k < positives.end; ++k)
    subtract(grad_cols + k * cols.stride, 1.0, pulled.data(), pull_of_col[k - positives.begin],
             row_of_col[k - positives.begin]);
}

// The same for soft labels.
template <typename Real>
void attract_soft(const Sides<Real>& sides, const std::vector<Real>& pull, Real* grad_rows,
                  Real* grad_cols) {
  const Problem<Real>& problem = sides.problem;
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const double* const of_cols = problem.square ? problem.row_soft : problem.col_soft;
  const int64_t offset = sides.own_offset();
  sum_of_soft(
      sides.team, problem.row_soft, rows.size, of_cols, cols.size, problem.num_soft, problem.dim,
      offset >= 0, offset,
      [&](int64_t j, int64_t d) { return static_cast<double>(cols.row(j)[d]); },
      [&](int64_t i, int64_t d, double x) {
        grad_rows[i * rows.stride + d] -= static_cast<Real>(static_cast<double>(pull[i]) * x);
      });
  if (grad_cols == nullptr) return;
  sum_of_soft(
      sides.team, of_cols, cols.size, problem.row_soft, rows.size, problem.num_soft, problem.dim,
      offset >= 0, -offset,
      [&](int64_t i, int64_t d) {
        return static_cast<double>(pull[i]) * static_cast<double>(rows.row(i)[d]);
      },
      [&](int64_t j, int64_t d, double x) {
        grad_cols[j * cols.stride + d] -= static_cast<Real>(x);
      });
}

// Turns the gradient of a side's scaled embeddings into that of its input, and returns the sum of
// the products of both, which the temperature's gradient is made of.
template <typename Real>
double finish_side(const Side<Real>& side, const Problem<Real>& problem, const Team& team,
                   const Real* grad, int64_t count, Real* out) {
  const double unit = std::sqrt(kLog2E / problem.temperature);
  const double factor = 1 / (problem.temperature * unit);
  std::vector<double> products(count, 0.0);
  const int64_t chunk = 64;
  parallel_for(team, (count + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t i = c * chunk; i < std::min(count, (c + 1) * chunk); ++i) {
      const int64_t k = side.position[i];
      Real* to = out == nullptr ? nullptr : out + i * problem.dim;
      if (k < 0 || (problem.normalize && side.norm[k] == 0)) {
        if (to != nullptr) std::fill(to, to + problem.dim, Real(0));
        continue;
      }
      const Real *row = side.row(k), *g = grad + k * side.stride;
      const double product = dot(row, g, problem.dim);
      products[i] = product * factor / unit;
      if (to == nullptr) continue;
      // The part along the row is no gradient of a normalised row.
      const Real along = problem.normalize ? static_cast<Real>(product / (unit * unit)) : Real(0);
      const Real scale = static_cast<Real>(factor) / side.norm[k] / side.scale[k];
      for (int64_t d = 0; d < problem.dim; ++d) to[d] = (g[d] - along * row[d]) * scale;
    }
  });
  return std::accumulate(products.begin(), products.end(), 0.0);
}

}  // namespace

template <typename Real>
void forward(const Problem<Real>& problem, const Isa& isa, const Team& team,
             const RowResults<Real>& out) {
  const int64_t n = problem.num_rows;
  const Real infinity = std::numeric_limits<Real>::infinity();
  std::fill(out.loss, out.loss + n, Real(0));
  std::fill(out.contributes, out.contributes + n, false);
  std::fill(out.lse, out.lse + n, infinity);
  std::fill(out.normalizer, out.normalizer + n, infinity);
  std::fill(out.softmax_weight, out.softmax_weight + n, Real(1));
  const Sides<Real> sides(problem, isa, team);
  if (!sides.finite) {
    for (int64_t i : sides.rows.order) out.loss[i] = std::numeric_limits<Real>::quiet_NaN();
    return;
  }
  Statistics<Real> statistics(sides);
  if (problem.row_soft != nullptr) {
    mean_soft_exponents(sides, &statistics);
  } else if (positives_by_class(problem)) {
    const std::vector<Segment>& segments = sides.rows.segments;
    statistics.mean_log.resize(sides.rows.size);
    parallel_for(team, segments.size(), [&](int64_t c) {
      mean_exponents(sides, segments[c], statistics.num_positives, statistics.mean_log.data());
    });
  }
  for (int64_t k = 0; k < sides.rows.size; ++k) write_results(sides, statistics, k, out);
}

template <typename Real>
void backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
              const Gradients<Real>& out) {
  const Sides<Real> sides(problem, isa, team);
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Upstream<Real> upstream(sides, out);
  const bool wants_cols = !sides.square && out.cols != nullptr;
  const Real start = sides.finite ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
  Array<Real> grad_rows(rows.padded * rows.stride);
  Array<Real> col_memory(wants_cols ? cols.padded * cols.stride : 0);
  fill(team, grad_rows.get(), rows.padded * rows.stride, start);
  if (wants_cols) fill(team, col_memory.get(), cols.padded * cols.stride, start);
  Real* grad_cols = sides.square ? grad_rows.get() : wants_cols ? col_memory.get() : nullptr;

  if (sides.finite) {
    pair_gradients(sides, upstream, grad_rows.get(), grad_cols);
    if (problem.row_soft != nullptr)
      attract_soft(sides, upstream.pull, grad_rows.get(), grad_cols);
    else if (positives_by_class(problem))
      parallel_for(team, rows.segments.size(), [&](int64_t c) {
        attract_class(sides, rows.segments[c], upstream.pull, grad_rows.get(), grad_cols);
      });
  }
  const double product =
      finish_side(rows, problem, team, grad_rows.get(), problem.num_rows, out.rows);
  if (out.temperature != nullptr)
    *out.temperature = -product / problem.temperature / (sides.square ? 2 : 1);
  if (wants_cols) finish_side(cols, problem, team, grad_cols, problem.num_cols, out.cols);
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

#define SUPCON_INSTANTIATE(Real)                                                                 \
  template double peak_flops<Real>(const Isa&, const Team&);                                     \
  template void forward(const Problem<Real>&, const Isa&, const Team&, const RowResults<Real>&); \
  template void backward(const Problem<Real>&, const Isa&, const Team&, const Gradients<Real>&);
SUPCON_INSTANTIATE(float)
SUPCON_INSTANTIATE(double)
#undef SUPCON_INSTANTIATE

}  // namespace supcon
