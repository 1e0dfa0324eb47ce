// Weights of a byte, [k, n] as they are stored, int8 or e4m3, expanded to bf16 in registers, times tokens of
// bf16. Their scales, one for each of n, are the epilogue's.
//
// clang-format off
//   a box of 64 of k by 128 of n in shared memory; thread (warp w, g = lane / 4, q = lane % 4):
//     words at row 16 s + {2 q, 2 q + 1, 2 q + 8, 2 q + 9}, n = 32 w + 4 g + {0, 1, 2, 3}     for step s of k
//     bytes 2 t and 2 t + 1 of them: this thread's part of rows g and g + 8 of the product's tile t = 0, 1
//
//   for each half of a block of k:   issue two products of each tile, their W in registers
//                                    expand the W of the next half                  | while the tensor core is busy
//                                    wait; behind the second half release the slot
// clang-format on
//
// The words of a warp lie in all 32 banks, because TMA's swizzle puts equal columns of eight rows into
// different ones.
#pragma once

#include <jax_deepgemm/mixed/sums.cuh>
#include <jax_deepgemm/ptx/bits.cuh>
#include <jax_deepgemm/ptx/convert.cuh>

namespace jdg {

template <class C>
struct ByteLoop : MixedSums<C> {
  using MixedSums<C>::MixedSums, MixedSums<C>::ring, MixedSums<C>::mine, MixedSums<C>::sums;
  using MixedSums<C>::across;
  static constexpr int kPart = C::ROWS / 2;  // sums of a tile of 64
  using Expanded = u32[4][4];                // by tile and step: [tile * 2 + step]

  Expanded weights[2];

  // Bytes `which` of two words as a pair of bf16.
  __device__ __forceinline__ static u32 pair(u32 first, u32 second, int which) {
    if constexpr (C::WEIGHTS == Weights::kInt8)
      return ptx::int8_pair(first, second, which);
    else
      return ptx::e4m3_pair(first, second, which);
  }

  // Steps 2 HALF and 2 HALF + 1 of the slot that the ring stands at.
  template <int HALF>
  __device__ __forceinline__ void expand(Expanded& to) const {
    const int lane = threadIdx.x % 32, column = threadIdx.x % 128 / 32 * 2 + lane / 16, k = lane % 4 * 2;
    const u32 box = ring.weights(across) + lane / 4 % 4 * 4;
    const u32 even = box + k * 128 + (column ^ k) * 16, odd = box + (k + 1) * 128 + (column ^ (k + 1)) * 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const u32 at = (HALF * 2 + step) * 16 * 128;
      const u32 a = __float_as_uint(ptx::load_shared(even + at));
      const u32 b = __float_as_uint(ptx::load_shared(odd + at));
      const u32 c = __float_as_uint(ptx::load_shared(even + at + 8 * 128));
      const u32 d = __float_as_uint(ptx::load_shared(odd + at + 8 * 128));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        u32(&out)[4] = to[tile * 2 + step];
        out[0] = pair(a, b, 2 * tile), out[1] = pair(a, b, 2 * tile + 1);
        out[2] = pair(c, d, 2 * tile), out[3] = pair(c, d, 2 * tile + 1);
      }
    }
  }

  template <int HALF>
  __device__ __forceinline__ void issue(u32 slot, bool first) {
    float (&parts)[2][kPart] = reinterpret_cast<float (&)[2][kPart]>(sums);
    const ptx::Descriptor tokens = ptx::k_major_descriptor(slot);
    ptx::pin(sums);
    ptx::pin(weights[HALF]);
    ptx::wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int step = 0; step < 2; ++step)
        C::Mma::issue(parts[tile], weights[HALF][tile * 2 + step], tokens.plus((HALF * 2 + step) * 32),
                      !(first && HALF == 0 && step == 0));
    ptx::wgmma_commit();
  }

  // A tile's blocks of k, `blocks` of all warpgroups.
  __device__ __forceinline__ void run(int blocks) {
    const int count = this->share(blocks);
    if (count <= 0) clear(sums);
    if (count > 0) {
      ring.wait_full();
      expand<0>(weights[0]);
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const u32 slot = ring.tokens(), empty = ring.empty();
      issue<0>(slot, i == 0);
      expand<1>(weights[1]);
      ptx::wgmma_wait<0>();
      issue<1>(slot, false);
      ring.template move_on<C::DEEP>();
      if (i + 1 < count) {
        ring.wait_full();
        expand<0>(weights[0]);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(sums);
      this->release(empty);
    }
    this->finish_round(blocks);
  }

  // A thread has four neighbouring columns of D of each of its tokens.
  __device__ __forceinline__ void store(typename C::Out* d, const typename C::Scale* scales, const Extents& p,
                                        const GroupTile& at, int matrix) const {
    const int lane = threadIdx.x % 32;
    const int col = at.tile.col + across * 128 + threadIdx.x % 128 / 32 * 32 + lane / 4 * 4;
    if (col >= p.n) return;
    const typename C::Scale* of = scales + static_cast<i64>(max(at.tile.col_batch, 0)) * p.n + col;
    float factor[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) factor[j] = ptx::to_float(of[j]);
    typename C::Out* to = d + static_cast<i64>(matrix) * p.m * p.n + col;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      if (i % 4 >= 2) continue;  // rows g + 8, which are the second of neighbours
      const int row = at.tile.row + i / 4 * 8 + mine.col + i % 2;
      if (row >= at.zeros_end) continue;
      const bool counts = row < at.rows_end;
      float four[4] = {sums[i], sums[i + 2], sums[kPart + i], sums[kPart + i + 2]};
#pragma unroll
      for (int j = 0; j < 4; ++j) four[j] = counts ? factor[j] * four[j] : 0.0f;
      store_four_of(to + static_cast<i64>(row) * p.n, four);
    }
  }

  __device__ __forceinline__ static void store_four_of(float* to, const float (&v)[4]) {
    *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
  }
  __device__ __forceinline__ static void store_four_of(bf16* to, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(to) = {ptx::pack_bf16(v[0], v[1]), ptx::pack_bf16(v[2], v[3])};
  }
};

}  // namespace jdg
