// The products on one pair of tiles in bfloat16, two numbers of each operand in a word: features d
// and d + dim / 2 of a row, or of two rows half a panel apart the same feature. Rows are multiplied
// as they were given, for their products are exact in float32; H is rounded.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "products.h"

namespace supcon {
namespace {

typedef Simd<float>::V Floats;
typedef Simd<float>::Bits Words;
constexpr int kLanes = Simd<float>::kLanes;
constexpr int kPanel = kVectors * kLanes;
static_assert(kVectors == 2 && kPanel % kRows == 0, "a block of rows is of one panel");

SUPCON_INLINE Words load_words(const uint32_t* p) {
  return (Words) * reinterpret_cast<const Simd<float>::I*>(p);
}

SUPCON_INLINE void store_words(uint32_t* p, Words x) {
  *reinterpret_cast<Simd<float>::I*>(p) = (Simd<float>::I)x;
}

// sum + a b of both halves of each word. The emulation rounds in between.
SUPCON_INLINE Floats add_products(Floats sum, Words a, Words b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  constexpr uint32_t kHigh = 0xffff0000;
  sum += (Floats)(a << 16) * (Floats)(b << 16);
  return sum + (Floats)(a & kHigh) * (Floats)(b & kHigh);
#endif
}

// A product that no sum is fused with, so that it is rounded alike wherever it is made.
SUPCON_INLINE Floats unfused(Floats product) {
#ifdef __AVX512F__
  asm("" : "+v"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// As `multiply`, with k counting words.
template <int R, typename Finish>
SUPCON_INLINE void multiply_words(ptrdiff_t k_size, const uint32_t* a, ptrdiff_t a_row,
                                  ptrdiff_t a_k, const uint32_t* b, ptrdiff_t b_k, Finish finish) {
  Floats acc[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Floats{};
  }
  for (ptrdiff_t k = 0; k < k_size; ++k) {
    Words row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load_words(b + k * b_k + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Words x = a[r * a_row + k * a_k] - Words{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = add_products(acc[r][v], x, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(r, v, acc[r][v]);
  }
}

// Word k of row i of a packed side is at packed_row(packed, i, dim) + k * kPanel.
SUPCON_INLINE const uint32_t* packed_row(const uint32_t* packed, int i, ptrdiff_t dim) {
  return packed + i / kPanel * kPanel * (dim / 2) + i % kPanel;
}

struct Bfloat16Products {
  typedef float Real;

  template <int R, typename Finish>
  static SUPCON_INLINE void similarities(const TilePair<float>& t, int i, int j, Finish finish) {
    const Bfloat16Tiles<float>& of = t.bfloat16;
    multiply_words<R>(t.dim / 2, packed_row(of.a_packed, i, t.dim), 1, kPanel,
                      of.b_packed + j * (t.dim / 2), kPanel, [&](int r, int v, Floats product) {
                        const Floats factor = load(of.factor.col + j + v * kLanes);
                        finish(r, v, unfused(product * (of.factor.row[i + r] * factor)));
                      });
  }
};

double dots_of_words(const TilePair<float>& t, int i, int j, int count) {
  double total = 0;
  for (int panel = j / kPanel * kPanel; panel < j + count; panel += kPanel) {
    float x[kPanel];
    Bfloat16Products::similarities<1>(
        t, i, panel, [&](int, int v, Floats value) { store(x + v * kLanes, value); });
    for (int k = 0; k < kPanel; ++k)
      if (panel + k >= j && panel + k < j + count) total += static_cast<double>(x[k]);
  }
  return total;
}

// H as words, behind the scratch tile: halves are two columns of a row in the first, two rows of a
// column in the second.
SUPCON_INLINE uint32_t* h_by_row(const TilePair<float>& t) {
  return reinterpret_cast<uint32_t*>(t.scratch + kScratch);
}

SUPCON_INLINE uint32_t* h_by_col(const TilePair<float>& t) { return h_by_row(t) + kScratch / 2; }

// To bfloat16, to nearest even, in the upper half of each word.
SUPCON_INLINE Words rounded(Floats x) {
  const Words bits = (Words)x;
  return (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
}

// Writes H times the factors of its row and of its column, rounded; zero up to whole panels.
SUPCON_APART void round_weights(const TilePair<float>& t) {
  constexpr int kWordStride = kScratchStride / 2;
  const PerLine<float>& factor = t.bfloat16.factor;
  const auto weights = [&](int i, int j) {
    if (i >= t.num_rows) return Words{};
    return rounded(load(t.scratch + i * kScratchStride + j) *
                   (factor.row[i] * load(factor.col + j)));
  };
  for (int panel = 0; panel < t.num_rows; panel += kPanel)
    for (int i = panel; i < panel + kLanes; ++i)
      for (int j = t.triangle ? panel : 0; j < t.num_cols; j += kPanel) {
        const int far = i + kLanes;
        const Words first[] = {weights(i, j), weights(i, j + kLanes)};
        const Words second[] = {weights(far, j), weights(far, j + kLanes)};
        store_words(h_by_row(t) + i * kWordStride + j / 2, first[0] >> 16 | first[1]);
        store_words(h_by_row(t) + far * kWordStride + j / 2, second[0] >> 16 | second[1]);
        for (int v = 0; v < kVectors; ++v)
          store_words(h_by_col(t) + (i - panel / 2) * kScratchStride + j + v * kLanes,
                      first[v] >> 16 | second[v]);
      }
}

// As add_to_rows and add_to_cols. What is added is times the factor of the row that it is added to.
SUPCON_APART void add_words_to_rows(const TilePair<float>& t) {
  constexpr int kWordStride = kScratchStride / 2;
  const int num_cols = (t.num_cols + kPanel - 1) / kPanel * kPanel;
  for (ptrdiff_t d = 0; d < t.dim; d += kPanel)
    for_each_block(t.num_rows, [&](auto rows, int i) {
      const int k = t.triangle ? i / kPanel * kPanel / 2 : 0;
      multiply_words<decltype(rows)::value>(num_cols / 2 - k, h_by_row(t) + i * kWordStride + k,
                                            kWordStride, 1, t.bfloat16.b_paired + k * t.stride + d,
                                            t.stride,
                                            adding_to(t.grad_a + i * t.stride + d, t.stride));
    });
}

SUPCON_APART void add_words_to_cols(const TilePair<float>& t) {
  for (ptrdiff_t d = 0; d < t.dim; d += kPanel)
    for_each_block(t.num_cols, [&](auto cols, int j) {
      constexpr int kCols = decltype(cols)::value;
      const int last = t.triangle && j + kCols < t.num_rows ? j + kCols : t.num_rows;
      multiply_words<kCols>((last + kPanel - 1) / kPanel * kPanel / 2, h_by_col(t) + j, 1,
                            kScratchStride, t.bfloat16.a_paired + d, t.stride,
                            adding_to(t.grad_b + j * t.stride + d, t.stride));
    });
}

// Of rows whose lower halves are zero.
void pack_words(const float* rows, ptrdiff_t stride, int64_t dim, uint32_t* packed,
                uint32_t* paired) {
  const auto word = [](float low, float high) {
    uint32_t bits[2];
    __builtin_memcpy(&bits[0], &low, 4);
    __builtin_memcpy(&bits[1], &high, 4);
    return bits[0] >> 16 | (bits[1] & 0xffff0000);
  };
  const int64_t half = dim / 2;
  for (int64_t begin = 0; begin < half; begin += kLanes)
    for (int k = 0; k < kPanel; ++k)
      for (int64_t d = begin; d < begin + kLanes; ++d)
        packed[d * kPanel + k] = word(rows[k * stride + d], rows[k * stride + half + d]);
  for (int k = 0; k < kLanes; ++k)
    for (int64_t d = 0; d < dim; ++d)
      paired[k * stride + d] = word(rows[k * stride + d], rows[(k + kLanes) * stride + d]);
}

// The same number of instructions as multiply_in_registers<float>, each of twice the products.
double multiply_words_in_registers(int64_t k_size, float* out) {
  constexpr int kChains = 12;
  Floats x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = splat<Floats>(out[0] + static_cast<float>(c));
  const Words factor = (Words)splat<Floats>(out[1]), term = (Words)splat<Floats>(out[2]);
  for (int64_t k = 0; k < k_size; ++k) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = add_products(x[c], factor, term);
  }
  Floats sum = Floats{};
  for (int c = 0; c < kChains; ++c) sum += x[c];
  out[3] = sum[0];
  return 4.0 * kChains * kLanes * static_cast<double>(k_size);
}

}  // namespace
}  // namespace supcon
