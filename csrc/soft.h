// Soft labels in the default loss, where the weight of a pair is a product: positives are dealt
// with by sums over each soft class, S_c = sum_p y_pc z_p, of which row i is given sum_c y_ic S_c.
// Both are products of matrices, made by the kernels that multiply a tile of weights with a tile of
// rows: here the weights are labels.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "positives.h"
#include "side.h"
#include "supcon.h"
#include "weights.h"

namespace supcon {

// Products of so many tiles are added up in Real, their sums in float64.
constexpr int64_t kTilesInReal = 4;

// A power of two by which the largest of a few numbers becomes about 1.
inline double unit_near(double largest) {
  return largest > 0 && std::isfinite(largest) ? std::ldexp(1.0, std::ilogb(largest)) : 1.0;
}

// A thread's memory for the product of a tile of labels with rows.
template <typename Real>
class LabelTile {
 public:
  static size_t size(const Side<Real>& side) {
    return kMaxTile * (kScratchStride + static_cast<size_t>(side.stride));
  }

  LabelTile(const Sides<Real>& sides, const Matrix& labels, Real* memory)
      : sides_(sides), labels_(labels), memory_(memory) {
    t_.dim = sides.rows.dim;
    t_.stride = sides.rows.stride;
    t_.scratch = memory;
    t_.grad_a = t_.grad_b = sum();
  }

  // Takes the labels of rows and classes, each row's times factor(row).
  template <typename Factor>
  void load(int64_t row, int64_t num_rows, int64_t label, int64_t num_labels, Factor factor) {
    t_.num_rows = static_cast<int>(num_rows);
    t_.num_cols = static_cast<int>(num_labels);
    double line[kMaxTile];
    for (int64_t r = 0; r < num_rows; ++r) {
      sides_.functions.read(labels_, row + r, label, num_labels, line);
      sides_.functions.scale(line, factor(row + r), num_labels, t_.scratch + r * kScratchStride);
    }
  }
  // sum += labels^T rows, or labels sums
  void add_to_classes(const Real* rows) {
    t_.a = rows;
    sides_.functions.add_to_cols(t_);
  }
  void add_to_rows(const Real* sums) {
    t_.b = sums;
    sides_.functions.add_to_rows(t_);
  }
  // Adds the sum to one in float64, and starts a new one.
  void flush(int64_t count, double* to) {
    sides_.functions.accumulate(sum(), count * t_.stride, to);
    clear();
  }
  void clear() { std::fill(sum(), sum() + kMaxTile * t_.stride, Real(0)); }

 private:
  Real* sum() { return memory_ + kMaxTile * kScratchStride; }

  const Sides<Real>& sides_;
  const Matrix& labels_;
  Real* const memory_;
  TilePair<Real> t_ = {};
};

// (num_soft, stride) sums over the rows of a side of their labels times weight times the row, in
// `unit`.
template <typename Real>
class SoftSums {
 public:
  // Args:
  //   labels, norms: of the side's rows.
  //   weights: of each row, or null.
  SoftSums(const Sides<Real>& sides, const Side<Real>& side, const Matrix& labels,
           const std::vector<double>& norms, const std::vector<double>* weights)
      : sides_(sides),
        side_(side),
        labels_(labels),
        weights_(weights),
        unit_(unit_near(largest(norms))),
        size_(labels.num_cols * side.stride),
        sums_(size_) {
    const int64_t num_class_tiles = (labels.num_cols + kMaxTile - 1) / kMaxTile;
    // Few classes leave threads without work, unless the rows are shared out, too.
    const int64_t num_parts = std::clamp<int64_t>(kJobs / num_class_tiles, 1, side.num_tiles + 1);
    Array<double> of_parts(num_parts * size_);
    PerThread<Real> memory(sides.team, LabelTile<Real>::size(side));
    std::atomic<int64_t> next{0};
    on_all(sides.team, [&] {
      LabelTile<Real> tile(sides_, labels_, memory.claim());
      for (int64_t k; (k = next.fetch_add(1)) < num_parts * num_class_tiles;) {
        const int64_t part = k % num_parts, label = k / num_parts * kMaxTile;
        add_part(part * side_.num_tiles / num_parts, (part + 1) * side_.num_tiles / num_parts,
                 label, &tile, of_parts.get() + part * size_ + label * side_.stride);
      }
    });
    parallel_ranges(sides.team, size_, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double sum = 0;
        for (int64_t part = 0; part < num_parts; ++part) sum += of_parts.get()[part * size_ + k];
        sums_.get()[k] = static_cast<Real>(sum);
      }
    });
  }

  double unit() const { return unit_; }
  const Real* of(int64_t label) const { return sums_.get() + label * side_.stride; }

 private:
  static constexpr int64_t kJobs = 16;

  double largest(const std::vector<double>& norms) const {
    double largest = 0;
    for (int64_t p = 0; p < side_.size; ++p)
      largest = std::max(largest, norms[p] * std::abs(weight(p)));
    return largest;
  }
  double weight(int64_t p) const { return weights_ == nullptr ? 1.0 : (*weights_)[p]; }

  void add_part(int64_t begin, int64_t end, int64_t label, LabelTile<Real>* tile,
                double* sum) const {
    const int64_t num_labels = std::min<int64_t>(kMaxTile, labels_.num_cols - label);
    std::fill(sum, sum + num_labels * side_.stride, 0.0);
    tile->clear();
    for (int64_t t = begin; t < end; ++t) {
      tile->load(side_.tile_begin(t), side_.tile_size(t), label, num_labels,
                 [&](int64_t p) { return weight(p) / unit_; });
      tile->add_to_classes(side_.row(side_.tile_begin(t)));
      if ((t - begin) % kTilesInReal == kTilesInReal - 1) tile->flush(num_labels, sum);
    }
    tile->flush(num_labels, sum);
  }

  const Sides<Real>& sides_;
  const Side<Real>& side_;
  const Matrix& labels_;
  const std::vector<double>* const weights_;
  const double unit_;
  const int64_t size_;
  Array<Real> sums_;
};

