// D = A W^T for many tokens A of e4m3 and weights W of FP4, dense or in groups. A warpgroup expands the
// weights of a tile into shared memory, once for two that multiply them from there with up to 256 tokens.
//
// clang-format off
//   warpgroups 0, 1       consumers: parts of 64 tokens in turn, of those that a group still has
//   warpgroup 2           warp 0: tokens by TMA, their scales by cp.async;   warp 1: slabs of W by bulk copies
//   warpgroup 3           the expander: slabs to rows of e4m3 as TMA would have left them
//
//   expander    for each block of k:   wait for its slabs, and for its slot to be free
//                                      expand, fence, hand over the slot and give back the slabs
//   consumer    for each block of k:   for each of its parts:   issue the product
//                                                               scales of tokens times bases of slabs | while the
//                                                               behind the last one: wait full[kb + 1]|  tensor core
//                                                               wait for the product                  |  is busy
//                                                               behind the last one: release slot kb
//                                                               promote
//               store what the group has, through TMA (gemm/epilogue.cuh)
//
//   tokens[STAGES]          ROWS rows of 128 bytes, swizzled    | filled by warp 0 of warpgroup 2
//   scales[STAGES + 1]      a float for each token              |
//   weights[STAGES]         COLS rows of 128 bytes, swizzled    | filled by the expander
//   bases[STAGES + 1]       a float for each 64 of COLS         |
//   slabs[SLAB_STAGES]      a slab for each 64 of COLS
//   staging | pipeline of slots | pipeline of slabs | table of groups
// clang-format on
//
// Every role walks over the same tiles by itself, as in mixed.cuh; so do the hazards of scales and bases, for
// whose sake their rings have a slot more. Products are promoted in the order of gemm/fp8_loop.cuh, so that
// bits are those of the expanded weights' product.
//
// Hazard: expanded weights are written by ordinary stores and read by wgmma: fence.proxy.async between.
#pragma once

#include <jax_deepgemm/mixed/fp4.cuh>
#include <jax_deepgemm/mixed/mixed.cuh>

namespace jdg {

constexpr int kStagedConsumers = 2, kStagedProducer = 2, kExpander = 3;  // warpgroups

template <class C>
struct StagedLayout {
  static constexpr int kHeights = C::COLS / 64, kRings = C::STAGES + 1;
  static constexpr u32 kTokenBytes = C::ROWS * 128, kWeightBytes = C::COLS * 128;
  static constexpr u32 kSlabsBytes = kHeights * kSlabBytes4;
  static constexpr u32 kScaleBytes = C::ROWS * 4, kBaseBytes = 16;
  static_assert(kHeights <= 4, "bases of a slot");

  static constexpr u32 kTokens = 0;
  static constexpr u32 kWeights = kTokens + C::STAGES * kTokenBytes;
  static constexpr u32 kStaging = kWeights + C::STAGES * kWeightBytes;
  static constexpr u32 kSlabs = kStaging + C::STAGING_BYTES;
  static constexpr u32 kScales = kSlabs + C::SLAB_STAGES * kSlabsBytes;
  static constexpr u32 kBases = kScales + kRings * kScaleBytes;
  static constexpr u32 kSlots = kBases + kRings * kBaseBytes;
  static constexpr u32 kSlabSlots = Pipeline<C::STAGES, kSlots>::kEnd;
  static constexpr u32 kTable = Pipeline<C::SLAB_STAGES, kSlabSlots>::kEnd;
  static constexpr u32 kBytes = kTable + C::TABLE_BYTES;
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");
};

// The slots, and the rings of scales and bases, as seen from one side of them.
template <class C>
struct StagedRing : Pipeline<C::STAGES, StagedLayout<C>::kSlots> {
  using L = StagedLayout<C>;
  using Base = Pipeline<C::STAGES, L::kSlots>;
  using Base::smem, Base::stage;

  int scale_slot = 0;

