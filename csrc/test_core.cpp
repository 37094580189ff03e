// The core by itself, on std::thread, for the sanitizers: every instruction set of this CPU against
// loops over pairs, the same bits from any number of threads, several calls at once.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>
#include <thread>
#include <vector>

// The vector functions are tested as the baseline has them; the other sets compile the same source.
#define SUPCON_VECTOR_BYTES 16
#include "parallel.h"
#include "schedule.h"
#include "test_loops.h"
#include "vectors.h"

namespace {

using supcon::Isa;

void run_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  for (int k = 1; k < threads; ++k) others.emplace_back(body, context);
  body(context);
  for (std::thread& other : others) other.join();
}

const Variant kVariants[] = {
    {Summation::kOut, Denominator::kAll},           {Summation::kIn, Denominator::kAll},
    {Summation::kOut, Denominator::kOnePositive},   {Summation::kIn, Denominator::kOnePositive},
    {Summation::kOut, Denominator::kOnlyNegatives}, {Summation::kIn, Denominator::kOnlyNegatives},
};

// Sanitizers and emulators are slow: they may take every third variant, in turn, of each shape.
#ifdef SUPCON_TEST_EVERY
constexpr int kEvery = SUPCON_TEST_EVERY;
#else
constexpr int kEvery = 1;
#endif

const Shape kShapes[] = {
    {"several tiles", 410, 0, 37, -1, 0.1, true},
    {"cold", 150, 0, 33, -1, 0.005, true},
    {"unnormalised", 97, 0, 5, -1, 1.0, false},
    {"two features", 40, 0, 2, -1, 0.1, true},
    {"single row", 1, 0, 3, -1, 0.1, true},
    {"no row", 0, 0, 3, -1, 0.1, true},
    {"wide memory", 70, 430, 20, -1, 0.1, true},
    {"memory with the rows in it", 70, 230, 20, 9, 0.1, true},
    {"cold memory with the rows in it", 210, 230, 20, 9, 0.01, true},
    {"no memory", 7, -1, 4, -1, 0.1, true},
    {"soft labels", 150, 0, 19, -1, 0.1, true, 3},
    {"soft memory", 40, 130, 9, -1, 0.5, true, 2},
    {"soft memory with the rows in it", 70, 90, 20, 9, 0.1, true, 5},
    {"soft labels of many classes", 66, 0, 5, -1, 1.0, true, 900},
    {"mask", 150, 0, 19, -1, 0.1, true, 0, true},
    {"cold mask", 70, 0, 19, -1, 0.01, true, 0, true},
    {"masked memory with the rows in it", 70, 130, 20, 9, 0.1, true, 0, true},
};

// Too large for loops: the tiles that small problems do not have.
const Shape kLargeShapes[] = {
    {"larger tiles", 900, 0, 2, -1, 0.1, true},
    {"largest tiles", 1700, 0, 2, -1, 0.1, true},
};

double one(int64_t) { return 1; }

// At once, in one entry into the core, gradients are of the sum of the losses.
template <typename Real>
Result by_core(const Data<Real>& data, const Isa& isa, int threads,
               double (*upstream_of)(int64_t) = upstream) {
  const int64_t n = data.shape.rows, m = data.m, dim = data.shape.dim;
  const supcon::Team team = {threads, run_threads};
  std::vector<Real> loss(n), total(1), counts(2), weight(n), rows(n * dim), cols(m * dim);
  std::vector<double> lse(n), normalizer(n), softmax_weight(n);
  const supcon::RowStatistics statistics = {lse.data(), normalizer.data(), softmax_weight.data()};
  Result result;
  const supcon::Results<Real> results = {loss.data(), total.data(), counts.data(), statistics};
  for (int64_t i = 0; i < n; ++i) weight[i] = static_cast<Real>(upstream_of(i));
  const supcon::Gradients<Real> gradients = {weight.data(), statistics, rows.data(),
                                             data.square() ? nullptr : cols.data(),
                                             &result.temperature};
  supcon::forward<Real>(data.problem(), isa, team, results);
  supcon::backward<Real>(data.problem(), isa, team, gradients);
  result.total = total[0];
  result.loss.assign(loss.begin(), loss.end());
  result.rows.assign(rows.begin(), rows.end());
  if (!data.square()) result.cols.assign(cols.begin(), cols.end());
  return result;
}

