// One side of a problem: its rows sorted by label, normalised, scaled and packed for the kernels.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "parallel.h"
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

struct Segment {
  int64_t label;
  int64_t begin, end;  // positions in the sorted order
};

// One side of the problem, sorted by label: embeddings scaled so that their products are base-2
// exponents, in rows of a padded stride and, packed, in the transposed panels of the register
// kernel.
template <typename Real>
struct Side {
  Side(const Real* x, const int64_t* labels, int64_t count, const Problem<Real>& problem,
       const TileFunctions<Real>& functions, const Team& team)
      : input(x),
        panel(functions.panel),
        dim(round_up(std::max<int64_t>(problem.dim, 1), functions.panel)),
        stride(dim + 16),
        position(count, -1) {
    sort(labels, count, problem.ignore_label);
    tile = tile_rows(size);
    num_tiles = (size + tile - 1) / tile;
    padded = round_up(size, panel);
    allocate();
    embed(problem, team);
  }

  int64_t tile_begin(int64_t t) const { return t * tile; }
  int tile_size(int64_t t) const { return std::min<int64_t>(tile, size - t * tile); }
  const Real* row(int64_t k) const { return data->get() + k * stride; }
  const Real* packed_tile(int64_t t) const { return packed->get() + tile_begin(t) * dim; }

  const Real* input;
  int64_t panel, dim, stride;
  std::vector<int64_t> order;     // sorted position -> row of the input, ignored rows left out
  std::vector<int64_t> position;  // row of the input -> sorted position, -1 where ignored
  std::vector<Segment> segments;
  int64_t size = 0;  // rows that take part
  int64_t tile = 0, num_tiles = 0, padded = 0;
  std::unique_ptr<Array<Real>> data, packed;
  std::vector<Real> scale, norm;  // the row is input / scale / norm
  bool finite = true;

 private:
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

  void allocate() {
    data = std::make_unique<Array<Real>>(padded * stride);
    packed = std::make_unique<Array<Real>>(padded * dim);
    scale.assign(size, 1);
    norm.assign(size, 1);
  }

  void embed(const Problem<Real>& problem, const Team& team) {
    const Real unit = static_cast<Real>(std::sqrt(kLog2E / problem.temperature));
    std::atomic<bool> all_finite{true};
    const int64_t num_panels = padded / panel;
    parallel_for(team, num_panels, [&](int64_t p) {
      const int64_t begin = p * panel;
      for (int64_t k = begin; k < begin + panel; ++k) {
        Real* out = data->get() + k * stride;
        std::fill(out, out + stride, Real(0));
        if (k < size && !embed_row(problem, unit, k, out)) all_finite = false;
      }
      Real* out = packed->get() + begin * dim;
      const Real* in = data->get() + begin * stride;
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t k = 0; k < panel; ++k) out[d * panel + k] = in[k * stride + d];
    });
    finite = all_finite;
  }

  // Writes row k and says whether all of it is finite.
  bool embed_row(const Problem<Real>& problem, Real unit, int64_t k, Real* out) {
    const Real* x = input + order[k] * problem.dim;
    Real largest = 0, finite_sum = 0;
    const int64_t dim = problem.dim;
#pragma omp simd reduction(max : largest) reduction(+ : finite_sum)
    for (int64_t d = 0; d < dim; ++d) {
      largest = std::max(largest, std::abs(x[d]));
      finite_sum += x[d] * 0;  // NaN after anything that is not finite
    }
    if (problem.normalize) {
      if (largest == 0) {
        norm[k] = 0;
        return finite_sum == 0;
      }
      scale[k] = largest;
      Real square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < dim; ++d) {
        out[d] = x[d] / largest;
        square += out[d] * out[d];
      }
      norm[k] = std::sqrt(square);
      unit /= norm[k];
      x = out;
    }
    // The square bounds every product with the row: where it overflows, similarities may be
    // differences of infinities, which maxima and exponentials would not show.
    Real reach = 0;
#pragma omp simd reduction(+ : reach)
    for (int64_t d = 0; d < dim; ++d) {
      out[d] = x[d] * unit;
      reach += out[d] * out[d];
    }
    return finite_sum == 0 && reach - reach == 0;
  }
};

}  // namespace supcon
