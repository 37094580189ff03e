// The products on one pair of tiles: similarities, H with the rows of either tile, and the register
// kernel that makes them.

#pragma once

#include "vectors.h"

namespace supcon {
namespace {

template <int I>
struct Int {
  static constexpr int value = I;
};

// Rows and vectors of a row of the register kernel. Sanitizers take minutes over the unrolled
// kernel of a release; they check a smaller one, of the same source.
#ifdef SUPCON_SMALL_KERNEL
constexpr int kRows = 4;
#else
constexpr int kRows = SUPCON_KERNEL_ROWS;
#endif
constexpr int kVectors = 2;

// Loops around the register kernel stay apart: constants that the compiler hoists from one into
// another push accumulators out of registers.
#define SUPCON_APART __attribute__((noinline))

// C(R x NR) = A(R x K) B(K x NR), one row of vectors of B at a time against R broadcast elements of
// A. The accumulators are local and leave through the epilogue: finish(row, vector, value).
template <typename Real, int R, typename Finish>
SUPCON_INLINE void multiply(ptrdiff_t k_size, const Real* a, ptrdiff_t a_row, ptrdiff_t a_k,
                            const Real* b, ptrdiff_t b_k, Finish finish) {
  typedef typename Simd<Real>::V V;
  constexpr int kLanes = Simd<Real>::kLanes;
  V acc[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V{};
  }
  for (ptrdiff_t k = 0; k < k_size; ++k) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_k + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V x = splat<V>(a[r * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(r, v, acc[r][v]);
  }
}

// Calls body(Int<R>, i) for blocks of R = kRows rows and a last one of fewer.
static_assert(kRows <= 12, "a last block of more than 11 rows has no case below");
template <typename Body>
SUPCON_INLINE void for_each_block(int num_rows, Body body) {
  int i = 0;
  for (; i + kRows <= num_rows; i += kRows) body(Int<kRows>(), i);
  switch (num_rows - i) {
#define SUPCON_REST(R)                          \
  case R:                                       \
    if constexpr (R < kRows) body(Int<R>(), i); \
    break;
    SUPCON_REST(1)
    SUPCON_REST(2)
    SUPCON_REST(3)
    SUPCON_REST(4)
    SUPCON_REST(5)
    SUPCON_REST(6)
    SUPCON_REST(7)
    SUPCON_REST(8)
    SUPCON_REST(9)
    SUPCON_REST(10)
    SUPCON_REST(11)
#undef SUPCON_REST
    default:
      break;
  }
}

// The similarities of R rows from i on with a panel of columns. products_bfloat16.h has them of
// bfloat16.
template <typename T>
struct Products {
  typedef T Real;

  template <int R, typename Finish>
  static SUPCON_INLINE void similarities(const TilePair<Real>& t, int i, int j, Finish finish) {
    constexpr int kPanel = kVectors * Simd<Real>::kLanes;
    multiply<Real, R>(t.dim, t.a + i * t.stride, t.stride, 1, t.b_packed + j * t.dim, kPanel,
                      finish);
  }
};

// Behind the last row that the panel from column j on has pairs with.
template <typename Real>
SUPCON_INLINE int last_row(const TilePair<Real>& t, int j, int panel) {
  return t.triangle && j + panel < t.num_rows ? j + panel : t.num_rows;
}

// A panel of the scratch tile, handed to the pass.
template <typename Real, typename Pass>
SUPCON_INLINE void finish_panel(const TilePair<Real>& t, int j, Pass& pass) {
  constexpr int kLanes = Simd<Real>::kLanes;
  pass.begin(j);
  for (int i = 0; i < last_row(t, j, kVectors * kLanes); ++i)
    for (int v = 0; v < kVectors; ++v)
      pass.finish(i, j, v, load(t.scratch + i * kScratchStride + j + v * kLanes));
  pass.end(j);
}

// What an earlier pass has kept of the pair.
template <typename Real, typename Pass>
SUPCON_INLINE void for_each_kept(const TilePair<Real>& t, Pass& pass) {
  for (int j = 0; j < t.num_cols; j += kVectors * Simd<Real>::kLanes) finish_panel(t, j, pass);
}

// Similarities of the pair, handed to pass.finish(i, panel, vector, value) between
// pass.begin(panel) and pass.end(panel): where the tile is dense straight from the registers,
// elsewhere by way of the scratch tile, so that the register kernel is not compiled for every mask.
template <typename P, bool kDense, typename Pass>
SUPCON_INLINE void for_each_similarity(const TilePair<typename P::Real>& t, Pass& pass) {
  typedef typename P::Real Real;
  typedef typename Simd<Real>::V V;
  constexpr int kLanes = Simd<Real>::kLanes;
  constexpr int kPanel = kVectors * kLanes;
  if (t.kept != Kept::kNothing) return for_each_kept(t, pass);
  for (int j = 0; j < t.num_cols; j += kPanel) {
    if constexpr (kDense) pass.begin(j);
    for_each_block(last_row(t, j, kPanel), [&](auto rows, int i) {
      P::template similarities<decltype(rows)::value>(t, i, j, [&](int r, int v, V x) {
        if constexpr (kDense)
          pass.finish(i + r, j, v, x);
        else
          store(t.scratch + (i + r) * kScratchStride + j + v * kLanes, x);
      });
    });
    if constexpr (kDense)
      pass.end(j);
    else
      finish_panel(t, j, pass);
  }
}

// c += x, for the register kernel's results.
template <typename Real>
SUPCON_INLINE auto adding_to(Real* c, ptrdiff_t stride) {
  return [=](int r, int v, typename Simd<Real>::V x) {
    Real* p = c + r * stride + v * Simd<Real>::kLanes;
    store(p, load(p) + x);
  };
}

// grad_a += H b, H being the scratch tile. In a triangle H is zero below the diagonal, and the
// product leaves that out.
template <typename Real>
SUPCON_APART void add_to_rows(const TilePair<Real>& t) {
  constexpr int kPanel = kVectors * Simd<Real>::kLanes;
  for (ptrdiff_t d = 0; d < t.dim; d += kPanel)
    for_each_block(t.num_rows, [&](auto rows, int i) {
      const int k = t.triangle ? i / kPanel * kPanel : 0;
      multiply<Real, decltype(rows)::value>(t.num_cols - k, t.scratch + i * kScratchStride + k,
                                            kScratchStride, 1, t.b + k * t.stride + d, t.stride,
                                            adding_to(t.grad_a + i * t.stride + d, t.stride));
    });
}

// grad_b += H^T a.
template <typename Real>
SUPCON_APART void add_to_cols(const TilePair<Real>& t) {
  constexpr int kPanel = kVectors * Simd<Real>::kLanes;
  for (ptrdiff_t d = 0; d < t.dim; d += kPanel)
    for_each_block(t.num_cols, [&](auto cols, int j) {
      constexpr int kCols = decltype(cols)::value;
      const int k_size = t.triangle && j + kCols < t.num_rows ? j + kCols : t.num_rows;
      multiply<Real, kCols>(k_size, t.scratch + j, 1, kScratchStride, t.a + d, t.stride,
                            adding_to(t.grad_b + j * t.stride + d, t.stride));
    });
}

// Multiplies and adds in registers alone, as often as the register kernel does for k_size terms:
// the peak that it is measured against. Returns the number of floating-point operations.
template <typename Real>
double multiply_in_registers(int64_t k_size, Real* out) {
  typedef typename Simd<Real>::V V;
  constexpr int kChains = 12;
  V x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = splat<V>(out[0] + static_cast<Real>(c));
  V factor = splat<V>(out[1]), term = splat<V>(out[2]);
  for (int64_t k = 0; k < k_size; ++k) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * factor + term;
  }
  V sum = V{};
  for (int c = 0; c < kChains; ++c) sum += x[c];
  out[3] = sum[0];
  return 2.0 * kChains * Simd<Real>::kLanes * static_cast<double>(k_size);
}

}  // namespace
}  // namespace supcon