// Calls take(i, product, unit) for each row of a side: its labels times the sums are the product
// (dim) in that unit.
template <typename Real, typename Take>
void multiply_by_sums(const Sides<Real>& sides, const Side<Real>& side, const Matrix& labels,
                      const std::vector<double>& norms, const SoftSums<Real>& sums, Take take) {
  PerThread<Real> memory(sides.team, LabelTile<Real>::size(side));
  PerThread<double> products(sides.team, kMaxTile * side.stride);
  std::atomic<int64_t> next{0};
  on_all(sides.team, [&] {
    LabelTile<Real> tile(sides, labels, memory.claim());
    double* const product = products.claim();
    for (int64_t t; (t = next.fetch_add(1)) < side.num_tiles;) {
      const int64_t begin = side.tile_begin(t), size = side.tile_size(t);
      std::fill(product, product + size * side.stride, 0.0);
      tile.clear();
      for (int64_t label = 0; label < labels.num_cols; label += kMaxTile) {
        tile.load(begin, size, label, std::min<int64_t>(kMaxTile, labels.num_cols - label),
                  [&](int64_t i) { return 1 / unit_near(norms[i]); });
        tile.add_to_rows(sums.of(label));
        if (label / kMaxTile % kTilesInReal == kTilesInReal - 1) tile.flush(size, product);
      }
      tile.flush(size, product);
      for (int64_t r = 0; r < size; ++r)
        take(begin + r, product + r * side.stride, unit_near(norms[begin + r]) * sums.unit());
    }
  });
}

// The mean exponent of the positives of each row that is not looked at pair by pair.
template <typename Real>
std::vector<double> mean_soft_exponents(const Weights<Real>& weights) {
  const Sides<Real>& sides = weights.sides();
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Functions<Real>& functions = sides.functions;
  const AnchorWeights& of = weights.rows();
  std::vector<double> mean(rows.size, 0.0);
  const SoftSums<Real> sums(sides, cols, soft_cols(sides.problem), weights.norms_of_cols(),
                            nullptr);
  multiply_by_sums(sides, rows, sides.problem.row_soft, weights.norms_of_rows(), sums,
                   [&](int64_t i, const double* product, double unit) {
                     const Real* const own = of.own[i] > 0 ? cols.row(sides.own(i)) : nullptr;
                     const double total =
                         functions.dot_sum(rows.row(i), product, of.own[i] / unit, own, rows.dim);
                     mean[i] = total * unit / of.total[i];
                   });
  return mean;
}

// Subtracts the attraction of positives that are not looked at pair by pair from both sides'
// gradients. `col_pull` is that of columns that are anchors of their own, or null.
template <typename Real>
void attract_soft(const Weights<Real>& weights, const std::vector<double>& pull,
                  const std::vector<double>* col_pull, Real* grad_rows, Real* grad_cols) {
  const Sides<Real>& sides = weights.sides();
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const Matrix &of_rows = sides.problem.row_soft, &of_cols = soft_cols(sides.problem);
  const AnchorWeights& anchors = weights.rows();
  // Line k of a side is pulled towards the product of its labels with sums over the other side.
  const auto attract = [&](const Side<Real>& side, const Matrix& labels,
                           const std::vector<double>& norms, const SoftSums<Real>& sums, Real* grad,
                           auto weight_and_own) {
    multiply_by_sums(sides, side, labels, norms, sums,
                     [&](int64_t k, const double* product, double unit) {
                       const Pull<Real> of = weight_and_own(k);
                       sides.functions.attract(of.weight * unit, product, of.own_weight / unit,
                                               of.own, side.dim, grad + k * side.stride);
                     });
  };
  const SoftSums<Real> col_sums(sides, cols, of_cols, weights.norms_of_cols(), nullptr);
  attract(rows, of_rows, weights.norms_of_rows(), col_sums, grad_rows, [&](int64_t i) {
    const bool among = anchors.own[i] > 0;
    return Pull<Real>{pull[i], anchors.own[i], among ? cols.row(sides.own(i)) : nullptr};
  });
  if (grad_cols != nullptr) {
    const SoftSums<Real> pulled(sides, rows, of_rows, weights.norms_of_rows(), &pull);
    attract(cols, of_cols, weights.norms_of_cols(), pulled, grad_cols, [&](int64_t j) {
      const int64_t i = sides.row_of(j);
      const bool among = i >= 0 && anchors.own[i] > 0;
      return Pull<Real>{1.0, among ? pull[i] * anchors.own[i] : 0.0, among ? rows.row(i) : nullptr};
    });
  }
  if (col_pull != nullptr) {
    const SoftSums<Real> pulled(sides, cols, of_cols, weights.norms_of_cols(), col_pull);
    attract(rows, of_rows, weights.norms_of_rows(), pulled, grad_rows,
            [](int64_t) { return Pull<Real>{1.0, 0.0, nullptr}; });
  }
  if (col_pull != nullptr && grad_cols != nullptr) {
    const SoftSums<Real> row_sums(sides, rows, of_rows, weights.norms_of_rows(), nullptr);
    attract(cols, of_cols, weights.norms_of_cols(), row_sums, grad_cols,
            [&](int64_t j) { return Pull<Real>{(*col_pull)[j], 0.0, nullptr}; });
  }
}

}  // namespace supcon
