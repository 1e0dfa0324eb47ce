// D = A W^T for few tokens A and weights W of four or eight bits, dense or in groups (as
// grouped/gemm_grouped.cuh has them). Bytes of W are what takes the time, so everything is done to have many
// of them on their way.
//
// clang-format off
//   warpgroups 0 .. W-1   consumers (fp4_loop.cuh, fp4_bf16_loop.cuh, nvfp4_loop.cuh, byte_loop.cuh): ACROSS side by side,
//                         kHeight rows of W each, times DEEP, which take a tile's blocks of k in turn
//   a warp behind them    the producer (of a warpgroup where it gives registers away), a block of k a slot:
//                         tokens by TMA; slabs of FP4 by bulk copies, with the tokens' scales by cp.async, which
//                         takes rows of any length; boxes of bytes by TMA
//
//   end of a tile:   DEEP: sums are handed to the first warpgroup, through shared memory, in order
//                    SPLITS: and to block 0 of the cluster, in order
//                    store, columns of the accumulator being rows of D
// clang-format on
//
// Every side walks over the same tiles by itself (grouped/gemm_grouped.cuh: nth_tile), so that no record
// travels. Tiles without products take no slots.
//
// Memory safety: rows and groups are inside their operands whatever the sizes are (group_table.cuh); slabs
// beyond the last are the last one; a token beyond the operand has the last one's scale, and is not stored.
#pragma once

#include <jax_deepgemm/mixed/byte_loop.cuh>
#include <jax_deepgemm/mixed/fp4_bf16_loop.cuh>
#include <jax_deepgemm/mixed/fp4_loop.cuh>
#include <jax_deepgemm/mixed/nvfp4_loop.cuh>
#include <jax_deepgemm/ptx/bulk.cuh>
#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg {

template <class C>
struct MixedOperands {
  const TensorMap* tokens;
  const TensorMap* boxes;           // bytes: [groups, k, n]
  const u8* slabs;                  // FP4: [groups, n / 64, k_blocks][kPartBytes]
  const typename C::Scale* scales;  // kFp4: [rows of all groups, k_blocks] of tokens; else [groups, n] of W
  int k_blocks;
};

template <class C, Weights WEIGHTS = C::WEIGHTS>
struct MixedLoopOf {
  using Type = ByteLoop<C>;
};
template <class C>
struct MixedLoopOf<C, Weights::kFp4> {
  using Type = Fp4Loop<C>;
};
template <class C>
struct MixedLoopOf<C, Weights::kFp4Bf16> {
  using Type = Fp4Bf16Loop<C>;
};
template <class C>
struct MixedLoopOf<C, Weights::kNvfp4> {
  using Type = Nvfp4Loop<C>;
};

// The tiles of a block of threads: those of a matrix, or of groups.
template <class C>
struct MixedTiles {
  const Extents p;
  int tiles;
  GroupTable<C> table;

  __device__ __forceinline__ GroupTile operator[](int number) const {
    if constexpr (C::DENSE) {
      GroupTile out{tile_at<C>(number, p, 0), p.m, p.m};
      out.tile.k_end = 1;
      return out;
    } else {
      return group_tile<C>(table, nth_tile<C>(table, Rounds<C>(tiles), number, p), p, 1);
    }
  }

  // Which of A's and D's matrices a tile belongs to.
  __device__ __forceinline__ static int matrix(const GroupTile& at) {
    return !C::DENSE && GroupTable<C>::kMasked ? at.tile.batch : 0;
  }
};

template <class C>
__device__ __forceinline__ MixedTiles<C> make_tiles(const Groups& groups, const Extents& p, u32 table) {
  MixedTiles<C> out{p, ceil_div(p.m, C::ROWS) * ceil_div(p.n, C::COLS), {}};
  if constexpr (!C::DENSE) {
    out.table = make_table<C>(groups, p, table);
    out.tiles = out.table.tiles;
  }
  return out;
}

// The blocks of k of a tile that are this block's of its cluster.
template <class C>
struct Share {
  int begin, end;
  __device__ __forceinline__ Share(int k_blocks, int rank)
      : begin(k_blocks * rank / C::SPLITS), end(k_blocks * (rank + 1) / C::SPLITS) {}
  __device__ __forceinline__ int count() const { return end - begin; }
};

// --- producer: a whole warp ---

template <class C>
__device__ __forceinline__ void load_token_scales(const MixedRing<C>& ring, const float* scales, int k_blocks,
                                                  const GroupTile& at, const Extents& p, int matrix) {
#pragma unroll
  for (int first = 0; first < C::ROWS; first += 32) {
    const int lane = first + threadIdx.x % 32;
    const i64 row = static_cast<i64>(matrix) * p.m + min(at.tile.row + lane, p.m - 1);
    if (lane < C::ROWS) ptx::copy_async_4(ring.scales() + lane * 4, scales + row * k_blocks);
  }
  ptx::copy_async_arrive(ring.full());
}

