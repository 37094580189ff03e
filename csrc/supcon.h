// The contract of the core: what a call is given and gives back, and what the core asks of the code
// that is compiled once for each instruction set. Plain C++17: no torch, no Python.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>
#include <vector>

namespace supcon {

// Changes whenever the Python module's functions take or return something else.
constexpr int kInterface = 9;

enum class Summation { kOut, kIn };
enum class Denominator { kAll, kOnePositive, kOnlyNegatives };

// The types of a mask's numbers, and of soft labels'.
enum class Element { kUint8, kInt8, kInt16, kInt32, kInt64, kHalf, kBfloat16, kFloat, kDouble };

// A matrix of the caller's, read where it is. No data: there is none.
struct Matrix {
  const void* data = nullptr;
  Element element = Element::kFloat;
  int64_t num_rows = 0, num_cols = 0;
  int64_t row_stride = 0, col_stride = 0;  // in elements
};

// A call: N rows (anchors) against M columns (contrasts), or against each other where square.
// Labels are integers; equal ones are positives, `ignore_label` takes no part. A mask, or soft
// labels, say instead what weight each pair has; then all integer labels are the same, and none is
// ignored.
template <typename Real>
struct Problem {
  const void* rows;           // (N, D), contiguous, of Real, or of bfloat16 (below)
  const void* cols;           // (M, D), contiguous; unused where square
  const int64_t* row_labels;  // (N,)
  const int64_t* col_labels;  // (M,); unused where square
  // The weight of a pair is the product of its soft labels, where there are any, or the element
  // (row modulo n, column modulo m) of the mask: > 0 a positive, 0 a negative, < 0 takes no part.
  Matrix row_soft;  // (N, C)
  Matrix col_soft;  // (M, C); unused where square
  Matrix mask;      // (n, m)
  bool square;      // the columns are the rows
  int64_t num_rows;
  int64_t num_cols;
  int64_t dim;
  int64_t ignore_label;
  int64_t self_offset;  // column self_offset + i is row i itself; -1: no such column
  double temperature;
  bool normalize;
  Summation summation;
  Denominator denominator;
  bool bfloat16 = false;  // rows and cols are bfloat16, and Real is float
  // The columns are anchors, too, whose contrasts are the rows; a mask then is (N, M).
  bool symmetric = false;
};

// The other way of a symmetric problem: its columns against its rows.
template <typename Real>
Problem<Real> mirrored(Problem<Real> problem) {
  std::swap(problem.rows, problem.cols);
  std::swap(problem.row_labels, problem.col_labels);
  std::swap(problem.row_soft, problem.col_soft);
  std::swap(problem.num_rows, problem.num_cols);
  std::swap(problem.mask.num_rows, problem.mask.num_cols);
  std::swap(problem.mask.row_stride, problem.mask.col_stride);
  return problem;
}

// Runs body(context) once on each of at most `threads` threads, in parallel. The core does
// not assume that it gets as many as it asks for.
struct Team {
  int threads;
  void (*run)(int threads, void (*body)(void* context), void* context);
};

// What the backward needs of each row besides its features. Logarithms are base 2, and float64:
// what Real would round off them is a relative error of whole rows of probabilities.
struct RowStatistics {
  double* lse;             // (N,) log-sum-exp of its denominator; of the negatives for kOnePositive
  double* normalizer;      // (N,) of its positives: their weight, or the log-sum-exp over them
  double* softmax_weight;  // (N,) weight of the softmax part of its gradient
};

// What the forward computes, in the order of the rows. A row contributes that has a positive and,
// where only negatives are below, a negative; others have loss 0 and infinite statistics.
template <typename Real>
struct Results {
  Real* loss;    // (N,) NaN after a non-finite input
  Real* total;   // the sum of the losses
  Real* counts;  // (2,) the rows that are not ignored, and those that contribute; at least 1
  RowStatistics statistics;
};

// What is known of anchors from some of their contrasts, for a caller that knows the others: with
// theirs it is added up to what all of them give. Natural logarithms.
struct Sums {
  double* lse;           // (N,) log-sum-exp of the denominator
  double* of_positives;  // (N,) sum of weight times logit; kIn: log-sum-exp of weight e^logit
  double* total_weight;  // (N,) of the positives
  // kOnePositive alone, where a logit is that of a positive's probability q against all negatives:
  double* rest;  // (N,) sum of weight (1 - q); kIn: logarithm of the sum of weight q (1 - q)
};

// What the backward is given and writes; a null gradient is not wanted.
template <typename Real>
struct Gradients {
  const Real* loss;          // (N,) gradient of each row's loss
  RowStatistics statistics;  // from the forward
  Real* rows;                // (N, D)
  Real* cols;                // (M, D)
  double* temperature;       // one number
  // Of columns that are anchors, too, and no rows; else null. Both sides' gradients are then of
  // their losses as well, and the temperature's is half of the sum of both, unless the problem is
  // symmetric.
  const Real* col_loss = nullptr;     // (M,) gradient of each column's loss
  RowStatistics col_statistics = {};  // from a forward with them as rows
};

struct Isa;

// Where the problem is symmetric, the columns as anchors have (M,) results of their own; or, where
// they have other contrasts besides these rows, sums, which for kOnePositive need the log-sum-exp
// (M,) of all negatives.
template <typename Real>
struct OfColumns {
  const Results<Real>* results = nullptr;
  const Sums* sums = nullptr;
  const double* negatives = nullptr;  // natural logarithms
};

template <typename Real>
void forward(const Problem<Real>& problem, const Isa& isa, const Team& team,
             const Results<Real>& out, const OfColumns<Real>& of_cols = {});

template <typename Real>
void backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
              const Gradients<Real>& out);

