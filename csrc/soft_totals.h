// What the soft labels of each line weigh in all, as products with those of many points.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "parallel.h"
#include "side.h"
#include "supcon.h"

namespace supcon {

// What the products of each line's soft labels with those of the points add up to, the line itself
// left out among them.
struct SoftTotals {
  explicit SoftTotals(int64_t size) : others(size), own(size) {}

  std::vector<double> others;
  std::vector<double> own;  // its product with itself, 0 where it is no point
};

// The norm of each line's soft labels.
template <typename Real>
std::vector<double> label_norms(const Sides<Real>& sides, const Matrix& labels) {
  std::vector<double> norms(labels.num_rows);
  parallel_ranges(sides.team, labels.num_rows, 128, [&](int64_t begin, int64_t end) {
    std::vector<double> line(labels.num_cols);
    for (int64_t i = begin; i < end; ++i) {
      sides.doubles.read(labels, i, 0, labels.num_cols, line.data());
      norms[i] = std::sqrt(sides.doubles.dot(line.data(), line.data(), labels.num_cols));
    }
  });
  return norms;
}

// What a line itself weighs is taken off a total of all points, unless it is more than so many
// times the rest.
constexpr double kLargestOwn = 4.0;

// Point i + offset may be line i itself, and is left out. Where labels are nearly one-hot, nothing
// but roundings would be left of a total that it is taken off: if there is one such line, the
// totals before and after each line are added up apart.
template <typename Real>
class SoftTotaller {
 public:
  // Args:
  //   lines, points: their soft labels.
  //   offset: point i + offset is line i; none: no point is.
  //   point_weights: what each point counts; null: 1.
  SoftTotaller(const Sides<Real>& sides, const Matrix& lines, const Matrix& points,
               std::optional<int64_t> offset, const double* point_weights = nullptr)
      : sides_(sides),
        lines_(lines),
        points_(points),
        point_weights_(point_weights),
        num_soft_(lines.num_cols),
        offset_(offset.value_or(0)),
        begin_(offset_),
        end_(offset ? offset_ + lines.num_rows : offset_) {}

  SoftTotals totals() {
    SoftTotals out(lines_.num_rows);
    const std::vector<double> outside = outside_sum();
    const int64_t num_chunks = (lines_.num_rows + kChunk - 1) / kChunk;
    std::vector<double> of_chunks(num_chunks * num_soft_, 0.0);
    parallel_for(sides_.team, num_chunks, [&](int64_t c) {
      std::vector<double> label(num_soft_);
      add_points(own_begin(c), own_begin(c + 1), &label, &of_chunks[c * num_soft_]);
    });
    // What chunks before each hold, and chunks after it.
    std::vector<double> before(of_chunks), after(std::move(of_chunks));
    std::vector<double> all(outside), rest(num_soft_, 0.0);
    for (int64_t c = 0; c < num_chunks; ++c) exchange_and_add(&before[c * num_soft_], &all);
    for (int64_t c = num_chunks - 1; c >= 0; --c) exchange_and_add(&after[c * num_soft_], &rest);
    std::atomic<bool> cancels{false};
    parallel_for(sides_.team, num_chunks, [&](int64_t c) {
      if (!take_off(c, all.data(), &out)) cancels = true;
    });
    if (cancels)
      parallel_for(sides_.team, num_chunks, [&](int64_t c) {
        add_apart(c, &before[c * num_soft_], &after[c * num_soft_], &out);
      });
    return out;
  }

 private:
  static constexpr int64_t kChunk = 128;

  int64_t own_begin(int64_t c) const { return std::clamp(c * kChunk + offset_, begin_, end_); }

  void add_points(int64_t begin, int64_t end, std::vector<double>* label, double* sum) const {
    for (int64_t p = begin; p < end; ++p) {
      sides_.doubles.read(points_, p, 0, num_soft_, label->data());
      sides_.doubles.add(weight(p), label->data(), num_soft_, sum);
    }
  }

  double weight(int64_t p) const { return point_weights_ == nullptr ? 1.0 : point_weights_[p]; }

  std::vector<double> outside_sum() const {
    const int64_t num = begin_ + points_.num_rows - end_, num_chunks = (num + kChunk - 1) / kChunk;
    std::vector<double> of_chunks(num_chunks * num_soft_, 0.0), sum(num_soft_, 0.0);
    parallel_for(sides_.team, num_chunks, [&](int64_t c) {
      std::vector<double> label(num_soft_);
      double* const to = &of_chunks[c * num_soft_];
      const int64_t begin = c * kChunk, end = std::min(num, begin + kChunk);
      add_points(std::min(begin, begin_), std::min(end, begin_), &label, to);
      add_points(std::max(begin, begin_) - begin_ + end_, std::max(end, begin_) - begin_ + end_,
                 &label, to);
    });
    for (int64_t c = 0; c < num_chunks; ++c)
      for (int64_t s = 0; s < num_soft_; ++s) sum[s] += of_chunks[c * num_soft_ + s];
    return sum;
  }

  void exchange_and_add(double* of_chunk, std::vector<double>* sum) const {
    for (int64_t s = 0; s < num_soft_; ++s) {
      const double mine = of_chunk[s];
      of_chunk[s] = (*sum)[s];
      (*sum)[s] += mine;
    }
  }

  // The chunk's lines with all points but themselves; whether that is exact.
  bool take_off(int64_t c, const double* all, SoftTotals* out) const {
    std::vector<double> line(num_soft_), point(num_soft_);
    bool is_exact = true;
    for (int64_t i = c * kChunk; i < chunk_end(c); ++i) {
      sides_.doubles.read(lines_, i, 0, num_soft_, line.data());
      out->others[i] = sides_.doubles.dot(line.data(), all, num_soft_);
      if (!is_own(i)) continue;
      const double* const own = read_own(i, line, &point);
      out->own[i] = sides_.doubles.dot(line.data(), own, num_soft_);
      const double own_weight = out->own[i] * weight(i + offset_);
      out->others[i] -= own_weight;
      is_exact &= own_weight <= kLargestOwn * out->others[i];
    }
    return is_exact;
  }

  void add_apart(int64_t c, double* before, double* after, SoftTotals* out) const {
    std::vector<double> line(num_soft_), point(num_soft_);
    const auto add_one = [&](int64_t i, double* sum) {
      sides_.doubles.read(lines_, i, 0, num_soft_, line.data());
      out->others[i] += sides_.doubles.dot(line.data(), sum, num_soft_);
      if (is_own(i))
        sides_.doubles.add(weight(i + offset_), read_own(i, line, &point), num_soft_, sum);
    };
    for (int64_t i = c * kChunk; i < chunk_end(c); ++i) out->others[i] = 0;
    for (int64_t i = c * kChunk; i < chunk_end(c); ++i) add_one(i, before);
    for (int64_t i = chunk_end(c) - 1; i >= c * kChunk; --i) add_one(i, after);
  }

  const double* read_own(int64_t i, const std::vector<double>& line,
                         std::vector<double>* point) const {
    if (&lines_ == &points_) return line.data();
    sides_.doubles.read(points_, i + offset_, 0, num_soft_, point->data());
    return point->data();
  }

  int64_t chunk_end(int64_t c) const { return std::min(lines_.num_rows, (c + 1) * kChunk); }
  bool is_own(int64_t i) const { return begin_ <= i + offset_ && i + offset_ < end_; }

  const Sides<Real>& sides_;
  const Matrix &lines_, &points_;
  const double* const point_weights_;
  const int64_t num_soft_, offset_;
  const int64_t begin_, end_;  // points that are lines
};

}  // namespace supcon