template <class C>
__device__ __forceinline__ void load_slabs(const MixedRing<C>& ring, const MixedOperands<C>& in,
                                           const Extents& p, int weight, int col, int kb) {
  const int heights = p.n / 64;
#pragma unroll
  for (int i = 0; i < kAcross<C>; ++i) {
    const i64 height = static_cast<i64>(weight) * heights + min(col / 64 + i, heights - 1);
    const u8* slab = in.slabs + (height * in.k_blocks + kb) * kPartBytes<C>;
    if constexpr (C::ONCE)
      ptx::bulk_load_once(ring.weights(i), slab, kPartBytes<C>, ring.full());
    else
      ptx::bulk_load(ring.weights(i), slab, kPartBytes<C>, ring.full());
  }
}

template <class C>
__device__ __forceinline__ void load_mixed_tile(MixedRing<C>& ring, const MixedOperands<C>& in,
                                                const GroupTile& at, const Extents& p,
                                                const Share<C>& share) {
  using L = MixedLayout<C>;
  constexpr int kTileK = kScaledTokens<C> ? 128 : 64;  // elements of k in a tile of tokens
  const Tile& tile = at.tile;
  const int matrix = MixedTiles<C>::matrix(at), weight = C::DENSE ? 0 : tile.col_batch;
#pragma unroll 1
  for (int kb = share.begin; kb < share.end; ++kb) {
    ring.wait_empty();
    if (ptx::elect()) {
      ring.expect(L::kTokenBytes + L::kWeightsBytes);
      if constexpr (kInSlabs<C>) {
        load_slabs(ring, in, p, weight, tile.col, kb);
      } else {
#pragma unroll
        for (int i = 0; i < kAcross<C>; ++i)
          load_box<C::ONCE>(ring.weights(i), *in.boxes, ring.full(), tile.col + i * 128, kb * 64, weight);
      }
#pragma unroll
      for (int i = 0; i < kTokenTiles<C>; ++i)
        ptx::tma_load(ring.tokens() + i * L::kTokenTileBytes, *in.tokens, ring.full(),
                      (kb * kTokenTiles<C> + i) * kTileK, tile.row, matrix);
    }
    __syncwarp();
    if constexpr (kScaledTokens<C>) load_token_scales<C>(ring, in.scales + kb, in.k_blocks, at, p, matrix);
    ring.template move_on<1>();
  }
#pragma unroll 1
  for (int left = (C::DEEP - share.count() % C::DEEP) % C::DEEP; left > 0; --left) {
    ring.wait_empty();
    __syncwarp();
    if constexpr (kScaledTokens<C>) ring.fill_with_nothing();
    if (ptx::elect()) ring.fill_with_nothing();
    ring.template move_on<1>();
  }
}

template <MixedConfig C>
__device__ __forceinline__ void mixed(const MixedOperands<C>& in, const Groups& groups, const Extents& p,
                                      typename C::Out* d) {
  using L = MixedLayout<C>;
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = warpgroup_index(), rank = C::SPLITS > 1 ? ptx::cluster_rank() : 0;
  constexpr int kProducers =
      kScaledTokens<C> ? 33 : 1;  // the bytes' arrival, and one of each lane for its scales

  if (threadIdx.x == 0) {
    MixedRing<C>(smem, 0).init(128 * kAcross<C>, kProducers);
    if constexpr (C::SPLITS > 1) {
      ptx::mbarrier_init(smem + L::kArrived, 1);
      ptx::mbarrier_expect_bytes(smem + L::kArrived, (C::SPLITS - 1) * L::kTileBytes);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (C::SPLITS > 1) ptx::cluster_arrive();
  ptx::wait_for_previous_kernel();
  const MixedTiles<C> tiles = make_tiles<C>(groups, p, smem + L::kTable);
  __syncthreads();
  if constexpr (C::SPLITS > 1) ptx::cluster_wait();

  const int first = blockIdx.x / C::SPLITS, step = gridDim.x / C::SPLITS;
  const Share<C> share(in.k_blocks, rank);
  if (warpgroup == kWarpgroups<C>) {
    if constexpr (C::PRODUCER_REGISTERS > 0) ptx::lower_registers<C::PRODUCER_REGISTERS>();
    if (warp_index() % 4 > 0) return;
    MixedRing<C> ring(smem, 0);
    for (int number = first; number < tiles.tiles; number += step) {
      const GroupTile at = tiles[number];
      if (whole_warp(at.tile.k_end > 0)) load_mixed_tile<C>(ring, in, at, p, share);
    }
  } else {
    if constexpr (C::PRODUCER_REGISTERS > 0) ptx::raise_registers<C::REGISTERS>();
    typename MixedLoopOf<C>::Type loop(smem, warpgroup);
    for (int number = first; number < tiles.tiles; number += step) {
      const bool any = whole_warp(tiles[number].tile.k_end > 0);
      loop.run(any ? share.count() : 0);
      if (any) loop.gather();
      if (loop.turn > 0) continue;
      if constexpr (C::SPLITS > 1) loop.gather_ranks(rank);
      const GroupTile at = tiles[number];
      if (rank == 0) loop.store(d, in.scales, p, at, MixedTiles<C>::matrix(at));
    }
  }
}

}  // namespace jdg
