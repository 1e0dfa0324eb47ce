// Linear columns: the half of a sum over heads that tensor cores can have, in FP8.
//
// max(x, 0) is (x + |x|) / 2. Of sum_h w[h] (x[h] + |x[h]|), where x[h] is a head's product with a key, the
// part without |.| is the product of the key with one row, sum_h w[h] q[h]. That row, as four digits of
// e4m3 each 16 times finer than the one before, becomes columns of the bank behind those of its heads; what
// is left to do of every x is one multiply-add of its absolute value.
//
// clang-format off
//   a bank's rows in shared memory:  queries of its tokens [TOKENS * HEADS] | linear columns [LINEAR]
//   eight of these for two tokens:   digit 0 of both | digit 1 of both | digit 2 of both | digit 3 of both
// clang-format on
//
// So each lane of a quad of an accumulator has one digit of both tokens, and adds it to what it sums up.
//
// The four digits have 16 bits, more than the tensor cores keep of FP8 products (about 13); where the sum is
// small beside its parts, their errors are seen: they belong to sum_h |w[h] x[h]|.
//
// Warps of their own write the columns while those of the tokens before are multiplied.
//
// Hazard: written by ordinary stores, read by wgmma: fence.proxy.async.
#pragma once

#include <jax_deepgemm/indexer/config.cuh>
#include <jax_deepgemm/ptx/fp8.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg {

constexpr int kDigits = 4;
constexpr float kDigitBase = 16.0f;

// What a digit is multiplied by.
__device__ __forceinline__ float digit_value(int digit) { return __int_as_float((127 - 4 * digit) << 23); }

// 2^(exponent - 127); exponents are those of float's bits.
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float(exponent << 23); }

// The four numbers of a row that are this lane's, in swizzled shared memory.
__device__ __forceinline__ u32 four_of_lane(u32 rows, int row) {
  const int lane = threadIdx.x % 32;
  return rows + row * kSlabBytes + (lane / 4 ^ row % 8) * 16 + lane % 4 * 4;
}

__device__ __forceinline__ float4 unpack_four(u32 bits) {
  const float2 low = ptx::unpack_e4m3(static_cast<u16>(bits)), high = ptx::unpack_e4m3(bits >> 16);
  return {low.x, low.y, high.x, high.y};
}

// sum_h w[h] q[h] of a token, by a warp.
template <class C>
__device__ __forceinline__ float4 weighted_sum(u32 queries, int row, u32 weights) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
  for (int head = 0; head < C::HEADS; head += 4) {
    const float4 four = ptx::load_shared_4(weights + head * 4);
    const float w[4] = {four.x, four.y, four.z, four.w};
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bits[i] = __float_as_uint(ptx::load_shared(four_of_lane(queries, row + head + i)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 q = unpack_four(bits[i]);
      sum.x += w[i] * q.x, sum.y += w[i] * q.y, sum.z += w[i] * q.z, sum.w += w[i] * q.w;
    }
  }
  return sum;
}

// A step that makes the largest of a warp's numbers 128 to 256, as float's exponent: their first digit is
// then no more than e4m3 has, 448.
__device__ __forceinline__ int exponent_of_step(const float4& v) {
  const float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  const int exponent = __reduce_max_sync(0xFFFFFFFF, __float_as_int(largest)) >> 23;
  return max(8, min(exponent, 254)) - 7;
}

// The linear columns of one token, by a warp.
template <class C>
__device__ __forceinline__ void write_linear_columns(const Queries<C>& queries, int token) {
  const int bank = token / C::TOKENS, within = token % C::TOKENS, first = bank * kBankCols<C>;
  const u32 weights = queries.weights() + token * C::HEADS * 4;
  float4 rest = weighted_sum<C>(queries.queries(), first + within * C::HEADS, weights);
  const int exponent = exponent_of_step(rest);
  if (threadIdx.x % 32 == 0) ptx::store_shared(queries.token(token) + kTokenStep, power_of_two(exponent));
  const float inverse = power_of_two(254 - exponent);
  rest.x *= inverse, rest.y *= inverse, rest.z *= inverse, rest.w *= inverse;
  const int column = first + kBankHeads<C> + within / 2 * 2 * kDigits + within % 2;
#pragma unroll
  for (int digit = 0; digit < kDigits; ++digit) {
    const u32 low = ptx::pack_e4m3(rest.x, rest.y), high = ptx::pack_e4m3(rest.z, rest.w);
    const u32 bits = low | high << 16;
    ptx::store_shared(four_of_lane(queries.queries(), column + 2 * digit), __uint_as_float(bits));
    const float4 had = unpack_four(bits);
    rest = {(rest.x - had.x) * kDigitBase, (rest.y - had.y) * kDigitBase, (rest.z - had.z) * kDigitBase,
            (rest.w - had.w) * kDigitBase};
  }
}

// Those of all tokens, by one of kLinearWarps warps.
template <class C>
__device__ __forceinline__ void write_linear_columns(u32 smem, int worker) {
  Queries<C> queries(smem);
  for (;; queries.advance()) {
    queries.wait_full();
    const int tiles = __float_as_int(ptx::load_shared_4(queries.run()).y);
    if (tiles == 0) return;
#pragma unroll 1
    for (int token = worker; token < kBlockTokens<C>; token += kLinearWarps)
      write_linear_columns<C>(queries, token);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(queries.ready());
  }
}

}  // namespace jdg