// As by_core, of the sum of the losses, in one entry.
template <typename Real>
Result at_once(const Data<Real>& data, const Isa& isa, int threads) {
  std::vector<Real> rows(data.shape.rows * data.shape.dim), cols(data.m * data.shape.dim);
  Result result;
  supcon::Gradients<Real> gradients = {};
  gradients.rows = rows.data();
  gradients.cols = data.square() ? nullptr : cols.data();
  gradients.temperature = &result.temperature;
  Real total;
  supcon::loss_and_gradients<Real>(data.problem(), isa, {threads, run_threads},
                                   supcon::Reduction::kSum, &total, gradients);
  result.total = total;
  result.rows.assign(rows.begin(), rows.end());
  if (!data.square()) result.cols.assign(cols.begin(), cols.end());
  return result;
}

int num_passed = 0, num_failed = 0;

void expect(bool holds, const char* what, const Isa& isa, const Shape& shape) {
  ++(holds ? num_passed : num_failed);
  if (!holds) std::printf("FAILED: %s, %s, %s\n", what, isa.name, shape.name);
}

bool near(const std::vector<double>& got, const std::vector<double>& expected, double tolerance) {
  if (got.size() != expected.size()) return false;
  double largest = 1e-30, error = 0;
  for (size_t k = 0; k < got.size(); ++k) {
    largest = std::max(largest, std::abs(expected[k]));
    error = std::max(error, std::abs(got[k] - expected[k]));
    if (!(std::abs(got[k]) < 1e300)) return false;
  }
  return error <= tolerance * std::max(largest, 1.0);
}

bool same(const Result& a, const Result& b) {
  return a.loss == b.loss && a.total == b.total && a.rows == b.rows && a.cols == b.cols &&
         a.temperature == b.temperature;
}

template <typename Real>
void compare(const Isa& isa, const Data<Real>& data, double tolerance, double of_gradients) {
  const Shape& shape = data.shape;
  Data<double> exact(shape, data.variant);  // of the same rounded inputs
  exact.rows.assign(data.rows.begin(), data.rows.end());
  exact.cols.assign(data.cols.begin(), data.cols.end());
  const Result expected = by_loops(exact), alone = by_core(data, isa, 1);
  // Similarities carry the rounding of unit rows times their size; a gradient that cancels is
  // measured by the size of its terms, which is about 1.
  const double reach = std::max(1.0, 1 / shape.temperature), bound = of_gradients * reach;
  expect(near(alone.loss, expected.loss, tolerance * reach), "loss", isa, shape);
  expect(near(alone.rows, expected.rows, bound), "gradient of rows", isa, shape);
  expect(near(alone.cols, expected.cols, bound), "gradient of columns", isa, shape);
  expect(near({alone.temperature}, {expected.temperature}, bound), "temperature", isa, shape);
  for (int threads : {2, 3})
    expect(same(alone, by_core(data, isa, threads)), "bits of several threads", isa, shape);
  Result apart = by_core(data, isa, 2, one);
  apart.loss.clear();
  expect(same(apart, at_once(data, isa, 2)), "bits of one entry", isa, shape);
}

template <typename Real>
void test(const Isa& isa, const Shape& shape, Variant variant, double tolerance) {
  compare(isa, Data<Real>(shape, variant), tolerance, tolerance);
}

// Similarities of bfloat16 are exact in float32, also where it is multiplied as it is; H is not.
void test_bfloat16(const Isa& isa, const Shape& shape, Variant variant) {
  Data<float> data(shape, variant);
  data.to_bfloat16();
  compare(isa, data, 2e-6, isa.bfloat16 == nullptr ? 2e-6 : 2e-3);
}

// The results of both ways of a problem, and the gradients of the sum of both sides' losses.
template <typename Real>
struct BothWays {
  BothWays(int64_t n, int64_t m, int64_t dim)
      : loss(n), col_loss(m), rows(n * dim), cols(m * dim), numbers(3 * n), col_numbers(3 * m) {}

  supcon::Results<Real> results() { return {loss.data(), &sums[0], &sums[1], statistics()}; }
  supcon::Results<Real> col_results() {
    return {col_loss.data(), &sums[3], &sums[4], col_statistics()};
  }
  supcon::RowStatistics statistics() { return of(&numbers); }
  supcon::RowStatistics col_statistics() { return of(&col_numbers); }
  bool operator==(const BothWays& other) const {
    return loss == other.loss && col_loss == other.col_loss && rows == other.rows &&
           cols == other.cols && temperature == other.temperature;
  }