  __device__ __forceinline__ explicit StagedRing(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 tokens() const { return smem + L::kTokens + stage * L::kTokenBytes; }
  __device__ __forceinline__ u32 weights() const { return smem + L::kWeights + stage * L::kWeightBytes; }
  __device__ __forceinline__ u32 scales() const { return smem + L::kScales + scale_slot * L::kScaleBytes; }
  __device__ __forceinline__ u32 bases() const { return smem + L::kBases + scale_slot * L::kBaseBytes; }
  __device__ __forceinline__ void move_on() {
    Base::advance();
    if (++scale_slot == L::kRings) scale_slot = 0;
  }
};

template <class C>
struct SlabRing : Pipeline<C::SLAB_STAGES, StagedLayout<C>::kSlabSlots> {
  using L = StagedLayout<C>;
  using Pipeline<C::SLAB_STAGES, L::kSlabSlots>::Pipeline;
  __device__ __forceinline__ u32 slab(int height) const {
    return this->smem + L::kSlabs + this->stage * L::kSlabsBytes + height * kSlabBytes4;
  }
};

// --- warps of the producer ---

template <class C>
__device__ __forceinline__ void load_tokens(StagedRing<C>& ring, const MixedOperands<C>& in,
                                            const GroupTile& at, const Extents& p) {
  const int matrix = MixedTiles<C>::matrix(at);
#pragma unroll 1
  for (int kb = 0; kb < in.k_blocks; ++kb) {
    ring.wait_empty();
    if (ptx::elect()) {
      ring.expect(StagedLayout<C>::kTokenBytes);
      ptx::tma_load(ring.tokens(), *in.tokens, ring.full(), kb * 128, at.tile.row, matrix);
    }
    __syncwarp();
    load_token_scales<C>(ring, in.scales + kb, in.k_blocks, at, p, matrix);
    ring.move_on();
  }
}

template <class C>
__device__ __forceinline__ void load_tile_slabs(SlabRing<C>& ring, const MixedOperands<C>& in,
                                                const GroupTile& at, const Extents& p) {
  constexpr int kHeights = StagedLayout<C>::kHeights;
  const int heights = p.n / 64;
  const i64 weight = C::DENSE ? 0 : at.tile.col_batch;
  const i64 across = static_cast<i64>(in.k_blocks) * kSlabBytes4;  // from one 64 rows of W to the next
  const u8* first = in.slabs + (weight * heights + at.tile.col / 64) * across;
  const int left = heights - at.tile.col / 64;
#pragma unroll 1
  for (int kb = 0; kb < in.k_blocks; ++kb) {
    ring.wait_empty();
    ring.expect(StagedLayout<C>::kSlabsBytes);
#pragma unroll
    for (int i = 0; i < kHeights; ++i)
      ptx::bulk_load(ring.slab(i), first + (i < left ? i : 0) * across, kSlabBytes4, ring.full());
    first += kSlabBytes4;
    ring.advance();
  }
}

// --- the expander: a whole warpgroup ---

template <class C>
struct Expander {
  StagedRing<C> ring;
  SlabRing<C> slabs;
  u32 chunk[8];  // within eight rows, where this thread's four bytes of each 16 of k are

  __device__ __forceinline__ explicit Expander(u32 smem) : ring(smem), slabs(smem) {
    const int lane = threadIdx.x % 32, row = lane / 4, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk[i] = (warp * 16 + row) * 128 + (i ^ row) * 16 + lane % 4 * 4;
  }

  // Eight rows of each warp of a slab, to rows of the slot from `to` on.
  __device__ __forceinline__ void expand(u32 slab, u32 to, int half) const {
    const int thread = threadIdx.x % 128;
    const uint4 words = ptx::load_shared_16(slab + half * 2048 + thread * 16);
    const u32 exponents = __float_as_uint(ptx::load_shared(slab + kSlabExponents + thread / 4 * 8 + half * 4));
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 first, second;
      expand_fp4(word[j], Fp4Table(exponents, j), first, second);
      ptx::store_shared(to + half * 8 * 128 + chunk[2 * j], __uint_as_float(first));
      ptx::store_shared(to + half * 8 * 128 + chunk[2 * j + 1], __uint_as_float(second));
    }
  }