// What the anchors' losses are reduced to, and which of them are counted.
enum class Reduction { kNone, kSum, kMean, kPositiveMean };

// What the sum of the losses is divided by, given the counts of Results.
template <typename Real>
Real divisor_of(Reduction reduction, const Real* counts) {
  if (reduction == Reduction::kNone || reduction == Reduction::kSum) return 1;
  return counts[reduction == Reduction::kMean ? 0 : 1];
}

// The reduced loss and its gradients, with one preparation. `gradients` brings what is to be
// written alone.
template <typename Real>
void loss_and_gradients(const Problem<Real>& problem, const Isa& isa, const Team& team,
                        Reduction reduction, Real* loss, Gradients<Real> gradients);

// Which pairs a pass looks at.
enum class Pairs { kAll, kNegatives, kPositives };

// What a forward pass folds each pair into. With x the pair's exponent, l the lse of the row (or of
// the column) and q = 1 / (1 + 2^(l - x)), the probability of a positive among the negatives:
enum class Term {
  kMaximum,        // the largest x
  kMaximumQ,       // the largest log2(q); weighted pairs only
  kMean,           // the sum of x; weighted pairs only
  kExp,            // the sum of 2^(x - shift)
  kExpByOneShift,  // the same, where all shifts are equal; no weighted pairs
  kLogQ,           // the sum of log2(q)
  kQ,              // the sum of q 2^-shift
  kNotQ,           // the sum of 1 - q
  kQTimesNotQ      // the sum of q 2^-shift (1 - q)
};

// What the scratch tile has of every pair between passes, or between the terms of one: x, or 2^x.
enum class Kept { kNothing, kExponents, kPowers };

// How positives attract in the backward pass: the weight of the row times
enum class Attraction {
  kNone,       // nothing here; sums over each class do it elsewhere
  kOne,        // 1
  kExp,        // 2^(x - normalizer), or 2^x where nothing is shifted
  kNotQ,       // 1 - q
  kQTimesNotQ  // q 2^-normalizer (1 - q)
};

// One number for each row of a pair of tiles, and for each column where columns want it too.
template <typename T>
struct PerLine {
  const T* row;  // (num_rows,)
  const T* col;  // (padded num_cols,), zero or harmless beyond num_cols; null in rectangles
};

// Class numbers are integers as wide as Real, which vectors of both compare lane by lane.
template <typename Real>
using Class = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;

// A pair of tiles as the products in bfloat16 take it: of rows that are not normalised, times a
// power of two each. A word holds two numbers that are multiplied and added up in one step.
template <typename Real>
struct Bfloat16Tiles {
  const uint32_t* a_packed;  // (panel, dim / 2, panel width): features d and d + dim / 2 of a row
  const uint32_t* b_packed;
  const uint32_t* a_paired;  // (rows / 2, stride): rows i and i + half of a panel
  const uint32_t* b_paired;
  PerLine<Real> factor;  // times both factors, the product of two rows is their similarity
};

// Weights w of pairs, each to be taken relative to a total W of its anchor's. Their code is above 0
// for a positive, 0 for a negative, below 0 for a pair that takes no part. A positive's is w / W,
// or -log2(w / W); at least the smallest normal number, which changes neither.
struct PairWeights {
  const double* weights;
  const double* totals;
  ptrdiff_t total_stride;  // 0: all pairs are of one anchor
  int count;
  ptrdiff_t out_stride;
};

// One pair of tiles. Similarities are base-2 exponents: both sides are scaled by sqrt(log2(e)/tau).
template <typename Real>
struct TilePair {
  int num_rows;
  int num_cols;          // without padding
  ptrdiff_t dim;         // padded to whole panels
  ptrdiff_t stride;      // of a row of a, b and their gradients
  const Real* a;         // rows of the first tile
  const Real* b;         // rows of the second, zero-padded to whole panels
  const Real* b_packed;  // (panel, dim, panel width): b transposed
  bool triangle;         // the tiles are one and the same: only columns j > i
  const int32_t* own;    // column of this tile that is the row itself, or negative; null: none
  PerLine<Class<Real>> classes;  // equal ones are positives; null rows: the tiles share none
  // (num_rows, kScratchStride) weight of each pair for its row and for its column, as `encode` has
  // it; null: labels are integers. Pairs that take no part are told by their weight alone.
  PerLine<Real> pair_weights;
  Pairs pairs;
  bool shifted;   // exponents are so large that sums of 2^x need a shift for each row and column
  Real* scratch;  // (kMaxTile, kScratchStride); of bfloat16 as much again for H in words
  Kept keeps;     // what a forward leaves in the scratch tile
  Kept kept;      // what an earlier one has left there
  // Forward: a row's result is written, a column's where `square`. Backward: columns are anchors
  // where `square`.
  Term term;
  bool square;
  PerLine<Real> lse, shifts;
  Real* row_out;
  Real* col_out;  // (padded num_cols,)
  // Backward: G + G^T is the softmax part, by lse and weight, minus the attraction, by lse,
  // normalizer and pull; multiplied with each tile it is added to the other's gradient.
  Attraction attraction;
  PerLine<Real> weight, normalizer, pull;
  Real* grad_a;
  Real* grad_b;
  Bfloat16Tiles<Real> bfloat16;  // where the functions multiply it
};

