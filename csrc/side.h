// The sides of a problem: rows sorted by label, normalised, scaled and packed for the kernels.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "schedule.h"
#include "supcon.h"

namespace supcon {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Rows a tile holds: enough tiles for threads to share, and no more than the caches hold.
inline int tile_rows(int64_t n) {
  if (n <= 768) return 64;
  return n <= 1536 ? 96 : kMaxTile;
}

// The rows of one label: positions in the sorted order.
struct Segment {
  int64_t size() const { return end - begin; }
  bool contains(int64_t k) const { return begin <= k && k < end; }

  int64_t label;
  int64_t begin, end;
};

// What a side is made of.
struct SideInput {
  const void* x;
  const int64_t* labels;
  int64_t count;
  bool is_packed;  // the side has panels of all its rows
};

// One side of the problem, sorted by label: embeddings scaled so that their products are base-2
// exponents, in rows of a padded stride and, where asked, packed in the transposed panels of the
// register kernel.
template <typename Real>
struct Side {
  Side(const SideInput& of, const Problem<Real>& problem, const Functions<Real>& functions,
       const Team& team)
      : input(of.x),
        panel(functions.panel),
        dim(round_up(std::max<int64_t>(problem.dim, 1), functions.panel)),
        stride(dim + 16),
        position(of.count, -1) {
    sort(of.labels, of.count, problem.ignore_label);
    tile = tile_rows(size);
    num_tiles = (size + tile - 1) / tile;
    padded = round_up(size, panel);
    allocate(functions.pack_bfloat16 != nullptr, of.is_packed);
    embed(problem, functions, team);
  }

  int64_t tile_begin(int64_t t) const { return t * tile; }
  int tile_size(int64_t t) const { return std::min<int64_t>(tile, size - t * tile); }
  const Real* row(int64_t k) const { return data->get() + k * stride; }
  const Real* packed_tile(int64_t t) const { return packed->get() + tile_begin(t) * dim; }
  // From row k on, which begins a panel.
  uint32_t* packed_words(int64_t k) const { return words->get() + k * dim / 2; }
  uint32_t* paired_words(int64_t k) const { return words->get() + (padded * dim + k * stride) / 2; }

  const void* input;
  int64_t panel, dim, stride;
  std::vector<int64_t> order;     // sorted position -> row of the input, ignored rows left out
  std::vector<int64_t> position;  // row of the input -> sorted position, -1 where ignored
  std::vector<Segment> segments;
  int64_t size = 0;  // rows that take part
  int64_t tile = 0, num_tiles = 0, padded = 0;
  std::unique_ptr<Array<Real>> data, packed;
  std::unique_ptr<Array<uint32_t>> words;  // in place of packed: of bfloat16, packed and paired
  std::vector<Real> scale, norm;           // the row is input / scale / norm
  std::vector<Real> factor;                // the row is its words times this
  bool finite = true;

 private:
  Real* writable_row(int64_t k) { return data->get() + k * stride; }

  void sort(const int64_t* labels, int64_t count, int64_t ignore_label) {
    order.reserve(count);
    for (int64_t k = 0; k < count; ++k)
      if (labels[k] != ignore_label) order.push_back(k);
    size = order.size();
    sort_by_label(labels);
    for (int64_t k = 0; k < size; ++k) {
      position[order[k]] = k;
      if (segments.empty() || segments.back().label != labels[order[k]])
        segments.push_back({labels[order[k]], k, k});
      segments.back().end = k + 1;
    }
  }

