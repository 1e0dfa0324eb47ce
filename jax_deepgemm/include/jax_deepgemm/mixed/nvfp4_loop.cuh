// Weights of NVFP4, expanded to bf16 in registers, times tokens of bf16. A number of e2m1 times its scale of
// e4m3 has six significant bits, so bf16 holds it, and the product of a whole k stays in the tensor cores'
// sums; the scale of the matrix multiplies them at the end.
//
// clang-format off
//   slab: words of eight numbers, in the order of two fragments (ops/quantize/nvfp4_slabs.py), and 16 scales a row pair
//
//   for each half of a block of k:    issue product, its W in registers
//                                     expand the W of the next half                  | while the tensor core is busy
//                                     wait; behind the second half release the slot
// clang-format on
#pragma once

#include <jax_deepgemm/mixed/fp4.cuh>
#include <jax_deepgemm/mixed/sums.cuh>

namespace jdg {

template <class C>
struct Nvfp4Loop : SlabSums<C> {
  using SlabSums<C>::SlabSums, SlabSums<C>::ring, SlabSums<C>::sums, SlabSums<C>::across;
  using L = MixedLayout<C>;
  using Expanded = u32[4][4];  // by instruction along k

  Expanded weights[2];
  float scale;  // of the matrix

  // Two fragments of this lane's row: `word`, and scales `block` and the next one of four.
  __device__ __forceinline__ static void expand_word(u32 word, u32 scales, int block, u32 (&even)[4],
                                                     u32 (&odd)[4], int half) {
    const u32 which = word & 0x77777777u;
    expand_fp4_to_bf16(which, word, Nvfp4Table(scales, block), even[half], even[2 + half]);
    expand_fp4_to_bf16(which >> 16, word << 4, Nvfp4Table(scales, block + 1), odd[half], odd[2 + half]);
  }

  // Instructions 4 HALF to 4 HALF + 3 of the slot that the ring stands at.
  template <int HALF>
  __device__ __forceinline__ void expand(Expanded& to) const {
    const int thread = threadIdx.x % 128;
    const u32 slab = ring.weights(across), words = slab + slab_unit(thread) * 16 + HALF * 8;
    const float2 upper = ptx::load_shared_2(words), lower = ptx::load_shared_2(words + 2048);
    const float2 scales = ptx::load_shared_2(slab + kSlabScales16 + (HALF * 32 + thread / 4) * 8);
    const float up[2] = {upper.x, upper.y}, low[2] = {lower.x, lower.y};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      expand_word(__float_as_uint(up[j]), __float_as_uint(scales.x), 2 * j, to[2 * j], to[2 * j + 1], 0);
      expand_word(__float_as_uint(low[j]), __float_as_uint(scales.y), 2 * j, to[2 * j], to[2 * j + 1], 1);
    }
  }

  template <int HALF>
  __device__ __forceinline__ void issue(u32 slot, bool first) {
    const ptx::Descriptor tokens = ptx::k_major_descriptor(slot + HALF * L::kTokenTileBytes);
    ptx::pin(sums);
    ptx::pin(weights[HALF]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      C::Mma::issue(sums, weights[HALF][step], tokens.plus(step * 32), !(first && HALF == 0 && step == 0));
    ptx::wgmma_commit();
  }

  // A tile's blocks of k, `blocks` of all warpgroups.
  __device__ __forceinline__ void run(int blocks) {
    const int count = this->share(blocks);
    if (count <= 0) clear(sums), scale = 1.0f;
    if (count > 0) {
      ring.wait_full();
      scale = ptx::load_shared(ring.weights(across) + kSlabBase16);
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

  __device__ __forceinline__ void store(typename C::Out* d, const typename C::Scale* none, const Extents& p,
                                        const GroupTile& at, int matrix) {
#pragma unroll
    for (int i = 0; i < C::ROWS / 2; ++i) sums[i] *= scale;
    SlabSums<C>::store(d, none, p, at, matrix);
  }
};

}  // namespace jdg