  __device__ __forceinline__ void run(int blocks) {
#pragma unroll 1
    for (int kb = 0; kb < blocks; ++kb) {
      slabs.wait_full();
      ring.wait_empty();
#pragma unroll
      for (int i = 0; i < StagedLayout<C>::kHeights; ++i) {
        expand(slabs.slab(i), ring.weights() + i * 64 * 128, 0);
        expand(slabs.slab(i), ring.weights() + i * 64 * 128, 1);
        if (threadIdx.x % 128 == i * 32)
          ptx::store_shared(ring.bases() + i * 4, ptx::load_shared(slabs.slab(i) + kSlabBase));
      }
      ptx::fence_proxy_async();
      ptx::mbarrier_arrive(ring.full());
      ptx::mbarrier_arrive(slabs.empty());
      ring.move_on();
      slabs.advance();
    }
  }
};

// --- consumers ---

template <class C>
struct StagedLoop {
  static constexpr int kHeights = C::COLS / 64;

  const int warpgroup;
  StagedRing<C> ring;
  const Fragment mine;
  Accumulator<C> acc;
  float product[C::COLS / 2];

  __device__ __forceinline__ StagedLoop(u32 smem, int warpgroup) : warpgroup(warpgroup), ring(smem) {}

  // The first row of a part within its tile: warpgroups take parts in turn, so that each has its share of
  // however many a group fills.
  __device__ __forceinline__ static int row_of(int part, int warpgroup) {
    return (part * kStagedConsumers + warpgroup) * 64;
  }
  __device__ __forceinline__ static int parts(int rows, int warpgroup) {
    return max(0, min(kParts<C>, ceil_div(rows - warpgroup * 64, 64 * kStagedConsumers)));
  }

  // One part of the slot that the ring stands at. FINAL: the last one; `more`: whether a block follows.
  template <bool FINAL>
  __device__ __forceinline__ void multiply(int part, bool more) {
    const ptx::Descriptor rows = ptx::k_major_descriptor(ring.tokens() + row_of(part, warpgroup) * 128);
    const ptx::Descriptor cols = ptx::k_major_descriptor(ring.weights());
    const u32 empty = ring.empty(), scales = ring.scales() + (row_of(part, warpgroup) + mine.row) * 4;
    ptx::pin(product);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      C::Mma::issue(product, rows.plus(step * 32), cols.plus(step * 32), step > 0);
    ptx::wgmma_commit();
    const float upper = ptx::load_shared(scales), lower = ptx::load_shared(scales + 8 * 4);
    float uppers[kHeights], lowers[kHeights];
#pragma unroll
    for (int i = 0; i < kHeights; ++i) {
      const float base = ptx::load_shared(ring.bases() + i * 4);
      uppers[i] = upper * base, lowers[i] = lower * base;
    }
    if constexpr (FINAL) {
      ring.move_on();
      if (more) ring.wait_full();
    }
    ptx::wgmma_wait<0>();
    ptx::pin(product);
    if constexpr (FINAL) ring.release(empty);
#pragma unroll
    for (int i = 0; i < C::COLS / 2; i += 4) {
      acc[part][i] += uppers[i / 32] * product[i];
      acc[part][i + 1] += uppers[i / 32] * product[i + 1];
      acc[part][i + 2] += lowers[i / 32] * product[i + 2];
      acc[part][i + 3] += lowers[i / 32] * product[i + 3];
    }
  }

  template <int PARTS>
  __device__ __forceinline__ void run_parts(int blocks) {
    ring.wait_full();
#pragma unroll 1
    for (int kb = 0; kb < blocks; ++kb) {
#pragma unroll
      for (int part = 0; part + 1 < PARTS; ++part) multiply<false>(part, false);
      multiply<true>(PARTS - 1, kb + 1 < blocks);
    }
  }

