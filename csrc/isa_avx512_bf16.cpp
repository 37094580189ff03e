// AVX-512 with BF16: twice as many products of bfloat16 in an instruction as of float32. What is
// not a product is as for AVX-512.

#define SUPCON_VECTOR_BYTES 64
#define SUPCON_KERNEL_ROWS 8
#include "epilogues.h"
#include "products_bfloat16.h"
#include "row.h"

namespace supcon {
namespace {

void weigh_words(const TilePair<float>& t) {
  tile_weigh<Bfloat16Products>(t);
  round_weights(t);
}

}  // namespace

extern const Functions<float> kBfloat16OfAvx512;
const Functions<float> kBfloat16OfAvx512 = {kPanel,
                                            tile_forward<Bfloat16Products>,
                                            weigh_words,
                                            add_words_to_rows,
                                            add_words_to_cols,
                                            widen_row<float>,
                                            embed_row<float>,
                                            nullptr,
                                            pack_words,
                                            dots_of_words,
                                            dot<float>,
                                            dot_sum<float>,
                                            add_row<float>,
                                            attract_row<float>,
                                            finish_row<float>,
                                            nullptr,  // masks and soft labels are not its own
                                            nullptr,
                                            nullptr,
                                            nullptr,
                                            multiply_words_in_registers};
}  // namespace supcon
