// Positives that no pass over pairs needs to look at: where they are many, their attraction by sums
// over each class. All sums are made in float64: in float32 one row of large norm destroys them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
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

// Those of the columns, which the forward and the backward of the same sides share.
template <typename Real>
std::shared_ptr<const ClassSums<Real>> sums_of_cols(const Sides<Real>& sides,
                                                    const ManyPositives<Real>& many) {
  if (sides.col_sums == nullptr)
    sides.col_sums = std::make_shared<ClassSums<Real>>(sides, sides.cols, many.cols, nullptr);
  return sides.col_sums;
}

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
  const auto sums = sums_of_cols(sides, many);
  const std::vector<Part> parts = parts_of(many.rows);
  parallel_for(sides.team, parts.size(), [&](int64_t p) {
    const Part& part = parts[p];
    for (int64_t k = part.begin; k < part.end; ++k) {
      const int64_t own = sides.own(k);
      const bool among = many.cols[part.segment].contains(own);
      const double total = functions.dot_sum(rows.row(k), sums->of(part.segment), 1.0,
                                             among ? cols.row(own) : nullptr, rows.dim);
      mean[k] = total / num_positives[k];
    }
  });
  return mean;
}

// What attracts each line of a side to many positives: sums over classes of lines of the other
// side.
template <typename Real>
class ClassPulls {
 public:
  typedef std::shared_ptr<const ClassSums<Real>> Sums;
  typedef std::function<Pull<Real>(int64_t segment, int64_t k)> OfLine;

  ClassPulls(const Side<Real>& side, const Functions<Real>& functions)
      : side_(side), functions_(functions) {}

  // The classes, over which sums are then added.
  void set_classes(const std::vector<Segment>& segments) {
    segment_.assign(side_.size, -1);
    int64_t c = 0;
    for (const Segment& segment : segments) {
      for (int64_t k = segment.begin; k < segment.end; ++k) segment_[k] = c;
      ++c;
    }
  }
  void add(Sums sums, OfLine of_line) { pulls_.emplace_back(std::move(sums), std::move(of_line)); }
  // From the gradients of lines [begin, end).
  void subtract(int64_t begin, int64_t end, Real* grad) const {
    for (const auto& [sums, of_line] : pulls_)
      for (int64_t k = begin; k < end; ++k) {
        const int64_t c = segment_[k];
        if (c < 0) continue;
        const Pull<Real> of = of_line(c, k);
        functions_.attract(of.weight, sums->of(c), of.own_weight, of.own, side_.dim,
                           grad + k * side_.stride);
      }
  }

 private:
  const Side<Real>& side_;
  const Functions<Real>& functions_;
  std::vector<int64_t> segment_;  // of each line; -1: its positives are few
  std::vector<std::pair<Sums, OfLine>> pulls_;
};

// Whether all lines of a class pull alike, as those of a mean or a sum of losses do.
inline bool pull_alike(const std::vector<Segment>& segments, const std::vector<double>& pull) {
  for (const Segment& segment : segments)
    for (int64_t k = segment.begin; k < segment.end; ++k)
      if (pull[k] != pull[segment.begin]) return false;
  return true;
}

// The pulls of many positives on the rows and, where they are wanted, on the columns, which in a
// square are the rows. `col_pull` is that of columns that are anchors of their own, or null.
template <typename Real>
void pull_by_classes(const Sides<Real>& sides, const std::vector<double>& pull,
                     const std::vector<double>* col_pull, ClassPulls<Real>* of_rows,
                     ClassPulls<Real>* of_cols) {
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const auto many = std::make_shared<const ManyPositives<Real>>(sides);
  const auto sums = [&](const Side<Real>& side, const std::vector<Segment>& segments,
                        const std::vector<double>* weights) {
    return std::make_shared<const ClassSums<Real>>(sides, side, segments,
                                                   weights == nullptr ? nullptr : weights->data());
  };
  // In a square, a row that pulls as all of its class do is pulled by them as much again.
  const bool twice = of_cols == of_rows && pull_alike(many->rows, pull);
  const double times = twice ? 2.0 : 1.0;
  of_rows->set_classes(many->rows);
  of_rows->add(sums_of_cols(sides, *many), [&sides, &pull, many, times](int64_t c, int64_t k) {
    const int64_t own = sides.own(k);
    const bool among = many->cols[c].contains(own);
    return Pull<Real>{times * pull[k], 1.0, among ? sides.cols.row(own) : nullptr};
  });
  if (col_pull != nullptr)
    of_rows->add(sums(cols, many->cols, col_pull),
                 [](int64_t, int64_t) { return Pull<Real>{1.0, 0.0, nullptr}; });
  if (of_cols == nullptr || twice) return;
  of_cols->set_classes(many->cols);
  of_cols->add(sums(rows, many->rows, &pull), [&sides, &pull, many](int64_t c, int64_t j) {
    const int64_t own = sides.row_of(j);
    const bool among = many->rows[c].contains(own);
    return Pull<Real>{1.0, among ? pull[own] : 0.0, among ? sides.rows.row(own) : nullptr};
  });
  if (col_pull != nullptr)
    of_cols->add(sums(rows, many->rows, nullptr), [col_pull](int64_t, int64_t j) {
      return Pull<Real>{(*col_pull)[j], 0.0, nullptr};
    });
}

}  // namespace supcon
