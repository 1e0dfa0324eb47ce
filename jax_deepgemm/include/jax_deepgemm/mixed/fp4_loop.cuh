// Weights of FP4, expanded to e4m3 in registers, times tokens of e4m3; a product of 128 of k is promoted to
// float32 by the slab's base and the token's scale.
//
// clang-format off
//   for each block of k of this warpgroup:   issue product i, its W in registers
//                                            wait full[i + 1], expand its W       | while the tensor core is busy
//                                            wait for product i, release slot i
//                                            promote: sums += base of the slab * scale of the token * product
// clang-format on
#pragma once

#include <jax_deepgemm/mixed/fp4.cuh>
#include <jax_deepgemm/mixed/sums.cuh>

namespace jdg {

template <class C>
struct Fp4Loop : SlabSums<C> {
  using SlabSums<C>::SlabSums, SlabSums<C>::ring, SlabSums<C>::mine, SlabSums<C>::sums;
  using SlabSums<C>::across;
  using Expanded = u32[4][4];  // by instruction along k

  Expanded weights[2];
  float base[2];
  float product[C::ROWS / 2];

  // The weights of the slot that the ring stands at.
  __device__ __forceinline__ void expand(Expanded& to, float& slab_base) const {
    const int thread = threadIdx.x % 128;
    const u32 slab = ring.weights(across);
    const float4 upper = ptx::load_shared_4(slab + slab_unit(thread) * 16);
    const float4 lower = ptx::load_shared_4(slab + 2048 + slab_unit(thread) * 16);
    const float2 exponents = ptx::load_shared_2(slab + kSlabExponents + thread / 4 * 8);
    slab_base = ptx::load_shared(slab + kSlabBase);
    const float up[4] = {upper.x, upper.y, upper.z, upper.w}, low[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      expand_fp4(__float_as_uint(up[j]), Fp4Table(__float_as_uint(exponents.x), j), to[j][0], to[j][2]);
      expand_fp4(__float_as_uint(low[j]), Fp4Table(__float_as_uint(exponents.y), j), to[j][1], to[j][3]);
    }
  }

  // Block WHICH of a pair; `more`: whether another one follows, whose weights are expanded meanwhile.
  template <int WHICH>
  __device__ __forceinline__ void multiply(bool more) {
    const ptx::Descriptor tokens = ptx::k_major_descriptor(ring.tokens());
    const u32 empty = ring.empty(), scales = ring.scales() + mine.col * 4;
    ptx::pin(product);
    ptx::pin(weights[WHICH]);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      C::Mma::issue(product, weights[WHICH][step], tokens.plus(step * 32), step > 0);
    ptx::wgmma_commit();
    ring.template move_on<C::DEEP>();
    if (more) {
      ring.wait_full();
      expand(weights[1 - WHICH], base[1 - WHICH]);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(product);
    this->release(empty);
#pragma unroll
    for (int i = 0; i < C::ROWS / 2; i += 4) {
      const float2 pair = ptx::load_shared_2(scales + i * 8);
      const float even = base[WHICH] * pair.x, odd = base[WHICH] * pair.y;
      sums[i] += even * product[i];
      sums[i + 1] += odd * product[i + 1];
      sums[i + 2] += even * product[i + 2];
      sums[i + 3] += odd * product[i + 3];
    }
  }

  // A tile's blocks of k, `blocks` of all warpgroups.
  __device__ __forceinline__ void run(int blocks) {
    int left = this->share(blocks);
    clear(sums);
    if (left > 0) {
      ring.wait_full();
      expand(weights[0], base[0]);
    }
#pragma unroll 1
    for (; left > 1; left -= 2) {
      multiply<0>(true);
      multiply<1>(left > 2);
    }
    if (left == 1) multiply<0>(false);
    this->finish_round(blocks);
  }
};

}  // namespace jdg
