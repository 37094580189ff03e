// Positives that no pass over pairs needs to look at: where they are many, their attraction by sums
// over each class, or over soft labels. All sums are made in float64: in float32 one row of large
// norm, or one label that is nearly one-hot, destroys them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "side.h"
#include "supcon.h"

namespace supcon {

// Whether positives are dealt with by class, without a look at pairs.
template <typename Real>
bool positives_by_class(const Problem<Real>& problem) {
  return problem.summation == Summation::kOut && problem.denominator != Denominator::kOnePositive;
}

// Whether the backward takes the pull of every positive off H, pair by pair.
template <typename Real>
bool all_pull_in_tiles(const Sides<Real>& sides) {
  return !positives_by_class(sides.problem) || sides.multiplies_bfloat16();
}

// Of every sorted row, the number of its positives.
template <typename Real>
std::vector<double> count_positives(const Sides<Real>& sides) {
  std::vector<double> count(sides.rows.size);
  for (const Segment& segment : sides.rows.segments) {
    const Segment of_cols = sides.cols_of(segment);
    for (int64_t k = segment.begin; k < segment.end; ++k)
      count[k] = of_cols.size() - of_cols.contains(sides.own(k));
  }
  return count;
}

// A part of the rows or columns of a class, small enough for threads to share a large class.
struct Part {
  int64_t segment;  // index
  int64_t begin, end;
};

inline std::vector<Part> parts_of(const std::vector<Segment>& segments) {
  constexpr int64_t kLength = 128;
  std::vector<Part> parts;
  for (size_t c = 0; c < segments.size(); ++c)
    for (int64_t k = segments[c].begin; k < segments[c].end; k += kLength)
      parts.push_back({static_cast<int64_t>(c), k, std::min(k + kLength, segments[c].end)});
  return parts;
}

// How a line is pulled: weight (sum - own_weight own); own may be null.
template <typename Real>
struct Pull {
  double weight, own_weight;
  const Real* own;
};

// Classes of many positives: segments of rows, and of the columns with the same label.
template <typename Real>
struct ManyPositives {
  explicit ManyPositives(const Sides<Real>& sides) {
    for (const Segment& segment : sides.rows.segments) {
      if (sides.few_positives(segment)) continue;
      rows.push_back(segment);
      cols.push_back(sides.cols_of(segment));
    }
  }

  std::vector<Segment> rows, cols;
};

// (segment, dim) sums of a side's rows, each times its weight where there are weights: of every
// part first, then of the parts in their order.
template <typename Real>
class ClassSums {
 public:
  ClassSums(const Sides<Real>& sides, const Side<Real>& side, const std::vector<Segment>& segments,
            const double* weights)
      : dim_(side.dim), sums_(segments.size() * dim_) {
    const std::vector<Part> parts = parts_of(segments);
    Array<double> of_parts(parts.size() * dim_);
    parallel_for(sides.team, parts.size(), [&](int64_t p) {
      double* const sum = of_parts.get() + p * dim_;
      std::fill(sum, sum + dim_, 0.0);
      for (int64_t k = parts[p].begin; k < parts[p].end; ++k)
        sides.functions.add(weights == nullptr ? 1.0 : weights[k], side.row(k), dim_, sum);
    });
    std::fill(sums_.get(), sums_.get() + segments.size() * dim_, 0.0);
    for (size_t p = 0; p < parts.size(); ++p)
      for (int64_t d = 0; d < dim_; ++d)
        sums_.get()[parts[p].segment * dim_ + d] += of_parts.get()[p * dim_ + d];
  }

  const double* of(int64_t segment) const { return sums_.get() + segment * dim_; }

