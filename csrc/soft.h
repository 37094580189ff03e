// Soft labels: what the positives of a row add up to, when every pair is one with some weight. The
// weights are products of C numbers, so the sums cost O(N C D) and no pair is looked at.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace supcon {

// For every line i the sum over the points j of (of_lines_i . of_points_j) point_j, leaving out
// point i + offset. The sums before and after the point that is left out are added up apart: taken
// off a total it would leave nothing but roundings where labels are nearly one-hot.
//
// Args:
//   of_lines: (num_lines, C) soft labels.
//   of_points: (num_points, C).
//   leave_out, offset: whether point i + offset is left out.
//   point(j, d): feature d of point j, in float64.
//   add(i, d, x): is given what sums before, and sums after, have of line i and feature d.
template <typename Point, typename Add>
void sum_of_soft(const Team& team, const double* of_lines, int64_t num_lines,
                 const double* of_points, int64_t num_points, int64_t num_soft, int64_t dim,
                 bool leave_out, int64_t offset, Point point, Add add) {
  constexpr int64_t kWidth = 8;
  parallel_for(team, (dim + kWidth - 1) / kWidth, [&](int64_t part) {
    const int64_t begin = part * kWidth, width = std::min(kWidth, dim - begin);
    std::vector<double> sum(num_soft * kWidth);
    const auto take = [&](int64_t j) {
      for (int64_t c = 0; c < num_soft; ++c)
        for (int64_t d = 0; d < width; ++d)
          sum[c * kWidth + d] += of_points[j * num_soft + c] * point(j, begin + d);
    };
    const auto give = [&](int64_t i) {
      double total[kWidth] = {};
      for (int64_t c = 0; c < num_soft; ++c)
        for (int64_t d = 0; d < width; ++d)
          total[d] += of_lines[i * num_soft + c] * sum[c * kWidth + d];
      for (int64_t d = 0; d < width; ++d) add(i, begin + d, total[d]);
    };
    // Points before the one left out, or all of them; then those after it.
    int64_t next = 0;
    for (int64_t i = 0; i < num_lines; ++i) {
      const int64_t stop = leave_out ? std::clamp<int64_t>(i + offset, 0, num_points) : num_points;
      for (; next < stop; ++next) take(next);
      give(i);
    }
    if (!leave_out) return;
    std::fill(sum.begin(), sum.end(), 0.0);
    next = num_points;
    for (int64_t i = num_lines - 1; i >= 0; --i) {
      const int64_t stop = std::clamp<int64_t>(i + offset + 1, 0, num_points);
      for (; next > stop; --next) take(next - 1);
      give(i);
    }
  });
}

}  // namespace supcon
