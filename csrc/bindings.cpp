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

// The addresses of supcon::Results.
template <typename Real>
supcon::Results<Real> results(int64_t num_rows, uintptr_t loss, uintptr_t total, uintptr_t counts,
                              uintptr_t statistics) {
  return {pointer<Real>(loss), pointer<Real>(total), pointer<Real>(counts),
          statistics_at(statistics, num_rows)};
}

template <typename Real>
void forward(const Call& call, uintptr_t loss, uintptr_t total, uintptr_t counts,
             uintptr_t statistics) {
  supcon::forward(call.problem<Real>(), isa_of(call.isa), call.team(),
                  results<Real>(call.num_rows, loss, total, counts, statistics));
}

// As forward, with the addresses of what there is of the columns, as (M,) of rows.
template <typename Real>
void forward_both_ways(const Call& call, uintptr_t loss, uintptr_t total, uintptr_t counts,
                       uintptr_t statistics, uintptr_t col_loss, uintptr_t col_total,
                       uintptr_t col_counts, uintptr_t col_statistics) {
  const supcon::Results<Real> of_cols =
      results<Real>(call.num_cols, col_loss, col_total, col_counts, col_statistics);
  supcon::forward(call.problem<Real>(), isa_of(call.isa), call.team(),
                  results<Real>(call.num_rows, loss, total, counts, statistics), &of_cols);
}

// The addresses of the loss and of the gradients, 0 where there is none.
template <typename Real>
void loss_and_gradients(const Call& call, const std::string& reduction, uintptr_t loss,
                        uintptr_t rows, uintptr_t cols, uintptr_t temperature) {
  supcon::Gradients<Real> gradients = {};
  gradients.rows = pointer<Real>(rows);
  gradients.cols = pointer<Real>(cols);
  gradients.temperature = pointer<double>(temperature);
  const supcon::Reduction reduces = reduction == "sum"    ? supcon::Reduction::kSum
                                    : reduction == "mean" ? supcon::Reduction::kMean
                                                          : supcon::Reduction::kPositiveMean;
  supcon::loss_and_gradients(call.problem<Real>(), isa_of(call.isa), call.team(), reduces,
                             pointer<Real>(loss), gradients);
}

// The addresses of supcon::Gradients, 0 for a gradient that is not wanted and for what is not
// there.
template <typename Real>
void backward(const Call& call, uintptr_t loss, uintptr_t statistics, uintptr_t rows,
              uintptr_t cols, uintptr_t temperature, uintptr_t col_loss, uintptr_t col_statistics) {
  const supcon::Gradients<Real> out = {
      pointer<const Real>(loss),
      statistics_at(statistics, call.num_rows),
      pointer<Real>(rows),
      pointer<Real>(cols),
      pointer<double>(temperature),
      pointer<const Real>(col_loss),
      col_statistics == 0 ? supcon::RowStatistics{} : statistics_at(col_statistics, call.num_cols)};
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
          [](const Call& call, uintptr_t loss, uintptr_t total, uintptr_t counts,
             uintptr_t statistics) {
            const auto run = call.is_double ? forward<double> : forward<float>;
            run(call, loss, total, counts, statistics);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "forward_both_ways",
          [](const Call& call, uintptr_t loss, uintptr_t total, uintptr_t counts,
             uintptr_t statistics, uintptr_t col_loss, uintptr_t col_total, uintptr_t col_counts,
             uintptr_t col_statistics) {
            const auto run = call.is_double ? forward_both_ways<double> : forward_both_ways<float>;
            run(call, loss, total, counts, statistics, col_loss, col_total, col_counts,
                col_statistics);
          },
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
          [](const Call& call, uintptr_t loss, uintptr_t statistics, uintptr_t rows, uintptr_t cols,
             uintptr_t temperature, uintptr_t col_loss, uintptr_t col_statistics) {
            const auto run = call.is_double ? backward<double> : backward<float>;
            run(call, loss, statistics, rows, cols, temperature, col_loss, col_statistics);
          },
          py::arg("loss"), py::arg("statistics"), py::arg("rows"), py::arg("cols"),
          py::arg("temperature"), py::arg("col_loss") = 0, py::arg("col_statistics") = 0,
          py::call_guard<py::gil_scoped_release>());
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
