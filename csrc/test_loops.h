// Problems for the core's test, and what loops over their pairs make of them in float64.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "supcon.h"

namespace {

constexpr int64_t kIgnored = -100;

using supcon::Denominator;
using supcon::Summation;

struct Variant {
  Summation summation;
  Denominator denominator;
};

struct Shape {
  const char* name;
  int64_t rows, cols, dim;  // cols 0: square
  int64_t self_offset;
  double temperature;
  bool normalize;
  int64_t num_soft = 0;  // 0: integer labels
  bool masked = false;   // with a mask instead, of samples of two views where square
};

template <typename Real>
struct Data {
  Data(const Shape& shape, Variant variant)
      : shape(shape), variant(variant), m(shape.cols > 0 ? shape.cols : 0) {
    if (square()) m = shape.rows;
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const auto draw = [&](int64_t count, std::vector<Real>* x, std::vector<int64_t>* labels) {
      x->resize(count * shape.dim);
      labels->resize(count);
      for (Real& value : *x) value = static_cast<Real>(normal(random));
      for (int64_t& label : *labels) label = random() % 6 == 0 ? kIgnored : int64_t(random() % 5);
    };
    draw(shape.rows, &rows, &row_labels);
    draw(m, &cols, &col_labels);
    if (square()) cols = rows, col_labels = row_labels;
    if (shape.num_soft > 0) draw_soft(&random);
    if (shape.masked) draw_mask(&random);
    for (int64_t i = 0; shape.self_offset >= 0 && i < shape.rows; ++i) {
      col_labels[shape.self_offset + i] = row_labels[i];
      for (int64_t d = 0; d < shape.dim; ++d)
        cols[(shape.self_offset + i) * shape.dim + d] = rows[i * shape.dim + d];
    }
  }

  // The core sees rows with soft labels as of one class.
  void draw_soft(std::mt19937* random) {
    std::uniform_real_distribution<double> uniform;
    row_labels.assign(row_labels.size(), 0);
    col_labels.assign(col_labels.size(), 0);
    row_soft.resize(shape.rows * shape.num_soft);
    col_soft.resize(m * shape.num_soft);
    for (double& y : row_soft) y = uniform(*random);
    for (double& y : col_soft) y = uniform(*random);
    if (square()) col_soft = row_soft;
  }

  // Cuts the features down to bfloat16, which the core then is given.
  void to_bfloat16() {
    const auto cut = [](std::vector<Real>* x, std::vector<uint16_t>* halves) {
      for (Real& value : *x) {
        const float wide = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &wide, 4);
        halves->push_back(bits >> 16);
        bits &= 0xffff0000;
        float narrow;
        std::memcpy(&narrow, &bits, 4);
        value = static_cast<Real>(narrow);
      }
    };
    cut(&rows, &row_halves);
    cut(&cols, &col_halves);
    is_bfloat16 = true;
  }

  void draw_mask(std::mt19937* random) {
    row_labels.assign(row_labels.size(), 0);
    col_labels.assign(col_labels.size(), 0);
    mask_rows = square() ? shape.rows / 2 : shape.rows;
    mask_cols = square() ? shape.rows / 2 : m;
    mask.resize(mask_rows * mask_cols);
    for (int8_t& w : mask) w = static_cast<int8_t>(int((*random)() % 4) - 1);
  }

  // > 0 a positive, 0 a negative, < 0 takes no part.
  double weight(int64_t i, int64_t j) const {
    if (j == own(i) || col_labels[j] == kIgnored) return -1;
    if (shape.masked) return mask[i % mask_rows * mask_cols + j % mask_cols];
    if (shape.num_soft == 0) return row_labels[i] == col_labels[j] ? 1 : 0;
    double sum = 0;
    for (int64_t c = 0; c < shape.num_soft; ++c)
      sum += row_soft[i * shape.num_soft + c] * col_soft[j * shape.num_soft + c];
    return sum;
  }

  bool square() const { return shape.cols == 0; }
  int64_t own(int64_t i) const {
    return square() ? i : shape.self_offset < 0 ? -1 : shape.self_offset + i;
  }
  supcon::Problem<Real> problem() const {
    using supcon::Element;
    supcon::Matrix of_rows, of_cols, of_pairs;
    if (shape.num_soft > 0) {
      of_rows = {row_soft.data(), Element::kDouble, shape.rows, shape.num_soft, shape.num_soft, 1};
      of_cols = {col_soft.data(), Element::kDouble, m, shape.num_soft, shape.num_soft, 1};
    }
    if (shape.masked) of_pairs = {mask.data(), Element::kInt8, mask_rows, mask_cols, mask_cols, 1};
    return {is_bfloat16 ? static_cast<const void*>(row_halves.data()) : rows.data(),
            is_bfloat16 ? static_cast<const void*>(col_halves.data()) : cols.data(),
            row_labels.data(),
            col_labels.data(),
            of_rows,
            of_cols,
            of_pairs,
            square(),
            shape.rows,
            m,
            shape.dim,
            kIgnored,
            shape.self_offset,
            shape.temperature,
            shape.normalize,
            variant.summation,
            variant.denominator,
            is_bfloat16};
  }

  Shape shape;
  Variant variant;
  int64_t m;
  std::vector<Real> rows, cols;
  std::vector<uint16_t> row_halves, col_halves;
  bool is_bfloat16 = false;
  std::vector<int64_t> row_labels, col_labels;
  std::vector<double> row_soft, col_soft;
  int64_t mask_rows = 0, mask_cols = 0;
  std::vector<int8_t> mask;
};

