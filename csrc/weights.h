// The weights of pairs that have some: of a mask, or products of soft labels. What they add up to
// for each anchor, and those of one pair of tiles.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "parallel.h"
#include "side.h"
#include "soft_totals.h"
#include "supcon.h"

namespace supcon {

// Soft labels of a side, whose rows stand in the order of the input.
template <typename Real>
const Matrix& soft_cols(const Problem<Real>& problem) {
  return problem.square ? problem.row_soft : problem.col_soft;
}

// Whether the positives of most rows are dealt with by sums over each soft class.
template <typename Real>
bool sums_soft_classes(const Problem<Real>& problem) {
  return problem.row_soft.data != nullptr && problem.summation == Summation::kOut &&
         problem.denominator == Denominator::kAll;
}

// A side with its soft labels and their norms.
template <typename Real>
struct LabelledSide {
  const Side<Real>& side;
  const Matrix& labels;
  const std::vector<double>& norms;
};

// Of every anchor of a side: what its positives weigh in all, and which anchors are looked at pair
// by pair.
struct AnchorWeights {
  std::vector<double> total;
  std::vector<bool> by_pair;
  std::vector<bool> tiles;  // of anchors, whether one is looked at pair by pair
  std::vector<double> own;  // of soft labels: their product with themselves
};

template <typename Real>
class Weights {
 public:
  Weights(const Sides<Real>& sides, bool cols_are_anchors)
      : sides_(sides), problem_(sides.problem) {
    if (problem_.mask.data != nullptr) {
      rows_.total = mask_totals(problem_.mask, sides.rows, sides.cols);
      rows_.by_pair.assign(sides.rows.size, true);
      if (cols_are_anchors) {
        cols_.total = mask_totals(mask_of_cols(), sides.cols, sides.rows);
        cols_.by_pair.assign(sides.cols.size, true);
      }
    } else if (problem_.row_soft.data != nullptr) {
      if (sums_soft_classes(problem_) && !sides.square) {
        norms_of_rows_ = label_norms(sides, problem_.row_soft);
        norms_of_cols_ = label_norms(sides, problem_.col_soft);
      }
      const int64_t own = sides.own_offset();
      rows_ = of_soft(false, own < 0 ? std::nullopt : std::optional<int64_t>(own));
      if (cols_are_anchors) cols_ = of_soft(true, std::nullopt);
    } else {
      return;
    }
    mark_tiles(sides.rows, &rows_);
    if (cols_are_anchors) mark_tiles(sides.cols, &cols_);
  }

  // Those of the other way, of which `sides` are.
  Weights mirrored(const Sides<Real>& sides) const {
    Weights other(sides);
    other.rows_ = cols_;
    other.cols_ = rows_;
    other.norms_of_rows_ = norms_of_cols_;
    other.norms_of_cols_ = norms_of_rows_;
    return other;
  }

  const Sides<Real>& sides() const { return sides_; }
  bool given() const { return problem_.mask.data != nullptr || problem_.row_soft.data != nullptr; }
  const AnchorWeights& rows() const { return rows_; }
  // Of the columns where they are anchors.
  const AnchorWeights& cols() const { return sides_.square ? rows_ : cols_; }
  // The norms of each row's and column's soft labels, where sums over classes are made.
  const std::vector<double>& norms_of_rows() const { return norms_of_rows_; }
  const std::vector<double>& norms_of_cols() const {
    return sides_.square ? norms_of_rows_ : norms_of_cols_;
  }
  // Whether a pass looks at the weights of any pair, or of this pair of tiles. Soft labels weigh
  // no pair less than 0, and where every other pair is in the denominator, that is all it asks.
  bool in_pass(Pairs pairs) const {
    return given() && !(pairs == Pairs::kAll && sums_soft_classes(problem_));
  }
  bool in_tile(int64_t i, int64_t j) const {
    return given() && (rows_.tiles[i] || (!cols().tiles.empty() && cols().tiles[j]));
  }
  // Whether any anchor is looked at pair by pair.
  bool any() const {
    const auto has_any = [](const std::vector<bool>& tiles) {
      return std::find(tiles.begin(), tiles.end(), true) != tiles.end();
    };
    return has_any(rows_.tiles) || has_any(cols_.tiles);
  }

  // Gives the pair of tiles the codes of its weights. Pairs that take no part for any other reason
  // have such a weight.
  void set(int64_t i, int64_t j, const PairMemory<Real>& memory, TilePair<Real>* t) const {
    const bool two = sides_.square || !cols_.total.empty();
    Real* const of_rows = memory.codes;
    Real* const of_cols = two ? memory.codes + kScratch : nullptr;
    if (problem_.mask.data != nullptr)
      encode_mask(i, j, memory.products, *t, of_rows, of_cols);
    else
      encode_soft(i, j, memory.products, *t, of_rows, of_cols);
    leave_out(*t, of_rows);
    if (two) leave_out(*t, of_cols);
    t->pair_weights = {of_rows, of_cols};
    t->triangle = false;
    t->own = nullptr;
  }