  std::vector<Real> loss, col_loss, rows, cols;
  double temperature = 0;

 private:
  static supcon::RowStatistics of(std::vector<double>* numbers) {
    const size_t count = numbers->size() / 3;
    return {numbers->data(), numbers->data() + count, numbers->data() + 2 * count};
  }

  Real sums[6];
  std::vector<double> numbers, col_numbers;
};

// The losses of columns as a caller makes them, who has added up sums.
template <typename Real>
std::vector<Real> losses_of(const supcon::Problem<Real>& problem, const supcon::Sums& sums) {
  const bool is_mean = problem.summation == supcon::Summation::kOut;
  std::vector<Real> losses(problem.num_cols);
  for (int64_t j = 0; j < problem.num_cols; ++j) {
    const double total = sums.total_weight[j];
    const bool is_probability = problem.denominator == supcon::Denominator::kOnePositive;
    if (total == 0 || (std::isinf(sums.lse[j]) && !is_probability)) continue;
    const double logit =
        is_mean ? sums.of_positives[j] / total : sums.of_positives[j] - std::log(total);
    losses[j] = static_cast<Real>((is_probability ? 0.0 : sums.lse[j]) - logit);
  }
  return losses;
}

// A problem whose columns are anchors, too, is two problems of one way each.
template <typename Real>
void test_both_ways(const Isa& isa, const Data<Real>& data, double tolerance, double of_gradients) {
  const Shape& shape = data.shape;
  const int64_t n = shape.rows, m = data.m, dim = shape.dim;
  supcon::Problem<Real> problem = data.problem();
  problem.self_offset = -1;
  const supcon::Problem<Real> turned = supcon::mirrored(problem);
  std::vector<Real> weight(std::max(n, m));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<Real>(upstream(i));
  const Real* const w = weight.data();

  const supcon::Team alone = {1, run_threads};
  BothWays<Real> expected(n, m, dim), other(n, m, dim);
  supcon::forward<Real>(problem, isa, alone, expected.results());
  supcon::forward<Real>(turned, isa, alone, expected.col_results());
  supcon::backward<Real>(problem, isa, alone,
                         {w, expected.statistics(), expected.rows.data(), expected.cols.data(),
                          &expected.temperature});
  supcon::backward<Real>(
      turned, isa, alone,
      {w, expected.col_statistics(), other.cols.data(), other.rows.data(), &other.temperature});
  expected.temperature += other.temperature;
  for (size_t k = 0; k < other.rows.size(); ++k) expected.rows[k] += other.rows[k];
  for (size_t k = 0; k < other.cols.size(); ++k) expected.cols[k] += other.cols[k];

  const double reach = std::max(1.0, 1 / shape.temperature), bound = of_gradients * reach;
  const auto is_near = [&](const char* what, const std::vector<Real>& got,
                           const std::vector<Real>& want, double bound) {
    expect(near({got.begin(), got.end()}, {want.begin(), want.end()}, bound), what, isa, shape);
  };
  if (!shape.masked) {  // columns of another rank
    supcon::backward<Real>(problem, isa, alone,
                           {w, expected.statistics(), other.rows.data(), nullptr,
                            &other.temperature, w, expected.col_statistics()});
    is_near("gradient of both sides' losses", other.rows, expected.rows, bound);
    expect(near({other.temperature}, {expected.temperature / 2}, bound), "half the temperature",
           isa, shape);
  }

  problem.symmetric = true;
  const auto in_one_call = [&](int threads) {
    const supcon::Team team = {threads, run_threads};
    BothWays<Real> found(n, m, dim);
    const supcon::Results<Real> of_cols = found.col_results();
    supcon::forward<Real>(problem, isa, team, found.results(), {&of_cols, nullptr});
    supcon::backward<Real>(problem, isa, team,
                           {w, found.statistics(), found.rows.data(), found.cols.data(),
                            &found.temperature, w, found.col_statistics()});
    return found;
  };
  const BothWays<Real> together = in_one_call(1);
  is_near("losses of rows", together.loss, expected.loss, tolerance * reach);
  is_near("losses of columns", together.col_loss, expected.col_loss, tolerance * reach);
  is_near("gradient of rows, both ways", together.rows, expected.rows, bound);
  is_near("gradient of columns, both ways", together.cols, expected.cols, bound);
  // A sum over the anchors of both sides, whose terms cancel.
  expect(near({together.temperature}, {expected.temperature}, 2 * bound), "temperature, both ways",
         isa, shape);
  expect(together == in_one_call(3), "bits of several threads, both ways", isa, shape);

  std::vector<double> numbers(4 * m), negatives;
  double* const first = numbers.data();
  const supcon::Sums sums = {first, first + m, first + 2 * m, first + 3 * m};
  BothWays<Real> with_sums(n, m, dim);
  if (problem.denominator == supcon::Denominator::kOnePositive) {
    supcon::Problem<Real> before = problem;
    before.denominator = supcon::Denominator::kOnlyNegatives;
    supcon::forward<Real>(before, isa, alone, with_sums.results(), {nullptr, &sums});
    negatives.assign(sums.lse, sums.lse + m);
  }
  supcon::forward<Real>(problem, isa, alone, with_sums.results(),
                        {nullptr, &sums, negatives.empty() ? nullptr : negatives.data()});
  expect(with_sums.loss == together.loss, "bits of rows beside sums of columns", isa, shape);
  is_near("losses of columns by their sums", losses_of(problem, sums), expected.col_loss,
          tolerance * reach);
  if (negatives.empty()) return;
  const bool is_mean = problem.summation == supcon::Summation::kOut;
  std::vector<Real> weights(m), want(m);
  for (int64_t j = 0; j < m; ++j) {
    if (sums.total_weight[j] == 0) continue;
    weights[j] = static_cast<Real>(is_mean ? sums.rest[j] / sums.total_weight[j]
                                           : std::exp(sums.rest[j] - sums.of_positives[j]));
    want[j] = static_cast<Real>(expected.col_statistics().softmax_weight[j]);
  }
  is_near("softmax weights of columns by their sums", weights, want, tolerance * reach);
}

