// Weights of FP4, expanded to bf16 in registers, times tokens of bf16; a product of 128 of k is added to the
// sums with the slab's base. Slabs are those for tokens of e4m3, so that a weight is prepared once.
//
// clang-format off
//   a fragment of bf16, 16 of k:      lane q of a quad has k = {2 q, 2 q + 1, 2 q + 8, 2 q + 9}
//   a word of a slab, 32 of k:        lane q has k = 4 q + {0, 1, 2, 3} and 16 + 4 q + {0, 1, 2, 3}
//   so lane q takes pairs q % 2 of the words of lanes q / 2 and 2 + q / 2, for two fragments
//
//   for each half of a block of k:    issue product, its W in registers
//                                     expand the W of the next half                  | while the tensor core is busy
//                                     wait; behind the second half release the slot and add the product
// clang-format on
#pragma once

#include <jax_deepgemm/mixed/fp4.cuh>
#include <jax_deepgemm/mixed/sums.cuh>

namespace jdg {

template <class C>
struct Fp4Bf16Loop : SlabSums<C> {
  using SlabSums<C>::SlabSums, SlabSums<C>::ring, SlabSums<C>::sums, SlabSums<C>::across;
  using L = MixedLayout<C>;
  using Expanded = u32[4][4];  // by instruction along k

  Expanded weights[2];
  float base;  // of the slab that is multiplied
  float product[C::ROWS / 2];

  // Four numbers of each of two fragments: `word` of this lane's row and 32 of k.
  __device__ __forceinline__ static void expand_word(u32 word, const Bf16Table& table, u32 (&even)[4],
                                                     u32 (&odd)[4], int half) {
    const int lane = threadIdx.x % 32, from = lane / 4 * 4 + lane % 4 / 2, pair = lane % 2;
    const u32 near = __shfl_sync(0xFFFFFFFF, word, from), far = __shfl_sync(0xFFFFFFFF, word, from + 2);
    const u32 which = ptx::permute(near, far, 0x6240 + pair * 0x1111) & 0x77777777u;
    const u32 signs = ptx::permute(near, far, 0x5410 + pair * 0x2222);
    expand_fp4_to_bf16(which, signs, table, even[half], even[2 + half]);
    expand_fp4_to_bf16(which >> 16, signs << 4, table, odd[half], odd[2 + half]);
  }

  // Instructions 4 HALF to 4 HALF + 3 of the slot that the ring stands at.
  template <int HALF>
  __device__ __forceinline__ void expand(Expanded& to) const {
    const int thread = threadIdx.x % 128;
    const u32 slab = ring.weights(across), words = slab + slab_unit(thread) * 16 + HALF * 8;
    const float2 upper = ptx::load_shared_2(words), lower = ptx::load_shared_2(words + 2048);
    const float2 exponents = ptx::load_shared_2(slab + kSlabExponents + thread / 4 * 8);
    const float up[2] = {upper.x, upper.y}, low[2] = {lower.x, lower.y};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Bf16Table first(__float_as_uint(exponents.x), HALF * 2 + j);
      const Bf16Table second(__float_as_uint(exponents.y), HALF * 2 + j);
      expand_word(__float_as_uint(up[j]), first, to[2 * j], to[2 * j + 1], 0);
      expand_word(__float_as_uint(low[j]), second, to[2 * j], to[2 * j + 1], 1);
    }
  }

  template <int HALF>
  __device__ __forceinline__ void issue(u32 slot) {
    const ptx::Descriptor tokens = ptx::k_major_descriptor(slot + HALF * L::kTokenTileBytes);
    ptx::pin(product);
    ptx::pin(weights[HALF]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      C::Mma::issue(product, weights[HALF][step], tokens.plus(step * 32), HALF > 0 || step > 0);
    ptx::wgmma_commit();
  }

  // A tile's blocks of k, `blocks` of all warpgroups.
  __device__ __forceinline__ void run(int blocks) {
    const int count = this->share(blocks);
    clear(sums);
    if (count > 0) {
      ring.wait_full();
      expand<0>(weights[0]);
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const u32 slot = ring.tokens(), empty = ring.empty();
      issue<0>(slot);
      expand<1>(weights[1]);
      base = ptx::load_shared(ring.weights(across) + kSlabBase);
      ptx::wgmma_wait<0>();
      issue<1>(slot);
      ring.template move_on<C::DEEP>();
      if (i + 1 < count) {
        ring.wait_full();
        expand<0>(weights[0]);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(product);
      this->release(empty);
#pragma unroll
      for (int j = 0; j < C::ROWS / 2; ++j) sums[j] += base * product[j];
    }
    this->finish_round(blocks);
  }
};

}  // namespace jdg
