// Numbers of a byte as bf16, two at a time, the first in the low half. Exact.
#pragma once

#include <jax_deepgemm/ptx/bits.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

// Two products of bf16, rounded to nearest even.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
  u32 products;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(products) : "r"(a), "r"(b));
  return products;
}

// Byte `which` of each of two words of int8. 2^23 + x + 128 is a float whose last byte is that of x with its
// first bit turned.
__device__ __forceinline__ u32 int8_pair(u32 first, u32 second, int which) {
  constexpr u32 kTurn = 0x80808080u, kMagic = 0x4B000000u;
  constexpr float kOffset = 8388608.0f + 128.0f;
  const u32 bytes = 0x7440 + which;
  return pack_bf16(__uint_as_float(permute(first ^ kTurn, kMagic, bytes)) - kOffset,
                   __uint_as_float(permute(second ^ kTurn, kMagic, bytes)) - kOffset);
}

// Byte `which` of each of two words of e4m3. Its bits in their places of bf16 are 2^-120 times the number.
// Its NaN becomes 480.
__device__ __forceinline__ u32 e4m3_high_bytes(u32 spread) {
  constexpr u32 kScale = 0x7B807B80u;  // 2^120
  const u32 bits = (spread & 0x80008000u) | (spread >> 4 & 0x07F007F0u);
  return multiply_pairs(bits, kScale);
}
// As f16: their places there make 2^-8 times the number.
__device__ __forceinline__ u32 e4m3_high_bytes_f16(u32 spread) {
  constexpr u32 kScale = 0x5C005C00u;  // 2^8
  const u32 bits = (spread & 0x80008000u) | (spread >> 1 & 0x3F803F80u);
  u32 numbers;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(numbers) : "r"(bits), "r"(kScale));
  return numbers;
}
__device__ __forceinline__ u32 e4m3_pair(u32 first, u32 second, int which) {
  return e4m3_high_bytes(permute(first, second, 0x4400 + which * 0x1111));
}

// Bytes FIRST and SECOND of a word of e4m3, as f16 or bf16.
template <bool F16, int FIRST, int SECOND>
__device__ __forceinline__ u32 e4m3_bytes(u32 word) {
  const u32 spread = permute(word, word, FIRST * 0x0011 + SECOND * 0x1100);
  return F16 ? e4m3_high_bytes_f16(spread) : e4m3_high_bytes(spread);
}

}  // namespace jdg::ptx
