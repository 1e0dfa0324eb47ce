// FP4 (e2m1) to e4m3 in registers, exactly: value * 2^(e - 6) for a relative exponent e of 1 to 12, one of 32
// numbers of a row.
//
// The eight magnitudes of e2m1, scaled, are eight bytes, and prmt takes four bytes of eight by their numbers:
// a look-up of four magnitudes in one instruction, in a table that takes two multiplications to make.
#pragma once

#include <jax_deepgemm/ptx/bits.cuh>

namespace jdg {

struct Fp4Table {
  u32 low, high;  // e4m3 of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6, times 2^(e - 6)

  // From byte `which` of four exponents.
  __device__ __forceinline__ Fp4Table(u32 exponents, int which) {
    const u32 e = ptx::permute(exponents, 0, 0x4440 + which);
    low = e * 0x08080800u + 0x0C080000u;
    high = e * 0x08080808u + 0x1C181410u;
  }
};

// Eight numbers of a word: magnitudes are nibbles, of which prmt reads three bits; signs stand in their
// fourth bits, those of the first four numbers at bits 7, 15, 23, 31, of the others at 3, 11, 19, 27.
__device__ __forceinline__ void expand_fp4(u32 word, const Fp4Table& table, u32& first, u32& second) {
  const u32 which = word & 0x77777777u;
  first = ptx::permute(table.low, table.high, which) | (word & 0x80808080u);
  second = ptx::permute(table.low, table.high, which >> 16) | (word << 4 & 0x80808080u);
}

}  // namespace jdg
