// What an instruction set's file provides, from the sources that each of them compiles for itself.

#pragma once

#include "epilogues.h"
#include "row.h"
#include "supcon.h"

namespace supcon {
namespace {

template <typename Real>
constexpr Functions<Real> functions() {
  constexpr int kPanel = kVectors * Simd<Real>::kLanes;
  return {kPanel,
          tile_forward<Products<Real>>,
          tile_weigh<Products<Real>>,
          add_to_rows<Real>,
          add_to_cols<Real>,
          widen_row<Real>,
          embed_row<Real>,
          pack_rows<Real, kPanel>,
          nullptr,
          dots_of_tile<Real>,
          dot<Real, Real>,
          dot<Real, double>,
          add_row<Real>,
          attract_row<Real>,
          finish_row<Real>,
          multiply_in_registers<Real>};
}

}  // namespace
}  // namespace supcon