  // Stable. Labels are mostly small numbers, which are counted instead of compared.
  void sort_by_label(const int64_t* labels) {
    const auto before = [=](int64_t a, int64_t b) { return labels[a] < labels[b]; };
    const auto ends = std::minmax_element(order.begin(), order.end(), before);
    if (size == 0) return;
    const uint64_t lowest = labels[*ends.first];
    const uint64_t range = static_cast<uint64_t>(labels[*ends.second]) - lowest;
    if (range > 4 * static_cast<uint64_t>(size)) {
      std::stable_sort(order.begin(), order.end(), before);
      return;
    }
    std::vector<int64_t> next(range + 2, 0), unsorted(order);
    for (int64_t k : unsorted) ++next[labels[k] - lowest + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (int64_t k : unsorted) order[next[labels[k] - lowest]++] = k;
  }

  void allocate(bool as_words, bool is_packed) {
    data = std::make_unique<Array<Real>>(padded * stride);
    if (as_words)
      words = std::make_unique<Array<uint32_t>>(padded * (dim + stride) / 2);
    else if (is_packed)
      packed = std::make_unique<Array<Real>>(padded * dim);
    scale.assign(size, 1);
    norm.assign(size, 1);
    factor.assign(as_words ? padded : 0, 1);
  }

  void embed(const Problem<Real>& problem, const Functions<Real>& functions, const Team& team) {
    Real unit = static_cast<Real>(std::sqrt(kLog2E / problem.temperature));
    // What bfloat16 is multiplied by before it is packed; 0: by what brings each row near 1.
    Real power = words == nullptr ? Real(1) : Real(0);
    if (words != nullptr && !problem.normalize) power = std::ldexp(Real(1), std::ilogb(unit));
    if (power != 0) unit /= power;
    std::atomic<bool> all_finite{true};
    parallel_for(team, padded / panel, [&](int64_t p) {
      const int64_t begin = p * panel, end = std::min(size, begin + panel);
      for (int64_t k = begin; k < begin + panel; ++k)
        std::fill(writable_row(k) + (k < size ? problem.dim : 0), writable_row(k + 1), Real(0));
      if (problem.bfloat16) widen(begin, end, power, problem, functions);
      if (words != nullptr)
        functions.pack_bfloat16(row(begin), stride, dim, packed_words(begin), paired_words(begin));
      for (int64_t k = begin; k < end; ++k)
        if (!embed_row(k, unit, problem, functions)) all_finite = false;
      if (packed != nullptr) functions.pack(row(begin), stride, dim, packed->get() + begin * dim);
    });
    finite = all_finite;
  }

  void widen(int64_t begin, int64_t end, Real power, const Problem<Real>& problem,
             const Functions<Real>& functions) {
    for (int64_t k = begin; k < end; ++k) {
      const auto* const x = static_cast<const uint16_t*>(input) + order[k] * problem.dim;
      const Real by = functions.widen(x, problem.dim, power, writable_row(k));
      if (problem.normalize) scale[k] = 1 / by;
    }
  }

  bool embed_row(int64_t k, Real unit, const Problem<Real>& problem,
                 const Functions<Real>& functions) {
    const Real* const x =
        problem.bfloat16 ? row(k) : static_cast<const Real*>(input) + order[k] * problem.dim;
    Real scale_of_x;
    const bool is_finite = functions.embed(x, problem.dim, problem.normalize, unit, writable_row(k),
                                           &scale_of_x, &norm[k]);
    scale[k] *= scale_of_x;
    if (words != nullptr) factor[k] = norm[k] > 0 ? unit / norm[k] : unit;
    return is_finite;
  }
};

// Up to so many positives are looked at one by one. Each of them may be nearly all of a softmax:
// the loss then is the difference of two equal numbers, and so is its gradient, which must be
// rounded alike and taken before anything else is added.
constexpr int64_t kFewPositives = 8;

template <typename Real>
class ClassSums;

// What the first pass over all pairs of tiles leaves to those that follow: similarities, or 2^x.
template <typename Real>
class KeptTiles {
 public:
  KeptTiles(Kept kind, int64_t row_tiles, int64_t col_tiles, int64_t tile)
      : kind(kind),
        col_tiles_(col_tiles),
        size_(tile * kScratchStride),
        memory_(row_tiles * col_tiles * size_) {}

  Real* of(int64_t i, int64_t j) { return memory_.get() + (i * col_tiles_ + j) * size_; }

  const Kept kind;
  bool filled = false;

 private:
  const int64_t col_tiles_, size_;
  Array<Real> memory_;
};

// What a thread has for the pair of tiles that it computes.
template <typename Real>
struct PairMemory {
  Real* tile;
  Real* panels;      // of the columns, where no side has them
  Real* codes;       // of the pairs' weights for their rows, then for their columns
  double* products;  // of soft labels, and two tiles of these
};

// Up to so many tiles of anchors, panels of the columns are made in every pass: a second copy of
// many columns takes longer to write and read than to make again.
constexpr int64_t kFewTiles = 2;

// Both sides of a problem, and what their tiles have in common.
template <typename Real>
struct Sides {
  typedef std::shared_ptr<const Side<Real>> Shared;

  Sides(const Problem<Real>& problem, const Isa& isa, const Team& team)
      : Sides(problem, functions_for(problem, isa), isa.f64, team, nullptr, nullptr) {}