 private:
  const int64_t dim_;
  Array<double> sums_;
};

// The mean exponent of the positives of each row: where they are few, of products as tiles have
// them; else a product with the sum of the class.
template <typename Real>
std::vector<double> mean_exponents(const Sides<Real>& sides,
                                   const std::vector<double>& num_positives) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Functions<Real>& functions = sides.functions;
  std::vector<double> mean(rows.size);
  parallel_for(sides.team, rows.segments.size(), [&](int64_t c) {
    const Segment& segment = rows.segments[c];
    if (!sides.few_positives(segment)) return;
    const Segment positives = sides.cols_of(segment);
    for (int64_t k = segment.begin; k < segment.end; ++k) {
      const auto total = [&](int64_t begin, int64_t end) {
        if (begin == end) return 0.0;
        const int64_t i = k / rows.tile, j = begin / cols.tile;
        return functions.dots_of_tile(sides.pair(i, j), k - rows.tile_begin(i),
                                      begin - cols.tile_begin(j), end - begin);
      };
      const int64_t own = positives.contains(sides.own(k)) ? sides.own(k) : positives.end;
      const double before = total(positives.begin, own);
      const double after = own < positives.end ? total(own + 1, positives.end) : 0.0;
      mean[k] = (before + after) / num_positives[k];
    }
  });
  const ManyPositives<Real> many(sides);
  const ClassSums<Real> sums(sides, cols, many.cols, nullptr);
  const std::vector<Part> parts = parts_of(many.rows);
  parallel_for(sides.team, parts.size(), [&](int64_t p) {
    const Part& part = parts[p];
    for (int64_t k = part.begin; k < part.end; ++k) {
      double total = functions.dot_sum(rows.row(k), sums.of(part.segment), rows.dim);
      const int64_t own = sides.own(k);
      if (many.cols[part.segment].contains(own))
        total -= functions.dot(rows.row(k), cols.row(own), rows.dim);
      mean[k] = total / num_positives[k];
    }
  });
  return mean;
}

// Subtracts the attraction of many positives from both sides' gradients. `col_pull` is that of
// columns that are anchors of their own, or null.
template <typename Real>
void attract_classes(const Sides<Real>& sides, const std::vector<double>& pull,
                     const std::vector<double>* col_pull, Real* grad_rows, Real* grad_cols) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Functions<Real>& functions = sides.functions;
  const ManyPositives<Real> many(sides);
  // Line k of a side is pulled towards the sum over its class but for the line that it is itself.
  const auto attract = [&](const Side<Real>& side, const std::vector<Segment>& segments,
                           const ClassSums<Real>& sums, Real* grad, auto weight_and_own) {
    const std::vector<Part> parts = parts_of(segments);
    parallel_for(sides.team, parts.size(), [&](int64_t p) {
      for (int64_t k = parts[p].begin; k < parts[p].end; ++k) {
        const Pull<Real> of = weight_and_own(parts[p].segment, k);
        functions.attract(of.weight, sums.of(parts[p].segment), of.own_weight, of.own, side.dim,
                          grad + k * side.stride);
      }
    });
  };
  const ClassSums<Real> col_sums(sides, cols, many.cols, nullptr);
  attract(rows, many.rows, col_sums, grad_rows, [&](int64_t c, int64_t k) {
    const int64_t own = sides.own(k);
    const bool among = many.cols[c].contains(own);
    return Pull<Real>{pull[k], 1.0, among ? cols.row(own) : nullptr};
  });
  if (grad_cols != nullptr) {
    const ClassSums<Real> pulled(sides, rows, many.rows, pull.data());
    attract(cols, many.cols, pulled, grad_cols, [&](int64_t c, int64_t j) {
      const int64_t own = sides.row_of(j);
      const bool among = many.rows[c].contains(own);
      return Pull<Real>{1.0, among ? pull[own] : 0.0, among ? rows.row(own) : nullptr};
    });
  }
  if (col_pull != nullptr) {
    const ClassSums<Real> pulled(sides, cols, many.cols, col_pull->data());
    attract(rows, many.rows, pulled, grad_rows,
            [](int64_t, int64_t) { return Pull<Real>{1.0, 0.0, nullptr}; });
  }
}

