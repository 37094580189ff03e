// The core's entry points. docs/kernels.md describes it.

#include "supcon.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "gradients.h"
#include "parallel.h"
#include "positives.h"
#include "side.h"
#include "soft.h"
#include "statistics.h"
#include "weights.h"

namespace supcon {
namespace {

// The results of a side whose anchors do not contribute, or are not finite.
template <typename Real>
void clear_results(const Side<Real>& side, bool finite, const Results<Real>& out) {
  const int64_t n = side.position.size();
  std::fill(out.loss, out.loss + n, Real(0));
  const RowStatistics& s = out.statistics;
  for (double* of_row : {s.lse, s.normalizer, s.softmax_weight})
    std::fill(of_row, of_row + n, std::numeric_limits<double>::infinity());
  *out.total = 0;
  out.counts[0] = static_cast<Real>(std::max<int64_t>(side.size, 1));
  out.counts[1] = 1;
  if (finite) return;
  for (int64_t i : side.order) {
    *out.total = out.loss[i] = std::numeric_limits<Real>::quiet_NaN();
    s.lse[i] = s.normalizer[i] = s.softmax_weight[i] = std::numeric_limits<double>::quiet_NaN();
  }
}

// The results of a side, of which sorted row k is anchor first + k.
template <typename Real>
void write_side(const Sides<Real>& sides, const Side<Real>& side,
                const Statistics<Real>& statistics, int64_t first, const Results<Real>& out) {
  struct Part {
    double total;
    int64_t count;
  };
  std::vector<Part> parts((side.size + kRange - 1) / kRange);
  parallel_ranges(sides.team, side.size, kRange, [&](int64_t begin, int64_t end) {
    Part part = {0, 0};
    for (int64_t k = begin; k < end; ++k) {
      if (!contributes(sides.problem, statistics, first + k)) continue;
      part.total += write_results(sides.problem, statistics, first + k, side.order[k], out);
      ++part.count;
    }
    parts[begin / kRange] = part;
  });
  Part all = {0, 0};
  for (const Part& part : parts) all = {all.total + part.total, all.count + part.count};
  *out.total = static_cast<Real>(all.total);
  out.counts[1] = static_cast<Real>(std::max<int64_t>(all.count, 1));
}

// The sums of a side, of which sorted row k is anchor first + k; where `statistics` is null, not a
// number.
template <typename Real>
void write_sums(const Sides<Real>& sides, const Side<Real>& side,
                const Statistics<Real>* statistics, int64_t first, const Sums& out) {
  const bool is_mean = sides.problem.summation == Summation::kOut;
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const int64_t n = side.position.size();
  std::fill(out.lse, out.lse + n, kNothing);
  std::fill(out.of_positives, out.of_positives + n, is_mean ? 0 : kNothing);
  std::fill(out.total_weight, out.total_weight + n, 0);
  const bool has_rest = sides.problem.denominator == Denominator::kOnePositive;
  if (has_rest) std::copy(out.of_positives, out.of_positives + n, out.rest);
  for (int64_t k = 0; k < side.size; ++k) {
    const int64_t i = side.order[k];
    if (statistics == nullptr) {
      out.lse[i] = out.of_positives[i] = out.total_weight[i] =
          std::numeric_limits<double>::quiet_NaN();
      if (has_rest) out.rest[i] = out.lse[i];
      continue;
    }
    const double total = statistics->total_weight[first + k];
    out.lse[i] = statistics->lse[first + k] * kLn2;
    out.total_weight[i] = total;
    if (!(total > 0)) continue;
    out.of_positives[i] =
        (is_mean ? statistics->mean_log[first + k] * total : statistics->log_mean[first + k]) *
        kLn2;
    const double weight = statistics->softmax_weight[first + k];
    if (has_rest) out.rest[i] = is_mean ? weight * total : std::log(weight) + out.of_positives[i];
  }
}

template <typename Real>
void forward(const Sides<Real>& sides, const Results<Real>& out, const OfColumns<Real>& of_cols) {
  const bool both = sides.problem.symmetric;
  clear_results(sides.rows, sides.finite, out);
  if (of_cols.results != nullptr) clear_results(sides.cols, sides.finite, *of_cols.results);
  if (!sides.finite && of_cols.sums != nullptr)
    write_sums<Real>(sides, sides.cols, nullptr, 0, *of_cols.sums);
  if (!sides.finite) return;
  const Weights<Real> weights(sides, both);
  if (!both) {
    const Statistics<Real> statistics(weights, nullptr, nullptr);
    return write_side(sides, sides.rows, statistics, 0, out);
  }
  const Sides<Real> other_way = sides.mirrored();
  const Weights<Real> other_weights = weights.mirrored(other_way);
  const Statistics<Real> statistics(weights, &other_weights, of_cols.negatives);
  write_side(sides, sides.rows, statistics, 0, out);
  if (of_cols.results != nullptr)
    write_side(sides, sides.cols, statistics, sides.first_col(), *of_cols.results);
  if (of_cols.sums != nullptr)
    write_sums(sides, sides.cols, &statistics, sides.first_col(), *of_cols.sums);
}

template <typename Real>
void backward(const Sides<Real>& sides, const Gradients<Real>& out) {
  const Problem<Real>& problem = sides.problem;
  const Team& team = sides.team;
  const Side<Real>&rows = sides.rows, &cols = sides.cols;
  const double unit = unit_of(sides, out);
  const Weights<Real> weights(sides, out.col_loss != nullptr);
  const Upstream<Real> upstream(weights, rows, out.loss, out.statistics, unit);
  std::unique_ptr<const Upstream<Real>> apart;
  if (out.col_loss != nullptr)
    apart.reset(new Upstream<Real>(weights, cols, out.col_loss, out.col_statistics, unit));
  const Upstream<Real>* const of_cols = sides.square ? &upstream : apart.get();
  const bool wants_cols = !sides.square && out.cols != nullptr;
  const std::vector<double>* const col_pull = apart ? &apart->pull_by_class : nullptr;
  ClassPulls<Real> row_pulls(rows, sides.functions), col_pulls(cols, sides.functions);
  if (sides.finite && !all_pull_in_tiles(sides) && !weights.given())
    pull_by_classes(sides, upstream.pull_by_class, col_pull, &row_pulls,
                    sides.square ? &row_pulls
                    : wants_cols ? &col_pulls
                                 : nullptr);
  SideGradient<Real> of_row_side(rows, row_pulls, sides.schedule.copies_of_rows());
  SideGradient<Real> of_col_side(cols, col_pulls, wants_cols ? sides.schedule.copies_of_cols() : 0);
  SideGradient<Real>* const to_cols = sides.square ? &of_row_side
                                      : wants_cols ? &of_col_side
                                                   : nullptr;
  Real* const grad_rows = of_row_side.get();
  Real* const grad_cols = to_cols == nullptr ? nullptr : to_cols->get();

  const Real start = sides.finite ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
  if (!sides.finite || rows.size == 0 || cols.size == 0)  // where no pair begins a tile
    for (SideGradient<Real>* side : {&of_row_side, &of_col_side}) side->fill_with(team, start);
  if (sides.finite) {
    PairMemories<Real> memory(weights);
    sides.schedule.run(team, true, to_cols != nullptr, [&] {
      return Differentiator<Real>(weights, upstream, of_cols, &of_row_side, to_cols,
                                  memory.claim());
    });
    of_row_side.add_up(team);
    if (wants_cols) of_col_side.add_up(team);
    if (sums_soft_classes(problem))
      attract_soft(weights, upstream.pull_by_class, col_pull, grad_rows, grad_cols);
  }
  const double product = finish_side(rows, sides, grad_rows, unit, problem.num_rows, out.rows);
  // Where the rows' gradient is of both sides' losses, and so is every other rank's or row's, every
  // pair is in the gradient of both its rows.
  const bool twice = of_cols != nullptr && !problem.symmetric;
  if (out.temperature != nullptr)
    *out.temperature = -product / problem.temperature / (twice ? 2 : 1);
  if (wants_cols) finish_side(cols, sides, grad_cols, unit, problem.num_cols, out.cols);
}

}  // namespace

template <typename Real>
void forward(const Problem<Real>& problem, const Isa& isa, const Team& team,
             const Results<Real>& out, const OfColumns<Real>& of_cols) {
  forward(Sides<Real>(problem, isa, team), out, of_cols);
}

template <typename Real>
void backward(const Problem<Real>& problem, const Isa& isa, const Team& team,
              const Gradients<Real>& out) {
  backward(Sides<Real>(problem, isa, team), out);
}

template <typename Real>
void loss_and_gradients(const Problem<Real>& problem, const Isa& isa, const Team& team,
                        Reduction reduction, Real* loss, Gradients<Real> gradients) {
  const int64_t n = problem.num_rows;
  std::vector<Real> losses(n);
  std::vector<double> numbers(3 * n);
  const RowStatistics statistics = {numbers.data(), numbers.data() + n, numbers.data() + 2 * n};
  Real total, counts[2];
  Sides<Real> sides(problem, isa, team);
  sides.keep_similarities();
  forward<Real>(sides, {losses.data(), &total, counts, statistics}, {});
  const Real count = divisor_of(reduction, counts);
  *loss = total / count;
  std::fill(losses.begin(), losses.end(), 1 / count);
  gradients.loss = losses.data();
  gradients.statistics = statistics;
  backward(sides, gradients);
}

template <typename Real>
double peak_flops(const Functions<Real>& functions, const Team& team, int64_t iterations) {
  typedef std::chrono::steady_clock Clock;
  double best = 0;
  for (int repetition = 0; repetition < 5; ++repetition) {
    std::atomic<int64_t> total{0};
    const Clock::time_point start = Clock::now();
    on_all(team, [&] {
      Real values[] = {Real(1), Real(0.999), Real(1e-3), Real(0)};
      total += static_cast<int64_t>(functions.multiply_in_registers(iterations, values));
    });
    const std::chrono::duration<double> elapsed = Clock::now() - start;
    best = std::max(best, static_cast<double>(total) / elapsed.count());
  }
  return best;
}

std::vector<std::vector<ScheduledPair>> scheduled_jobs(int64_t num_rows, int64_t num_cols,
                                                       bool square, bool to_cols, int threads) {
  const auto tiles = [](int64_t n) { return (n + tile_rows(n) - 1) / tile_rows(n); };
  const Schedule schedule(tiles(num_rows), tiles(num_cols), square);
  std::vector<std::vector<ScheduledPair>> jobs(schedule.num_jobs(threads));
  for (size_t k = 0; k < jobs.size(); ++k)
    schedule.job(k, threads, schedule.copies(), [&](const Schedule::Pair& pair) {
      jobs[k].push_back({pair.to_row.counter, pair.to_row.turn, to_cols ? pair.to_col.counter : -1,
                         pair.to_col.turn, pair.is_whole()});
    });
  return jobs;
}

#define SUPCON_INSTANTIATE(Real)                                                                 \
  template double peak_flops(const Functions<Real>&, const Team&, int64_t);                      \
  template void forward(const Problem<Real>&, const Isa&, const Team&, const Results<Real>&,     \
                        const OfColumns<Real>&);                                                 \
  template void backward(const Problem<Real>&, const Isa&, const Team&, const Gradients<Real>&); \
  template void loss_and_gradients(const Problem<Real>&, const Isa&, const Team&, Reduction,     \
                                   Real*, Gradients<Real>);
SUPCON_INSTANTIATE(float)
SUPCON_INSTANTIATE(double)
#undef SUPCON_INSTANTIATE

}  // namespace supcon