constexpr int kMaxTile = 192;
constexpr int kMaxPanel = 32;
constexpr int kScratchStride = kMaxTile + 16;  // no power of two: rows spread over the cache's sets
constexpr size_t kScratch = kMaxTile * kScratchStride;

// The functions that an instruction set's file provides.
template <typename Real>
struct Functions {
  int panel;  // columns of the register kernel
  void (*forward)(const TilePair<Real>&);
  void (*weigh)(const TilePair<Real>&);        // G + G^T, into the scratch tile
  void (*add_to_rows)(const TilePair<Real>&);  // grad_a += scratch b
  void (*add_to_cols)(const TilePair<Real>&);  // grad_b += scratch^T a
  // out = x times a power of two, which is returned; given as 0: one that brings out near 1.
  Real (*widen)(const uint16_t* x, int64_t dim, Real power, Real* out);
  // out = x, normalised if asked, times unit; x = out / unit * norm * scale. Whether all is finite.
  bool (*embed)(const Real* x, int64_t dim, bool normalize, Real unit, Real* out, Real* scale,
                Real* norm);
  // A panel of rows transposed; dim is a multiple of the panel.
  void (*pack)(const Real* rows, ptrdiff_t stride, int64_t dim, Real* packed);
  // The same of rows of bfloat16, in both layouts of Bfloat16Tiles. Not null: tiles are multiplied
  // in bfloat16, and what they add to a row's gradient is times the row's factor.
  void (*pack_bfloat16)(const Real* rows, ptrdiff_t stride, int64_t dim, uint32_t* packed,
                        uint32_t* paired);
  // The sum of the similarities of row i with `count` columns from j on, each rounded as tiles
  // round it. The columns may go on in the tiles that follow.
  double (*dots_of_tile)(const TilePair<Real>& t, int i, int j, int count);
  double (*dot)(const Real* a, const Real* b, int64_t dim);
  // a (sum - own_weight own); own may be null
  double (*dot_sum)(const Real* a, const double* sum, double own_weight, const Real* own,
                    int64_t dim);
  // sum += weight x
  void (*add)(double weight, const Real* x, int64_t dim, double* sum);
  // grad -= weight (sum - own_weight own), the product in float64; own may be null
  void (*attract)(double weight, const double* sum, double own_weight, const Real* own, int64_t dim,
                  Real* grad);
  // out = (grad - along row) factor / scale
  void (*finish)(const Real* grad, Real along, const Real* row, Real factor, Real scale,
                 int64_t dim, Real* out);
  // `count` elements of a row of the matrix, in float64.
  void (*read)(const Matrix& from, int64_t row, int64_t col, int64_t count, double* out);
  // out = x factor, zero where it would be denormal, in a row of the scratch tile
  void (*scale)(const double* x, double factor, int64_t count, Real* out);
  // sum += x
  void (*accumulate)(const Real* x, int64_t count, double* sum);
  void (*encode)(const PairWeights& weights, bool logarithms, Real* out);
  double (*multiply_in_registers)(int64_t k_size, Real* out);
};

struct Isa {
  const char* name;
  Functions<float> f32;
  Functions<double> f64;
  const Functions<float>* bfloat16 = nullptr;  // null: bfloat16 is widened

  const Functions<float>& functions(float) const { return f32; }
  const Functions<double>& functions(double) const { return f64; }
};

// Floating-point operations a second that all threads do with registers alone, the best of a few
// runs of so many iterations.
template <typename Real>
double peak_flops(const Functions<Real>& functions, const Team& team, int64_t iterations);

// A pair of tiles as the schedule hands it out: which counters it waits for, at which turns. -1:
// the tile is not there, or nothing is added to it. Unless both are there nothing is computed.
struct ScheduledPair {
  int64_t row_counter, row_turn, col_counter, col_turn;
  bool is_whole;
};

// The jobs of a pass over N rows and M columns with so many threads, and their pairs, for a
// simulation of more threads than there are processors.
std::vector<std::vector<ScheduledPair>> scheduled_jobs(int64_t num_rows, int64_t num_cols,
                                                       bool square, bool to_cols, int threads);

// The instruction sets that this CPU runs, best first.
const std::vector<const Isa*>& available_isas();

}  // namespace supcon
