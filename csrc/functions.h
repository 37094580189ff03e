// What an instruction set's file provides, from the sources that each of them compiles for itself.

#pragma once

#include "elements.h"
#include "epilogues.h"
#include "row.h"
#include "supcon.h"
#include "weighted.h"

namespace supcon {
namespace {

template <typename Real>
constexpr Functions<Real> functions() {
  constexpr int kPanel = kVectors * Simd<Real>::kLanes;
  return {kPanel,
          any_forward<Real>,
          any_weigh<Real>,
          add_to_rows<Real>,
          add_to_cols<Real>,
          widen_row<Real>,
          embed_row<Real>,
          pack_rows<Real>,
          nullptr,
          dots_of_tile<Real>,
          dot<Real>,
          dot_sum<Real>,
          add_row<Real>,
          attract_row<Real>,
          finish_row<Real>,
          read_elements,
          scale_elements<Real>,
          accumulate_elements<Real>,
          encode_weights<Real>,
          multiply_in_registers<Real>};
}

}  // namespace
}  // namespace supcon