  // The other way of a symmetric problem, with the same embeddings.
  Sides mirrored() const {
    return Sides(supcon::mirrored(problem), functions, doubles, team, col_side, row_side);
  }

  // The pair of tiles I and J, without what a pass writes or packs.
  TilePair<Real> pair(int64_t i, int64_t j) const {
    TilePair<Real> t = {};
    t.num_rows = rows.tile_size(i);
    t.num_cols = cols.tile_size(j);
    t.dim = rows.dim;
    t.stride = rows.stride;
    t.a = rows.row(rows.tile_begin(i));
    t.b = cols.row(cols.tile_begin(j));
    if (cols.packed != nullptr) t.b_packed = cols.packed_tile(j);
    t.triangle = square && i == j;
    t.square = both_anchor;
    t.shifted = shifted;
    if (multiplies_bfloat16()) t.bfloat16 = words(rows.tile_begin(i), cols.tile_begin(j));
    return t;
  }

  // Similarities are computed once and not in every pass, of so few pairs that caches hold them;
  // and so is 2^x, where every pass is made of it.
  void keep_similarities() {
    constexpr int64_t kMaxPairs = 1 << 18;
    if (rows.size * cols.size > kMaxPairs || multiplies_bfloat16()) return;
    if (problem.mask.data != nullptr || problem.row_soft.data != nullptr) return;
    const bool powers = !shifted && problem.denominator != Denominator::kOnePositive;
    kept_ = std::make_unique<KeptTiles<Real>>(powers ? Kept::kPowers : Kept::kExponents,
                                              rows.num_tiles, cols.num_tiles, rows.tile);
  }
  void set_memory(int64_t i, int64_t j, const PairMemory<Real>& of_thread,
                  TilePair<Real>* t) const {
    t->scratch = kept_ ? kept_->of(i, j) : of_thread.tile;
    if (kept_ && kept_->filled)
      t->kept = kept_->kind;
    else if (kept_)
      t->keeps = kept_->kind;
    if (packs_in_passes() && t->kept == Kept::kNothing) pack(of_thread.panels, t);
  }
  // To be called after a pass over all pairs.
  void have_kept() const {
    if (kept_) kept_->filled = true;
  }

  // Whether a tile's columns are packed when they are multiplied: few tiles of anchors meet them.
  bool packs_in_passes() const { return cols.packed == nullptr && cols.words == nullptr; }

  // Whether tiles are multiplied in bfloat16. What H holds of a positive, less what it attracts, is
  // then rounded once: all positives are looked at one by one.
  bool multiplies_bfloat16() const { return functions.pack_bfloat16 != nullptr; }

  // The anchors: the rows and, behind them, columns that are anchors and no rows. Padded.
  int64_t num_anchors() const { return rows.padded + (problem.symmetric ? cols.padded : 0); }
  // Of the first column among the anchors, where columns are.
  int64_t first_col() const { return square ? 0 : rows.padded; }

  // Numbers of the pair's rows and columns in an array over the anchors.
  PerLine<Real> lines(const std::vector<Real>& of_anchors, int64_t i, int64_t j) const {
    return {of_anchors.data() + rows.tile_begin(i),
            both_anchor ? of_anchors.data() + first_col() + cols.tile_begin(j) : nullptr};
  }

  // Classes of the pair's rows and columns; null where they share none.
  PerLine<Class<Real>> classes(int64_t i, int64_t j) const {
    const Class<Real>* row = row_class.data() + rows.tile_begin(i);
    const Class<Real>* col = (square ? row_class : col_class).data() + cols.tile_begin(j);
    const bool apart = row[rows.tile_size(i) - 1] < col[0] || col[cols.tile_size(j) - 1] < row[0];
    return apart ? PerLine<Class<Real>>{nullptr, nullptr} : PerLine<Class<Real>>{row, col};
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
    return square ? of_rows : segment_of(cols, of_rows.label);
  }

  // Whether the columns of a class are few, or its rows where they are contrasts, too, given its
  // segment of rows or of columns.
  bool few_positives(const Segment& segment, bool of_cols = false) const {
    const Segment columns = of_cols ? segment : cols_of(segment);
    if (columns.size() <= kFewPositives || !problem.symmetric)
      return columns.size() <= kFewPositives;
    return segment_of(rows, segment.label).size() <= kFewPositives;
  }