// In float32 as in float64, and the same bits from several threads.
void test_large(const Isa& isa, const Shape& shape, Variant variant) {
  const Data<float> data(shape, variant);
  Data<double> exact(shape, variant);
  exact.rows.assign(data.rows.begin(), data.rows.end());
  const Result alone = by_core(data, isa, 1), expected = by_core(exact, isa, 1);
  const double bound = 2e-6 / shape.temperature;
  expect(near(alone.loss, expected.loss, bound), "loss", isa, shape);
  expect(near(alone.rows, expected.rows, bound), "gradient of rows", isa, shape);
  expect(same(alone, by_core(data, isa, 3)), "bits of several threads", isa, shape);
}

// Every pair of tiles meets once, no two jobs add to a tile at the same time, and each tile meets
// the others in the same order whatever the number of threads.
void test_schedule(int64_t row_tiles, int64_t col_tiles, bool square) {
  typedef std::vector<std::vector<int64_t>> Meetings;
  const auto meetings = [&](int threads) {
    Meetings of(row_tiles + (square ? 0 : col_tiles));
    const supcon::Schedule schedule(row_tiles, col_tiles, square);
    struct Worker {
      void compute(int64_t row, int64_t col) { i = row, j = col; }
      // Leaves -1, which is to come once, and first.
      void begin_rows(int64_t row, int64_t) { begin(row); }
      void begin_cols(int64_t col, int64_t) { begin(square ? col : row_tiles + col); }
      void begin(int64_t tile) { of[tile].push_back(-1); }
      void add_to_rows(int64_t) { of[i].push_back(j); }
      void add_to_cols(int64_t) {
        if (!square || i != j) of[square ? j : row_tiles + j].push_back(i);
      }
      Meetings& of;
      const int64_t row_tiles;
      const bool square;
      int64_t i, j;
    };
    schedule.run({threads, run_threads}, false, true,
                 [&] { return Worker{of, row_tiles, square, 0, 0}; });
    return of;
  };
  const Meetings alone = meetings(1);
  bool once = true;
  for (int64_t i = 0; i < row_tiles; ++i) {
    std::vector<int64_t> others(alone[i]);
    once &= col_tiles == 0 || (!others.empty() && others.front() == -1);
    if (once && col_tiles > 0) others.erase(others.begin());
    std::sort(others.begin(), others.end());
    once &= static_cast<int64_t>(others.size()) == col_tiles;
    for (size_t j = 0; j < others.size(); ++j) once &= others[j] == static_cast<int64_t>(j);
  }
  const Isa& isa = *supcon::available_isas().back();
  expect(once, "every pair of tiles once", isa, kShapes[0]);
  expect(alone == meetings(3), "the order of the tiles", isa, kShapes[0]);
}

