// The core as the Python module _supcon_kernels: pointers and sizes in, results written in place.
// supcon_kernels/backends/native.py is its only caller, and sees to dtypes and strides.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "supcon.h"

namespace py = pybind11;

namespace {

// A forked child has none of its parent's pool of threads, and waits for them forever.
std::atomic<bool> forked{false};

void run_team(int threads, void (*body)(void*), void* context) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  body(context);
#else
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int k = 1; k < threads; ++k) others.emplace_back(body, context);
  } catch (const std::system_error&) {
    // As many as there are will do.
  }
  body(context);
  for (std::thread& other : others) other.join();
#endif
}

// Of one thread that stands for a team: the seconds in which others would have helped it.
double shared_seconds = 0;

void run_alone(int, void (*body)(void*), void* context) {
  const auto start = std::chrono::steady_clock::now();
  body(context);
  shared_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

supcon::Team team_of(int threads) {
  if (threads == 0) return {2, run_alone};
  return {forked ? 1 : threads, run_team};
}

// Below this many products a second thread is not worth waiting for, least of all on a busy
// machine.
constexpr double kSmall = 1 << 21;

const supcon::Isa& isa_of(const std::string& name) {
  for (const supcon::Isa* isa : supcon::available_isas())
    if (name == isa->name) return *isa;
  throw std::invalid_argument("this CPU does not run " + name);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The address of a matrix, the name of its elements' type as torch has it, its shape and its
// strides.
typedef std::optional<std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t, int64_t>>
    MatrixAt;

supcon::Matrix matrix_at(const MatrixAt& at) {
  using supcon::Element;
  if (!at) return {};
  static const std::map<std::string, Element> elements = {
      {"bool", Element::kUint8},     {"uint8", Element::kUint8},       {"int8", Element::kInt8},
      {"int16", Element::kInt16},    {"int32", Element::kInt32},       {"int64", Element::kInt64},
      {"float16", Element::kHalf},   {"bfloat16", Element::kBfloat16}, {"float32", Element::kFloat},
      {"float64", Element::kDouble},
  };
  const auto& [address, element, num_rows, num_cols, row_stride, col_stride] = *at;
  return {pointer<const void>(address),
          elements.at(element),
          num_rows,
          num_cols,
          row_stride,
          col_stride};
}

// A supcon::Problem whose pointers are addresses, of either element type.
struct Call {
  uintptr_t rows, cols, row_labels, col_labels;
  MatrixAt row_soft, col_soft, mask;
  bool square;
  int64_t num_rows, num_cols, dim, ignore_label, self_offset;
  double temperature;
  bool normalize;
  std::string summation, denominator;
  bool is_double, is_bfloat16, symmetric;
  std::string isa;
  int threads;

  supcon::Team team() const {
    const int64_t m = square ? num_rows : num_cols;
    const double products = static_cast<double>(num_rows) * m * dim;
    return team_of(products < kSmall ? std::min(threads, 1) : threads);
  }

  template <typename Real>
  supcon::Problem<Real> problem() const {
    return {pointer<const void>(rows),
            pointer<const void>(cols),
            pointer<const int64_t>(row_labels),
            pointer<const int64_t>(col_labels),
            matrix_at(row_soft),
            matrix_at(col_soft),
            matrix_at(mask),
            square,
            num_rows,
            num_cols,
            dim,
            ignore_label,
            self_offset,
            temperature,
            normalize,
            summation == "in" ? supcon::Summation::kIn : supcon::Summation::kOut,
            denominator == "all"            ? supcon::Denominator::kAll
            : denominator == "one_positive" ? supcon::Denominator::kOnePositive
                                            : supcon::Denominator::kOnlyNegatives,
            is_bfloat16,
            symmetric};
  }
};

// The three arrays of a (3, N) one.
supcon::RowStatistics statistics_at(uintptr_t address, int64_t num_rows) {
  double* const first = pointer<double>(address);
  return {first, first + num_rows, first + 2 * num_rows};
}

supcon::Reduction reduction_of(const std::string& name) {
  if (name == "none") return supcon::Reduction::kNone;
  if (name == "sum") return supcon::Reduction::kSum;
  return name == "mean" ? supcon::Reduction::kMean : supcon::Reduction::kPositiveMean;
}

// Where the results of one way go: the reduced loss, what the sum was divided by, and the (3, N)
// statistics.
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t> ResultsAt;

// The results of one way, of which the caller gets the losses or what they are reduced to.
template <typename Real>
class Reduced {
 public:
  Reduced(supcon::Reduction reduction, int64_t num_rows, const ResultsAt& at)
      : reduction_(reduction),
        loss_(pointer<Real>(std::get<0>(at))),
        divisor_(pointer<Real>(std::get<1>(at))),
        losses_(reduction == supcon::Reduction::kNone ? 0 : num_rows) {
    Real* const losses = losses_.empty() ? loss_ : losses_.data();
    results = {losses, &total_, counts_, statistics_at(std::get<2>(at), num_rows)};
  }
  Reduced(const Reduced&) = delete;
  Reduced& operator=(const Reduced&) = delete;

  void reduce() const {
    *divisor_ = supcon::divisor_of(reduction_, counts_);
    if (reduction_ != supcon::Reduction::kNone) *loss_ = total_ / *divisor_;
  }

  supcon::Results<Real> results;

 private:
  const supcon::Reduction reduction_;
  Real *const loss_, *const divisor_;
  std::vector<Real> losses_;
  Real total_, counts_[2];
};

// `of_cols` is of the other way where the problem is symmetric; or `sums_of_cols` is the address of
// sums (3, M), or (4, M) with that of the log-sum-exps (M,) of all negatives.
template <typename Real>
void forward(const Call& call, const std::string& reduction, const ResultsAt& of_rows,
             const std::optional<ResultsAt>& of_cols, uintptr_t sums_of_cols, uintptr_t negatives) {
  const supcon::Reduction reduces = reduction_of(reduction);
  Reduced<Real> rows(reduces, call.num_rows, of_rows);
  std::optional<Reduced<Real>> cols;
  if (of_cols) cols.emplace(reduces, call.num_cols, *of_cols);
  double* const first = pointer<double>(sums_of_cols);
  const int64_t m = call.num_cols;
  const supcon::Sums sums = {first, first + m, first + 2 * m, first + 3 * m};
  supcon::forward<Real>(call.problem<Real>(), isa_of(call.isa), call.team(), rows.results,
                        {cols ? &cols->results : nullptr, sums_of_cols == 0 ? nullptr : &sums,
                         pointer<const double>(negatives)});
  rows.reduce();
  if (cols) cols->reduce();
}

// The addresses of the loss and of the gradients, 0 where there is none.
template <typename Real>
void loss_and_gradients(const Call& call, const std::string& reduction, uintptr_t loss,
                        uintptr_t rows, uintptr_t cols, uintptr_t temperature) {
  supcon::Gradients<Real> gradients = {};
  gradients.rows = pointer<Real>(rows);
  gradients.cols = pointer<Real>(cols);
  gradients.temperature = pointer<double>(temperature);
  supcon::loss_and_gradients(call.problem<Real>(), isa_of(call.isa), call.team(),
                             reduction_of(reduction), pointer<Real>(loss), gradients);
}

// What came from above: the gradient of the loss, or of each anchor's if `by_anchor`, what the sum
// of the losses was divided by, and the (3, N) statistics.
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, bool> AnchorsAt;

// The gradient of the sum of the losses, for each anchor.
template <typename Real>
std::vector<Real> upstream_of(const AnchorsAt& at, int64_t num_rows) {
  const auto& [loss, divisor, statistics, by_anchor] = at;
  const Real *const given = pointer<const Real>(loss), by = *pointer<const Real>(divisor);
  std::vector<Real> upstream(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) upstream[i] = given[by_anchor ? i : 0] / by;
  return upstream;
}

// The addresses of the gradients, 0 where one is not wanted. `cols` is of columns that are anchors.
template <typename Real>
void backward(const Call& call, const AnchorsAt& rows, uintptr_t grad_rows, uintptr_t grad_cols,
              uintptr_t grad_temperature, const std::optional<AnchorsAt>& cols) {
  const std::vector<Real> of_rows = upstream_of<Real>(rows, call.num_rows);
  std::vector<Real> of_cols;
  supcon::Gradients<Real> out = {of_rows.data(), statistics_at(std::get<2>(rows), call.num_rows),
                                 pointer<Real>(grad_rows), pointer<Real>(grad_cols),
                                 pointer<double>(grad_temperature)};
  if (cols) {
    of_cols = upstream_of<Real>(*cols, call.num_cols);
    out.col_loss = of_cols.data();
    out.col_statistics = statistics_at(std::get<2>(*cols), call.num_cols);
  }
  supcon::backward(call.problem<Real>(), isa_of(call.isa), call.team(), out);
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const supcon::Isa* isa : supcon::available_isas()) names.push_back(isa->name);
  return names;
}

void define(py::module_ module) {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  module.attr("__version__") = SUPCON_VERSION;
  module.attr("interface") = supcon::kInterface;
#ifdef _OPENMP
  module.attr("threading") = "OpenMP";
#else
  module.attr("threading") = "std::thread";
#endif
  module.def("isa_names", isa_names);
  module.def("multiplies_bfloat16",
             [](const std::string& isa) { return isa_of(isa).bfloat16 != nullptr; });
  // For benchmarks/bench_threads.py: a call with threads = 0 counts what a team would share.
  module.def("take_shared_seconds", [] { return std::exchange(shared_seconds, 0.0); });
  module.def("scheduled_jobs", [](int64_t num_rows, int64_t num_cols, bool square, bool to_cols,
                                  int threads) {
    std::vector<std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, bool>>> jobs;
    for (const auto& job : supcon::scheduled_jobs(num_rows, num_cols, square, to_cols, threads)) {
      jobs.emplace_back();
      for (const supcon::ScheduledPair& pair : job)
        jobs.back().emplace_back(pair.row_counter, pair.row_turn, pair.col_counter, pair.col_turn,
                                 pair.is_whole);
    }
    return jobs;
  });
  module.def(
      "peak_flops",
      [](const std::string& name, const std::string& dtype, int threads) {
        const supcon::Isa& isa = isa_of(name);
        const supcon::Team team = team_of(threads);
        constexpr int64_t kIterations = 1 << 22;
        if (dtype == "float64") return supcon::peak_flops(isa.f64, team, kIterations);
        const bool in_16_bits = dtype == "bfloat16" && isa.bfloat16 != nullptr;
        return supcon::peak_flops(in_16_bits ? *isa.bfloat16 : isa.f32, team, kIterations);
      },
      py::arg("isa"), py::arg("dtype"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  // Attributes may be set on it: the caller hangs the tensors there whose memory it points into.
  py::class_<Call>(module, "Call", py::dynamic_attr())
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, MatrixAt, MatrixAt, MatrixAt, bool,
                    int64_t, int64_t, int64_t, int64_t, int64_t, double, bool, std::string,
                    std::string, bool, bool, bool, std::string, int>(),
           py::kw_only(), py::arg("rows"), py::arg("cols"), py::arg("row_labels"),
           py::arg("col_labels"), py::arg("row_soft"), py::arg("col_soft"), py::arg("mask"),
           py::arg("square"), py::arg("num_rows"), py::arg("num_cols"), py::arg("dim"),
           py::arg("ignore_label"), py::arg("self_offset"), py::arg("temperature"),
           py::arg("normalize"), py::arg("summation"), py::arg("denominator"), py::arg("is_double"),
           py::arg("is_bfloat16"), py::arg("symmetric"), py::arg("isa"), py::arg("threads"))
      .def(
          "forward",
          [](const Call& call, const std::string& reduction, const ResultsAt& of_rows,
             const std::optional<ResultsAt>& of_cols, uintptr_t sums_of_cols, uintptr_t negatives) {
            const auto run = call.is_double ? forward<double> : forward<float>;
            run(call, reduction, of_rows, of_cols, sums_of_cols, negatives);
          },
          py::arg("reduction"), py::arg("of_rows"), py::arg("of_cols") = py::none(),
          py::arg("sums_of_cols") = 0, py::arg("negatives") = 0,
          py::call_guard<py::gil_scoped_release>())
      .def(
          "loss_and_gradients",
          [](const Call& call, const std::string& reduction, uintptr_t loss, uintptr_t rows,
             uintptr_t cols, uintptr_t temperature) {
            const auto run =
                call.is_double ? loss_and_gradients<double> : loss_and_gradients<float>;
            run(call, reduction, loss, rows, cols, temperature);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "backward",
          [](const Call& call, const AnchorsAt& rows, uintptr_t grad_rows, uintptr_t grad_cols,
             uintptr_t grad_temperature, const std::optional<AnchorsAt>& cols) {
            const auto run = call.is_double ? backward<double> : backward<float>;
            run(call, rows, grad_rows, grad_cols, grad_temperature, cols);
          },
          py::arg("rows"), py::arg("grad_rows"), py::arg("grad_cols"), py::arg("grad_temperature"),
          py::arg("cols") = py::none(), py::call_guard<py::gil_scoped_release>());
}

// pybind11 up to Python 3.11 waits forever in a subinterpreter, so that nothing of it comes before
// this check.
int execute(PyObject* module) {
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError, "_supcon_kernels cannot be imported in a subinterpreter");
    return -1;
  }
  try {
    define(py::reinterpret_borrow<py::module_>(module));
    return 0;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
  }
  return -1;
}

}  // namespace

// Written out because PYBIND11_MODULE sets pybind11 up before any code of the module runs.
extern "C" PYBIND11_EXPORT PyObject* PyInit__supcon_kernels() {
  static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_supcon_kernels",
                                   nullptr,
                                   0,
                                   nullptr,
                                   slots,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModuleDef_Init(&definition);
}