// Losses (N,), then gradients of rows, columns and temperature, of the sum weighted by upstream(i).
struct Result {
  std::vector<double> loss, rows, cols;
  double temperature = 0, total = 0;
};

double upstream(int64_t i) { return 0.5 + static_cast<double>(i % 3); }

std::vector<double> unit_rows(const Data<double>& data, const std::vector<double>& x,
                              std::vector<double>* norms) {
  std::vector<double> unit(x);
  const int64_t dim = data.shape.dim, count = static_cast<int64_t>(x.size()) / dim;
  for (int64_t i = 0; i < count; ++i) {
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) square += x[i * dim + d] * x[i * dim + d];
    norms->push_back(data.shape.normalize ? std::sqrt(square) : 1.0);
    for (int64_t d = 0; d < dim; ++d) unit[i * dim + d] /= norms->back();
  }
  return unit;
}

// The gradient of the input, given that of the unit rows.
void project(const Data<double>& data, const std::vector<double>& unit,
             const std::vector<double>& norms, std::vector<double>* grad) {
  const int64_t dim = data.shape.dim;
  for (size_t i = 0; i < norms.size(); ++i) {
    double along = 0;
    for (int64_t d = 0; d < dim && data.shape.normalize; ++d)
      along += unit[i * dim + d] * (*grad)[i * dim + d];
    for (int64_t d = 0; d < dim; ++d)
      (*grad)[i * dim + d] = ((*grad)[i * dim + d] - along * unit[i * dim + d]) / norms[i];
  }
}

double sum_exp(const std::vector<double>& s, const std::vector<int64_t>& where, double largest) {
  double sum = 0;
  for (int64_t j : where) sum += std::exp(s[j] - largest);
  return sum;
}

// The loss of row i with similarities s, and its derivative by each of them: every variant is made
// of the probability p_j of a positive j among the columns of its denominator.
double loss_of_row(const Data<double>& data, int64_t i, const std::vector<double>& s,
                   std::vector<double>* g) {
  std::vector<int64_t> positives, negatives, below;
  double total = 0;
  for (int64_t j = 0; j < data.m; ++j) {
    const double weight = data.weight(i, j);
    if (weight >= 0) (weight > 0 ? positives : negatives).push_back(j);
    total += std::max(weight, 0.0);
  }
  const bool only_negatives = data.variant.denominator == Denominator::kOnlyNegatives;
  if (positives.empty() || (only_negatives && negatives.empty())) return 0;
  below = negatives;
  if (data.variant.denominator == Denominator::kAll)
    below.insert(below.end(), positives.begin(), positives.end());
  double largest = -1e300;
  for (int64_t j = 0; j < data.m; ++j) largest = std::max(largest, s[j]);
  const double shared = sum_exp(s, below, largest);
  const auto denominator = [&](int64_t j) {
    const bool own_term = data.variant.denominator == Denominator::kOnePositive;
    return shared + (own_term ? std::exp(s[j] - largest) : 0.0);
  };
  const bool out = data.variant.summation == Summation::kOut;
  double logs = 0, mean = 0;
  for (int64_t j : positives) {
    const double p = std::exp(s[j] - largest) / denominator(j);
    logs += data.weight(i, j) * std::log(p) / total;
    mean += data.weight(i, j) * p / total;
  }
  for (int64_t j : positives) {
    // d loss / d log p_j, and log p_j = s_j - log denominator(j).
    const double p = std::exp(s[j] - largest) / denominator(j);
    const double weight = -data.weight(i, j) / total * (out ? 1 : p / mean);
    (*g)[j] += weight;
    for (int64_t k : below) (*g)[k] -= weight * std::exp(s[k] - largest) / denominator(j);
    if (data.variant.denominator == Denominator::kOnePositive) (*g)[j] -= weight * p;
  }
  return out ? -logs : -std::log(mean);
}

Result by_loops(const Data<double>& data) {
  const int64_t n = data.shape.rows, m = data.m, dim = data.shape.dim;
  const double tau = data.shape.temperature;
  std::vector<double> row_norms, col_norms;
  const std::vector<double> r = unit_rows(data, data.rows, &row_norms);
  const std::vector<double> c = unit_rows(data, data.cols, &col_norms);
  Result out;
  out.loss.assign(n, 0.0);
  out.rows.assign(n * dim, 0.0);
  out.cols.assign(m * dim, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    if (data.row_labels[i] == kIgnored) continue;
    std::vector<double> s(m, 0.0), g(m, 0.0);
    for (int64_t j = 0; j < m; ++j)
      for (int64_t d = 0; d < dim; ++d) s[j] += r[i * dim + d] * c[j * dim + d] / tau;
    out.loss[i] = loss_of_row(data, i, s, &g);
    for (int64_t j = 0; j < m; ++j) {
      out.temperature -= upstream(i) * g[j] * s[j] / tau;
      for (int64_t d = 0; d < dim; ++d) {
        out.rows[i * dim + d] += upstream(i) * g[j] * c[j * dim + d] / tau;
        out.cols[j * dim + d] += upstream(i) * g[j] * r[i * dim + d] / tau;
      }
    }
  }
  for (size_t k = 0; data.square() && k < out.rows.size(); ++k) out.rows[k] += out.cols[k];
  if (data.square()) out.cols.clear();
  project(data, r, row_norms, &out.rows);
  if (!data.square()) project(data, c, col_norms, &out.cols);
  return out;
}

}  // namespace