// Soft labels: every pair is positive with some weight, a product of C numbers, so that the sums
// cost O(N C D). For every line i the sum over the points j of (of_lines_i . of_points_j) point_j,
// leaving out point i + offset. The sums before and after the point that is left out are added up
// apart: taken off a total it would leave nothing but roundings where labels are nearly one-hot.
//
// Args:
//   of_lines: (num_lines, C) soft labels.
//   of_points: (num_points, C).
//   leave_out, offset: whether point i + offset is left out.
//   point(j, d): feature d of point j, in float64.
//   add(i, d, x): is given what sums before, and sums after, have of line i and feature d.
template <typename Point, typename Add>
void sum_of_soft(const Team& team, const double* of_lines, int64_t num_lines,
                 const double* of_points, int64_t num_points, int64_t num_soft, int64_t dim,
                 bool leave_out, int64_t offset, Point point, Add add) {
  constexpr int64_t kWidth = 8;
  parallel_for(team, (dim + kWidth - 1) / kWidth, [&](int64_t part) {
    const int64_t begin = part * kWidth, width = std::min(kWidth, dim - begin);
    std::vector<double> sum(num_soft * kWidth);
    const auto take = [&](int64_t j) {
      for (int64_t c = 0; c < num_soft; ++c)
        for (int64_t d = 0; d < width; ++d)
          sum[c * kWidth + d] += of_points[j * num_soft + c] * point(j, begin + d);
    };
    const auto give = [&](int64_t i) {
      double total[kWidth] = {};
      for (int64_t c = 0; c < num_soft; ++c)
        for (int64_t d = 0; d < width; ++d)
          total[d] += of_lines[i * num_soft + c] * sum[c * kWidth + d];
      for (int64_t d = 0; d < width; ++d) add(i, begin + d, total[d]);
    };
    // Points before the one left out, or all of them; then those after it.
    int64_t next = 0;
    for (int64_t i = 0; i < num_lines; ++i) {
      const int64_t stop = leave_out ? std::clamp<int64_t>(i + offset, 0, num_points) : num_points;
      for (; next < stop; ++next) take(next);
      give(i);
    }
    if (!leave_out) return;
    std::fill(sum.begin(), sum.end(), 0.0);
    next = num_points;
    for (int64_t i = num_lines - 1; i >= 0; --i) {
      const int64_t stop = std::clamp<int64_t>(i + offset + 1, 0, num_points);
      for (; next > stop; --next) take(next - 1);
      give(i);
    }
  });
}

// The total weight of each row's positives, and their mean exponent. Soft labels leave rows in the
// order of the input.
template <typename Real>
void mean_soft_exponents(const Sides<Real>& sides, std::vector<double>* weight,
                         std::vector<double>* mean) {
  const Problem<Real>& problem = sides.problem;
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const int64_t n = rows.size, dim = problem.dim;
  const double* const of_cols = problem.square ? problem.row_soft : problem.col_soft;
  const bool leave_out = sides.own_offset() >= 0;
  // Feature by feature, and added up in that order: threads share features.
  std::vector<double> products(n * dim, 0.0);
  weight->assign(n, 0.0);
  mean->assign(n, 0.0);
  const auto sum = [&](int64_t width, auto point, auto add) {
    sum_of_soft(sides.team, problem.row_soft, n, of_cols, cols.size, problem.num_soft, width,
                leave_out, sides.own_offset(), point, add);
  };
  sum(
      1, [](int64_t, int64_t) { return 1.0; },
      [&](int64_t i, int64_t, double x) { (*weight)[i] += x; });
  sum(
      dim, [&](int64_t j, int64_t d) { return static_cast<double>(cols.row(j)[d]); },
      [&](int64_t i, int64_t d, double x) {
        products[d * n + i] += x * static_cast<double>(rows.row(i)[d]);
      });
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t i = 0; i < n; ++i) (*mean)[i] += products[d * n + i];
  for (int64_t i = 0; i < n; ++i) (*mean)[i] /= (*weight)[i];
}

// The same for soft labels.
template <typename Real>
void attract_soft(const Sides<Real>& sides, const std::vector<double>& pull, Real* grad_rows,
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
        grad_rows[i * rows.stride + d] -= static_cast<Real>(pull[i] * x);
      });
  if (grad_cols == nullptr) return;
  sum_of_soft(
      sides.team, of_cols, cols.size, problem.row_soft, rows.size, problem.num_soft, problem.dim,
      offset >= 0, -offset,
      [&](int64_t i, int64_t d) { return pull[i] * static_cast<double>(rows.row(i)[d]); },
      [&](int64_t j, int64_t d, double x) {
        grad_cols[j * cols.stride + d] -= static_cast<Real>(x);
      });
}

// The same of the rows' gradient alone, for the attraction of columns that are anchors.
template <typename Real>
void attract_soft_to_cols(const Sides<Real>& sides, const std::vector<double>& col_pull,
                          Real* grad_rows) {
  const Problem<Real>& problem = sides.problem;
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  sum_of_soft(
      sides.team, problem.row_soft, rows.size, problem.col_soft, cols.size, problem.num_soft,
      problem.dim, false, 0,
      [&](int64_t j, int64_t d) { return col_pull[j] * static_cast<double>(cols.row(j)[d]); },
      [&](int64_t i, int64_t d, double x) {
        grad_rows[i * rows.stride + d] -= static_cast<Real>(x);
      });
}

}  // namespace supcon