 private:
  explicit Weights(const Sides<Real>& sides) : sides_(sides), problem_(sides.problem) {}

  static constexpr double kSmallestTotal = 0x1p-60;  // of a product of two labels, by their norms

  bool logarithms() const { return problem_.summation == Summation::kIn; }

  // The mask as columns that are anchors see it.
  Matrix mask_of_cols() const {
    return problem_.symmetric ? supcon::mirrored(problem_).mask : problem_.mask;
  }

  // What the positives of each line of a side weigh in all, whose points are the other side.
  std::vector<double> mask_totals(const Matrix& mask, const Side<Real>& lines,
                                  const Side<Real>& points) const {
    const int64_t n = lines.size, m = points.size;
    std::vector<double> totals(n, 0.0);
    if (m == 0) return totals;
    const double repeats = static_cast<double>(m / mask.num_cols);
    parallel_ranges(sides_.team, n, 16, [&](int64_t begin, int64_t end) {
      double buffer[kMaxTile];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t own =
            problem_.symmetric || sides_.own(i) < 0 ? -1 : sides_.own(i) % mask.num_cols;
        double own_weight = 0;
        for (int64_t c = 0; c < mask.num_cols; c += kMaxTile) {
          const int64_t count = std::min<int64_t>(kMaxTile, mask.num_cols - c);
          sides_.functions.read(mask, i % mask.num_rows, c, count, buffer);
          if (c <= own && own < c + count) std::swap(own_weight, buffer[own - c]);
          for (int64_t k = 0; k < count; ++k) totals[i] += std::max(buffer[k], 0.0);
        }
        // Its own column is left out once, and is a positive as often as it is repeated.
        totals[i] = totals[i] * repeats + std::max(own_weight, 0.0) * (repeats - 1);
      }
    });
    return totals;
  }

  // The rows' or the columns' soft labels.
  LabelledSide<Real> labelled(bool cols) const {
    if (cols) return {sides_.cols, soft_cols(problem_), norms_of_cols()};
    return {sides_.rows, problem_.row_soft, norms_of_rows()};
  }

  AnchorWeights of_soft(bool cols, std::optional<int64_t> offset) {
    const LabelledSide<Real> lines = labelled(cols), points = labelled(!cols);
    SoftTotals found = SoftTotaller<Real>(sides_, lines.labels, points.labels, offset).totals();
    AnchorWeights out;
    const bool by_sums = sums_soft_classes(problem_);
    out.by_pair.assign(lines.side.size, !by_sums);
    if (by_sums) {
      for (size_t k = 0; sides_.square && k < found.own.size(); ++k)
        norms_of_rows_.push_back(std::sqrt(found.own[k]));
      mark_anchors(found, lines, points, offset, &out.by_pair);
      out.own = std::move(found.own);
    }
    out.total = std::move(found.others);
    return out;
  }

  // Looks at an anchor pair by pair where a sum over each soft class, less its own part, would be
  // little but roundings of that part, or of no size for float32.
  void mark_anchors(const SoftTotals& totals, const LabelledSide<Real>& lines,
                    const LabelledSide<Real>& points, std::optional<int64_t> offset,
                    std::vector<bool>* by_pair) const {
    double highest = 0;
    for (double norm : points.norms) highest = std::max(highest, norm);
    for (int64_t i = 0; i < lines.side.size; ++i)
      (*by_pair)[i] =
          totals.others[i] > 0 && (totals.own[i] > kLargestOwn * totals.others[i] ||
                                   totals.others[i] < kSmallestTotal * lines.norms[i] * highest);
    if (problem_.normalize || !offset) return;
    // Rows that are longer than others have a larger part.
    const Side<Real>& side = points.side;
    std::vector<double> lengths(side.size);
    for (int64_t p = 0; p < side.size; ++p)
      lengths[p] = std::sqrt(sides_.functions.dot(side.row(p), side.row(p), side.dim));
    const SoftTotals of_lengths =
        SoftTotaller<Real>(sides_, lines.labels, points.labels, offset, lengths.data()).totals();
    for (int64_t i = 0; i < lines.side.size; ++i)
      if (totals.others[i] > 0 && totals.own[i] > 0 &&
          totals.own[i] * lengths[i + *offset] > kLargestOwn * of_lengths.others[i])
        (*by_pair)[i] = true;
  }

  static void mark_tiles(const Side<Real>& side, AnchorWeights* of) {
    of->tiles.assign(side.num_tiles, false);
    for (int64_t k = 0; k < side.size; ++k)
      if (of->by_pair[k]) of->tiles[k / side.tile] = true;
  }