  // Column own_offset() + i is row i itself, in the order of the input; -1: no such column.
  int64_t own_offset() const { return square ? 0 : problem.self_offset; }

  // Sorted position of the column that sorted row k is itself; -1: none.
  int64_t own(int64_t k) const { return square ? k : own_col.empty() ? -1 : own_col[k]; }

  // Sorted position of the row that sorted column j is itself; -1: none.
  int64_t row_of(int64_t j) const {
    if (square) return j;
    const int64_t i = cols.order[j] - problem.self_offset;
    return problem.self_offset < 0 || i < 0 || i >= problem.num_rows ? -1 : rows.position[i];
  }

  const Problem<Real> problem;
  const Functions<Real>& functions;
  const Functions<double>& doubles;
  const Team& team;
  const bool square;
  const bool both_anchor;  // columns are anchors, as rows or of their own
  const Shared row_side, col_side;
  const Side<Real>&rows, &cols;
  const Schedule schedule;
  const bool shifted;  // sums of 2^x need a shift for each row and column
  const bool finite;
  // Of sorted rows and columns: ascending numbers, equal where labels are. Padded to whole panels.
  std::vector<Class<Real>> row_class, col_class;
  std::vector<int64_t> own_col;  // sorted row -> sorted column that it is itself, in rectangles
  mutable std::shared_ptr<const ClassSums<Real>> col_sums;  // see sums_of_cols()

 private:
  std::unique_ptr<KeptTiles<Real>> kept_;

  Sides(const Problem<Real>& problem, const Functions<Real>& functions,
        const Functions<double>& doubles, const Team& team, Shared of_rows, Shared of_cols)
      : problem(problem),
        functions(functions),
        doubles(doubles),
        team(team),
        square(problem.square),
        both_anchor(square || problem.symmetric),
        row_side(of_rows ? of_rows
                         : std::make_shared<Side<Real>>(SideInput{problem.rows, problem.row_labels,
                                                                  problem.num_rows, square},
                                                        problem, functions, team)),
        col_side(of_cols  ? of_cols
                 : square ? row_side
                          : std::make_shared<Side<Real>>(
                                SideInput{problem.cols, problem.col_labels, problem.num_cols,
                                          row_side->num_tiles > kFewTiles},
                                problem, functions, team)),
        rows(*row_side),
        cols(*col_side),
        schedule(rows.num_tiles, cols.num_tiles, square),
        shifted(!sums_are_safe()),
        finite(rows.finite && cols.finite) {
    find_own();
    number_classes();
  }

  void pack(Real* panels, TilePair<Real>* t) const {
    for (int k = 0; k < t->num_cols; k += cols.panel)
      functions.pack(t->b + k * t->stride, t->stride, t->dim, panels + k * t->dim);
    t->b_packed = panels;
  }

  static Segment segment_of(const Side<Real>& side, int64_t label) {
    const auto before = [](const Segment& s, int64_t label) { return s.label < label; };
    const auto found = std::lower_bound(side.segments.begin(), side.segments.end(), label, before);
    if (found == side.segments.end() || found->label != label) return {0, 0, 0};
    return *found;
  }

  // Exponents of unit rows reach from -log2(e) / tau to log2(e) / tau: half of the range of Real
  // for them leaves the other half for the weights that divide by their sums.
  bool sums_are_safe() const {
    const double reach = kLog2E / problem.temperature;
    return problem.normalize && 2 * reach < std::numeric_limits<Real>::max_exponent - 2.5;
  }

  static const Functions<Real>& functions_for(const Problem<Real>& problem, const Isa& isa) {
    if constexpr (std::is_same_v<Real, float>)
      if (problem.bfloat16 && problem.dim >= 16 && problem.row_soft.data == nullptr &&
          problem.mask.data == nullptr && isa.bfloat16 != nullptr)
        return *isa.bfloat16;
    return isa.functions(Real());
  }

  Bfloat16Tiles<Real> words(int64_t row, int64_t col) const {
    return {rows.packed_words(row),
            cols.packed_words(col),
            rows.paired_words(row),
            cols.paired_words(col),
            {rows.factor.data() + row, cols.factor.data() + col}};
  }

  void number_classes() {
    row_class.assign(rows.padded, -1);
    if (!square) col_class.assign(cols.padded, -1);
    auto col = cols.segments.begin();
    Class<Real> number = 0;
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

}  // namespace supcon