  __device__ __forceinline__ void pass(int blocks) {
#pragma unroll 1
    for (int kb = 0; kb < blocks; ++kb) {
      ring.wait_full();
      __syncwarp();  // see Pipeline::pass
      ring.release(ring.empty());
      ring.move_on();
    }
  }

  // A tile's blocks of k, for so many of its rows.
  __device__ __forceinline__ void run(int blocks, int rows) {
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) clear(acc[part]);
    if (blocks == 0) return;
    const int count = parts(rows, warpgroup);
    if (kParts<C> > 1 && whole_warp(count > 1))
      run_parts<kParts<C>>(blocks);
    else if (whole_warp(count > 0))
      run_parts<1>(blocks);
    else
      pass(blocks);
  }

  __device__ __forceinline__ void store(const TensorMap* d_map, typename C::Out* d, const Extents& p,
                                        const GroupTile& at) {
    const u32 slabs = ring.smem + StagedLayout<C>::kStaging + ptx::thread_index() / 32 * C::SLABS * kSlabBytes;
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) {
      const int first = at.tile.row + row_of(part, ptx::thread_index() / 128);
      clear_rows_from<C>(acc[part], first, at.rows_end);
      store_group_tile<C>(acc[part], d_map, d, nullptr, slabs, p, at, first);
    }
  }
};

template <class C>
  requires MixedConfig<C> && GemmConfig<C>
__device__ __forceinline__ void staged(const MixedOperands<C>& in, const Groups& groups, const Extents& p,
                                       const TensorMap* d_map, typename C::Out* d) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = warpgroup_index();
  constexpr int kFillers = 1 + 32 + 128;  // the tokens' bytes, lanes of their scales, the expander

  if (threadIdx.x == 0) {
    StagedRing<C>(smem).init(128 * kStagedConsumers, kFillers);
    SlabRing<C>(smem).init(128);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_previous_kernel();
  const MixedTiles<C> tiles = make_tiles<C>(groups, p, smem + StagedLayout<C>::kTable);
  __syncthreads();

  const auto each_product = [&](auto&& work) {
    for (int number = blockIdx.x; number < tiles.tiles; number += gridDim.x) {
      const GroupTile at = tiles[number];
      if (whole_warp(at.tile.k_end > 0)) work(at);
    }
  };
  if (warpgroup == kStagedProducer) {
    ptx::lower_registers<C::PRODUCER_REGISTERS>();
    if (warp_index() % 4 == 0) {
      StagedRing<C> ring(smem);
      each_product([&](const GroupTile& at) { load_tokens<C>(ring, in, at, p); });
    } else if (warp_index() % 4 == 1 && ptx::elect()) {
      SlabRing<C> ring(smem);
      for (int number = blockIdx.x; number < tiles.tiles; number += gridDim.x) {
        const GroupTile at = tiles[number];
        if (at.tile.k_end > 0) load_tile_slabs<C>(ring, in, at, p);
      }
    }
  } else if (warpgroup == kExpander) {
    ptx::lower_registers<C::EXPANDER_REGISTERS>();
    Expander<C> expander(smem);
    each_product([&](const GroupTile&) { expander.run(in.k_blocks); });
  } else {
    ptx::raise_registers<C::REGISTERS>();
    StagedLoop<C> loop(smem, warpgroup);
    for (int number = blockIdx.x; number < tiles.tiles; number += gridDim.x) {
      const GroupTile at = tiles[number];
      loop.run(whole_warp(at.tile.k_end > 0) ? in.k_blocks : 0, at.rows_end - at.tile.row);
      loop.store(d_map, d, p, tiles[number]);
    }
    if (C::TMA_STORE) ptx::tma_store_wait_read();
  }
}

}  // namespace jdg
