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

// The mean exponent of the positives of one class's rows: a product with the sum of the class.
template <typename Real>
void mean_exponents(const Sides<Real>& sides, const Segment& segment,
                    const std::vector<double>& num_positives, double* mean) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Functions<Real>& functions = sides.functions;
  const Segment positives = sides.cols_of(segment);
  if (sides.few_positives(segment)) {
    for (int64_t k = segment.begin; k < segment.end; ++k) {
      const auto total = [&](int64_t begin, int64_t end) {
        return functions.dots_of_tile(rows.row(k), cols.row(begin), cols.stride, end - begin,
                                      rows.dim);
      };
      const int64_t own = positives.contains(sides.own(k)) ? sides.own(k) : positives.end;
      const double before = total(positives.begin, own);
      const double after = own < positives.end ? total(own + 1, positives.end) : 0.0;
      mean[k] = (before + after) / num_positives[k];
    }
    return;
  }
  std::vector<double> sum(rows.dim, 0.0);
  for (int64_t j = positives.begin; j < positives.end; ++j)
    functions.add(1.0, cols.row(j), rows.dim, sum.data());
  for (int64_t k = segment.begin; k < segment.end; ++k) {
    double total = functions.dot_sum(rows.row(k), sum.data(), rows.dim);
    const int64_t own = sides.own(k);
    if (positives.contains(own)) total -= functions.dot(rows.row(k), cols.row(own), rows.dim);
    mean[k] = total / num_positives[k];
  }
}

// Subtracts the attraction of the many positives of one class from both sides' gradients.
template <typename Real>
void attract_class(const Sides<Real>& sides, const Segment& segment,
                   const std::vector<double>& pull, Real* grad_rows, Real* grad_cols) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Functions<Real>& functions = sides.functions;
  const Segment positives = sides.cols_of(segment);
  const int64_t dim = rows.dim;
  std::vector<double> sum(dim, 0.0), pulled(dim, 0.0);
  for (int64_t j = positives.begin; j < positives.end; ++j)
    functions.add(1.0, cols.row(j), dim, sum.data());
  for (int64_t k = segment.begin; k < segment.end; ++k)
    functions.add(pull[k], rows.row(k), dim, pulled.data());
  std::vector<int64_t> row_of_col(positives.size(), -1);
  for (int64_t k = segment.begin; k < segment.end; ++k) {
    const int64_t own = sides.own(k);
    const bool among = positives.contains(own);
    if (among) row_of_col[own - positives.begin] = k;
    functions.attract(pull[k], sum.data(), 1.0, among ? cols.row(own) : nullptr, dim,
                      grad_rows + k * rows.stride);
  }
  if (grad_cols == nullptr) return;
  for (int64_t j = positives.begin; j < positives.end; ++j) {
    const int64_t own = row_of_col[j - positives.begin];
    functions.attract(1.0, pulled.data(), own < 0 ? 0.0 : pull[own],
                      own < 0 ? nullptr : rows.row(own), dim, grad_cols + j * cols.stride);
  }
}

// The same of the rows' gradient alone, for the attraction of columns that are anchors.
template <typename Real>
void attract_class_to_cols(const Sides<Real>& sides, const Segment& segment,
                           const std::vector<double>& col_pull, Real* grad_rows) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Functions<Real>& functions = sides.functions;
  const Segment anchors = sides.cols_of(segment);
  std::vector<double> pulled(rows.dim, 0.0);
  for (int64_t j = anchors.begin; j < anchors.end; ++j)
    functions.add(col_pull[j], cols.row(j), rows.dim, pulled.data());
  for (int64_t k = segment.begin; k < segment.end; ++k)
    functions.attract(1.0, pulled.data(), 0.0, nullptr, rows.dim, grad_rows + k * rows.stride);
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