void test_exceptions() {
  bool caught = false;
  try {
    supcon::parallel_for({3, run_threads}, 100, [](int64_t k) {
      if (k % 10 == 7) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  expect(caught, "an exception on another thread", *supcon::available_isas().back(), kShapes[0]);
}

void test_concurrent_calls(const Isa& isa) {
  const Data<float> data(kShapes[0], kVariants[0]);
  const Result expected = by_core(data, isa, 1);
  std::vector<Result> results(4);
  std::vector<std::thread> callers;
  for (Result& result : results) callers.emplace_back([&] { result = by_core(data, isa, 2); });
  for (std::thread& caller : callers) caller.join();
  for (const Result& result : results)
    expect(same(expected, result), "concurrent calls", isa, kShapes[0]);
}

// Largest relative errors of 2^x, in epsilons, and of log2(q), over the whole range.
template <typename Real>
void test_functions(Real lowest, double epsilons, double tolerance) {
  typedef typename supcon::Simd<Real>::V V;
  double exp2_error = 0, log_error = 0;
  for (int k = 0; k < 200000; ++k) {
    const Real x = lowest * static_cast<Real>(k) / 200000;
    const V powers[] = {supcon::exp2_or_zero<Real>(supcon::splat<V>(x)),
                        supcon::exp2_in_range<Real>(supcon::splat<V>(-x))};
    for (int sign : {0, 1}) {
      const long double exact = std::exp2(static_cast<long double>(sign ? -x : x));
      const double error = static_cast<double>((powers[sign][0] - exact) / exact);
      exp2_error = std::max(exp2_error, std::abs(error) / std::numeric_limits<Real>::epsilon());
    }
    const Real d = x + 40;
    const V log = supcon::Logistic<Real>(supcon::splat<V>(d)).log2_q();
    const long double q = -std::log1p(std::exp2(static_cast<long double>(d))) / std::log(2.0L);
    log_error = std::max(log_error, std::abs(static_cast<double>((log[0] - q) / q)));
  }
  std::printf("2^x: %.2f epsilons; log2(q): %.1e\n", exp2_error, log_error);
  const Isa& isa = *supcon::available_isas().back();
  expect(exp2_error < epsilons, "2^x", isa, kShapes[0]);
  expect(log_error < tolerance, "log2(q)", isa, kShapes[0]);
}

}  // namespace

int main() {
  test_functions<float>(-125.0f, 1, 1e-6);
  test_functions<double>(-1021.0, 2, 1e-14);
  for (int64_t tiles = 0; tiles <= 60; ++tiles) {
    test_schedule(tiles, tiles, true);
    test_schedule(tiles, 60 - tiles, false);
  }
  test_schedule(200, 200, true);
  test_schedule(3, 200, false);
  test_exceptions();
  for (const Isa* isa : supcon::available_isas()) {
    int turn = 0;
    for (const Shape& shape : kShapes) {
      ++turn;
      for (Variant variant : kVariants) {
        if (turn++ % kEvery != 0) continue;
        test<float>(*isa, shape, variant, 2e-6);
        test<double>(*isa, shape, variant, 1e-14);
        if (!shape.masked) test_bfloat16(*isa, shape, variant);
        if (shape.cols == 0) continue;
        Data<float> data(shape, variant);
        test_both_ways(*isa, data, 2e-6, 4e-6);
        test_both_ways(*isa, Data<double>(shape, variant), 1e-14, 2e-14);
        if (shape.masked) continue;
        data.to_bfloat16();
        test_both_ways(*isa, data, 2e-6, isa->bfloat16 == nullptr ? 4e-6 : 4e-3);
      }
    }
    for (const Shape& shape : kLargeShapes)
      for (Variant variant : {kVariants[0], kVariants[3]}) test_large(*isa, shape, variant);
    test_concurrent_calls(*isa);
  }
  std::printf("%d passed, %d failed\n", num_passed, num_failed);
  return num_failed > 0;
}