  // A mask's elements in the rows of the tile, and as the columns see them.
  void encode_mask(int64_t i, int64_t j, double* buffer, const TilePair<Real>& t, Real* of_rows,
                   Real* of_cols) const {
    const int64_t row = sides_.rows.tile_begin(i), col = sides_.cols.tile_begin(j);
    for (int r = 0; r < t.num_rows; ++r) {
      read_mask(problem_.mask, row + r, col, t.num_cols, buffer);
      sides_.functions.encode({buffer, &rows_.total[row + r], 0, t.num_cols, 1}, logarithms(),
                              of_rows + r * kScratchStride);
    }
    for (int c = 0; of_cols != nullptr && c < t.num_cols; ++c) {
      read_mask(mask_of_cols(), col + c, row, t.num_rows, buffer);
      sides_.functions.encode({buffer, &cols().total[col + c], 0, t.num_rows, kScratchStride},
                              logarithms(), of_cols + c);
    }
  }

  void read_mask(const Matrix& mask, int64_t row, int64_t col, int64_t count, double* out) const {
    for (int64_t k = 0; k < count;) {
      const int64_t begin = (col + k) % mask.num_cols;
      const int64_t run = std::min(count - k, mask.num_cols - begin);
      sides_.functions.read(mask, row % mask.num_rows, begin, run, out + k);
      k += run;
    }
  }

  void encode_soft(int64_t i, int64_t j, double* products, const TilePair<Real>& t, Real* of_rows,
                   Real* of_cols) const {
    const int64_t row = sides_.rows.tile_begin(i), col = sides_.cols.tile_begin(j);
    multiply_soft(row, col, t, products);
    for (int r = 0; r < t.num_rows; ++r) {
      const double* const w = products + r * kScratchStride;
      sides_.functions.encode({w, &rows_.total[row + r], 0, t.num_cols, 1}, logarithms(),
                              of_rows + r * kScratchStride);
      if (of_cols == nullptr) continue;
      sides_.functions.encode({w, &cols().total[col], 1, t.num_cols, 1}, logarithms(),
                              of_cols + r * kScratchStride);
    }
  }

  // The products of the pair's soft labels, as many classes at a time as a tile has rows.
  void multiply_soft(int64_t row, int64_t col, const TilePair<Real>& t, double* products) const {
    const Matrix &of_rows = problem_.row_soft, &of_cols = soft_cols(problem_);
    TilePair<double> chunk = {};
    double* const transposed = products + kScratch;
    double line[kMaxTile];
    chunk.num_rows = t.num_rows;
    chunk.dim = round_up(t.num_cols, sides_.doubles.panel);
    chunk.stride = kScratchStride;
    chunk.b = transposed;
    chunk.scratch = products + 2 * kScratch;
    chunk.grad_a = products;
    std::fill(products, transposed, 0.0);
    for (int64_t s = 0; s < of_rows.num_cols; s += kMaxTile) {
      const int64_t count = std::min<int64_t>(kMaxTile, of_rows.num_cols - s);
      chunk.num_cols = static_cast<int>(count);
      for (int r = 0; r < t.num_rows; ++r)
        sides_.doubles.read(of_rows, row + r, s, count, chunk.scratch + r * kScratchStride);
      for (int c = 0; c < chunk.dim; ++c) {
        if (c < t.num_cols)
          sides_.doubles.read(of_cols, col + c, s, count, line);
        else
          std::fill(line, line + count, 0.0);
        for (int64_t k = 0; k < count; ++k) transposed[k * kScratchStride + c] = line[k];
      }
      sides_.doubles.add_to_rows(chunk);
    }
  }

  // Marks the pairs of a ragged tile, below the diagonal, and of a row with itself.
  void leave_out(const TilePair<Real>& t, Real* codes) const {
    const int64_t padded = round_up(t.num_cols, sides_.functions.panel);
    for (int r = 0; r < t.num_rows; ++r) {
      Real* const line = codes + r * kScratchStride;
      std::fill(line + t.num_cols, line + padded, Real(-1));
      if (t.triangle) std::fill(line, line + r + 1, Real(-1));
      if (t.own != nullptr && t.own[r] >= 0) line[t.own[r]] = -1;
    }
  }

  const Sides<Real>& sides_;
  const Problem<Real>& problem_;
  AnchorWeights rows_, cols_;
  std::vector<double> norms_of_rows_, norms_of_cols_;
};

// Memory for every thread of the team.
template <typename Real>
class PairMemories {
 public:
  explicit PairMemories(const Weights<Real>& weights)
      : tiles_(weights.sides().team,
               weights.sides().multiplies_bfloat16() ? 2 * kScratch : kScratch),
        panels_(weights.sides().team,
                weights.sides().packs_in_passes() ? kMaxTile * weights.sides().cols.dim : 0),
        codes_(weights.sides().team, weights.any() ? 2 * kScratch : 0),
        products_(weights.sides().team, weights.any() ? 3 * kScratch : 0) {}

  PairMemory<Real> claim() {
    return {tiles_.claim(), panels_.claim(), codes_.claim(), products_.claim()};
  }

 private:
  PerThread<Real> tiles_, panels_, codes_;
  PerThread<double> products_;
};

}  // namespace supcon
