// FP4 (e2m1) to e4m3 or bf16 in registers, exactly: value * 2^(e - 6) for a relative exponent e of 1 to 12,
// one of 32 numbers of a row.
//
// The eight magnitudes of e2m1, scaled, are eight bytes, and prmt takes four bytes of eight by their numbers:
// a look-up of four magnitudes in one instruction, in a table that takes two multiplications to make.
#pragma once

#include <jax_deepgemm/ptx/convert.cuh>

namespace jdg {

// Where, in units of 16 bytes, the words of thread t = 32 w + 4 g + q of a half of a slab are: q ^ g / 2, so
// that eight rows' words of one q lie on all banks, as those of two rows do.
__device__ __forceinline__ int slab_unit(int t) { return t ^ t / 8 % 4; }

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

// bf16 of e2m1, in two tables as it has two bytes; their scale is a multiplication.
struct Bf16Table {
  static constexpr u32 kUpperLow = 0x3F3F3F00u,
                       kUpperHigh = 0x40404040u;  // upper bytes of 0 .. 1.5 and of 2 .. 6
  u32 factor;                                     // 2^(e - 6), twice

  __device__ __forceinline__ Bf16Table(u32 exponents, int which) {
    factor = ptx::permute(exponents, 0, 0x4440 + which) * 0x00800080u + 121 * 0x00800080u;
  }
};

// The same of NVFP4. A scale's code has five bits of exponent and three of mantissa, as e4m3 has with its
// subnormal numbers made normal. Magnitudes are 2^-118 times theirs, and the scale 2^118 times its own, so
// that the code of NaN is a NaN.
struct Nvfp4Table {
  static constexpr u32 kUpperLow = 0x04040400u, kUpperHigh = 0x05050505u;
  u32 factor;

  __device__ __forceinline__ Nvfp4Table(u32 scales, int which) {
    factor = ptx::permute(scales, 0, 0x4440 + which) * 0x00100010u + 0x76007600u;
  }
};

// Four numbers by their magnitudes, nibbles, and signs, the highest bits of bytes; as two pairs.
template <class Table>
__device__ __forceinline__ void expand_fp4_to_bf16(u32 which, u32 signs, const Table& table, u32& first,
                                                   u32& second) {
  const u32 low = ptx::permute(0xC0800000u, 0xC0804000u, which);
  const u32 high = ptx::permute(Table::kUpperLow, Table::kUpperHigh, which) | (signs & 0x80808080u);
  first = ptx::multiply_pairs(ptx::permute(low, high, 0x5140), table.factor);
  second = ptx::multiply_pairs(ptx::permute(low, high, 0x7362), table.factor);
}

}  // namespace jdg
