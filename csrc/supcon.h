// The contract of the core: what a call is given and gives back, and what the core asks of the code
// that is compiled once for each instruction set. Plain C++17: no torch, no Python.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <vector>

namespace supcon {

// Changes whenever the Python module's functions take or return something else.
constexpr int kInterface = 2;

enum class Summation { kOut, kIn };
enum class Denominator { kAll, kOnePositive, kOnlyNegatives };

// A call: N rows (anchors) against M columns (contrasts), or against each other where square.
// Labels are integers; equal ones are positives, `ignore_label` takes no part. Soft labels, if any,
// say instead by their products which pairs are positives, with which weight; then no label is
// ignored, summation is kOut and denominator kAll.
template <typename Real>
struct Problem {
  const Real* rows;           // (N, D), contiguous
  const Real* cols;           // (M, D), contiguous; unused where square
  const int64_t* row_labels;  // (N,)
  const int64_t* col_labels;  // (M,); unused where square
  const double* row_soft;     // (N, C), or null
  const double* col_soft;     // (M, C)
  int64_t num_soft;           // C
  bool square;                // the columns are the rows
  int64_t num_rows;
  int64_t num_cols;
  int64_t dim;
  int64_t ignore_label;
  int64_t self_offset;  // column self_offset + i is row i itself; -1: no such column
  double temperature;
  bool normalize;
  Summation summation;
  Denominator denominator;
};

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

// What the backward is given and writes; a null gradient is not wanted.
template <typename Real>
struct Gradients {
  const Real* loss;          // (N,) gradient of each row's loss
  RowStatistics statistics;  // from the forward
  Real* rows;                // (N, D)
  Real* cols;                // (M, D)
  double* temperature;       // one number
  // Of columns that are anchors, too, and no rows; else null. The rows' gradient is then of their
  // losses as well, and the temperature's is half of the sum of both.
  const Real* col_loss = nullptr;     // (M,) gradient of each column's loss
  RowStatistics col_statistics = {};  // from a forward with them as rows
};

struct Isa;

template <typename Real>
void forward(const Problem<Real>& problem, const Isa& isa, const Team& team,
             const Results<Real>& out);

template <typename Real>
void backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
              const Gradients<Real>& out);

// Both, with one preparation: the gradients are of the total, over *count where that is given. It
// may be one of the counts that the forward writes. `gradients` brings what is to be written alone.
template <typename Real>
void forward_and_backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
                          const Results<Real>& results, const Real* count,
                          Gradients<Real> gradients);

// Which pairs a pass looks at.
enum class Pairs { kAll, kNegatives, kPositives };

// What a forward pass folds each pair into. With x the pair's exponent, l the lse of the row (or of
// the column) and q = 1 / (1 + 2^(l - x)), the probability of a positive among the negatives:
enum class Term {
  kMaximum,    // the largest x
  kExp,        // the sum of 2^(x - shift)
  kLogQ,       // the sum of log2(q)
  kQ,          // the sum of q 2^-shift
  kNotQ,       // the sum of 1 - q
  kQTimesNotQ  // the sum of q 2^-shift (1 - q)
};

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
  Pairs pairs;
  bool shifted;   // exponents are so large that sums of 2^x need a shift for each row and column
  Real* scratch;  // (kMaxTile, kScratchStride)
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
};

constexpr int kMaxTile = 192;
constexpr int kMaxPanel = 32;
constexpr int kScratchStride = kMaxTile + 16;  // no power of two: rows spread over the cache's sets

// The functions that an instruction set's file provides.
template <typename Real>
struct Functions {
  int panel;  // columns of the register kernel
  void (*forward)(const TilePair<Real>&);
  void (*weigh)(const TilePair<Real>&);        // G + G^T, into the scratch tile
  void (*add_to_rows)(const TilePair<Real>&);  // grad_a += scratch b
  void (*add_to_cols)(const TilePair<Real>&);  // grad_b += scratch^T a
  // out = x, normalised if asked, times unit; x = out / unit * norm * scale. Whether all is finite.
  bool (*embed)(const Real* x, int64_t dim, bool normalize, Real unit, Real* out, Real* scale,
                Real* norm);
  // A panel of rows transposed; dim is a multiple of the panel.
  void (*pack)(const Real* rows, ptrdiff_t stride, int64_t dim, Real* packed);
  // The sum of the products of a row with `count` columns, each rounded as tiles round it.
  double (*dots_of_tile)(const Real* row, const Real* cols, ptrdiff_t stride, int64_t count,
                         int64_t dim);
  double (*dot)(const Real* a, const Real* b, int64_t dim);
  double (*dot_sum)(const Real* a, const double* sum, int64_t dim);
  // sum += weight x
  void (*add)(double weight, const Real* x, int64_t dim, double* sum);
  // grad -= weight (sum - own_weight own), the product in float64; own may be null
  void (*attract)(double weight, const double* sum, double own_weight, const Real* own, int64_t dim,
                  Real* grad);
  // out = (grad - along row) factor / scale
  void (*finish)(const Real* grad, Real along, const Real* row, Real factor, Real scale,
                 int64_t dim, Real* out);
  double (*multiply_in_registers)(int64_t k_size, Real* out);
};

struct Isa {
  const char* name;
  Functions<float> f32;
  Functions<double> f64;

  const Functions<float>& functions(float) const { return f32; }
  const Functions<double>& functions(double) const { return f64; }
};

// Floating-point operations a second that all threads do with registers alone.
template <typename Real>
double peak_flops(const Isa& isa, const Team& team);

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
