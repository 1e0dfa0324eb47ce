// D = A W^T for few tokens A in FP8 and weights W in FP4, dense or in groups (as grouped/gemm_grouped.cuh has
// them). Bytes of W are what takes the time, so everything is done to have many of them on their way.
//
// clang-format off
//   warpgroups 0 .. W-1   consumers: ACROSS side by side, 64 rows of W each, times DEEP, which take a tile's
//                         blocks of k in turn
//   a warp behind them    the producer (of a warpgroup where it gives registers away), one block of k a slot: tokens by TMA, slabs of W by bulk copies, the
//                         tokens' scales by cp.async, which takes rows of any length
//
//   consumer, for each of its blocks of k:   issue product i, its W in registers
//                                            wait full[i + 1], expand its W      | while the tensor core is busy
//                                            wait for product i, release slot i
//                                            promote: sums += base of the slab * scale of the token * product
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

#include <jax_deepgemm/mixed/config.cuh>
#include <jax_deepgemm/mixed/fp4.cuh>
#include <jax_deepgemm/ptx/bulk.cuh>
#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg {

struct MixedOperands {
  const TensorMap* tokens;
  const float* scales;  // [rows of all groups, k_blocks]
  const u8* slabs;      // [groups, n / 64, k_blocks][kWeightSlabBytes]
  int k_blocks;
};

// The pipeline and the ring of scales, as seen from one side of them, STEP slots at a time.
template <class C>
struct MixedRing : Pipeline<C::STAGES, MixedLayout<C>::kPipeline> {
  using L = MixedLayout<C>;
  using Base = Pipeline<C::STAGES, L::kPipeline>;
  using Base::smem, Base::stage, Base::phase;

  int scale_slot;

  __device__ __forceinline__ MixedRing(u32 base, int first) : Base(base), scale_slot(first) { stage = first; }
  __device__ __forceinline__ u32 tokens() const { return smem + L::kTokens + stage * L::kTokenBytes; }
  __device__ __forceinline__ u32 slab(int across) const {
    return smem + L::kSlabs + stage * L::kSlabsBytes + across * kWeightSlabBytes;
  }
  __device__ __forceinline__ u32 scales() const { return smem + L::kScales + scale_slot * L::kScaleBytes; }

  template <int STEP>
  __device__ __forceinline__ void move_on() {
    stage += STEP;
    scale_slot += STEP;
    if (stage >= C::STAGES) stage -= C::STAGES, phase ^= 1;
    if (scale_slot >= L::kScaleSlots) scale_slot -= L::kScaleSlots;
  }
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
};

template <class C>
__device__ __forceinline__ MixedTiles<C> make_tiles(const Groups& groups, const Extents& p, u32 smem) {
  MixedTiles<C> out{p, ceil_div(p.m, C::ROWS) * ceil_div(p.n, C::COLS), {}};
  if constexpr (!C::DENSE) {
    out.table = make_table<C>(groups, p, smem + MixedLayout<C>::kTable);
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
__device__ __forceinline__ void load_mixed_tile(MixedRing<C>& ring, const MixedOperands& in,
                                                const GroupTile& at, const Extents& p, const Share<C>& share) {
  using L = MixedLayout<C>;
  const Tile& tile = at.tile;
  const int matrix = !C::DENSE && GroupTable<C>::kMasked ? tile.batch : 0, heights = p.n / 64;
  const int weight = C::DENSE ? 0 : tile.col_batch;
#pragma unroll 1
  for (int kb = share.begin; kb < share.end; ++kb) {
    ring.wait_empty();
    if (ptx::elect()) {
      ring.expect(L::kTokenBytes + L::kSlabsBytes);
#pragma unroll
      for (int i = 0; i < kAcross<C>; ++i) {
        const i64 height = static_cast<i64>(weight) * heights + min(tile.col / 64 + i, heights - 1);
        const u8* slab = in.slabs + (height * in.k_blocks + kb) * kWeightSlabBytes;
        if constexpr (C::ONCE)
          ptx::bulk_load_once(ring.slab(i), slab, kWeightSlabBytes, ring.full());
        else
          ptx::bulk_load(ring.slab(i), slab, kWeightSlabBytes, ring.full());
      }
      ptx::tma_load(ring.tokens(), *in.tokens, ring.full(), kb * 128, tile.row, matrix);
    }
    __syncwarp();
    load_token_scales<C>(ring, in.scales + kb, in.k_blocks, at, p, matrix);
    ring.template move_on<1>();
  }
#pragma unroll 1
  for (int left = (C::DEEP - share.count() % C::DEEP) % C::DEEP; left > 0; --left) {
    ring.wait_empty();
    __syncwarp();
    ring.fill_with_nothing();
    if (ptx::elect()) ring.fill_with_nothing();
    ring.template move_on<1>();
  }
}

// --- consumers ---

template <class C>
struct MixedLoop {
  using L = MixedLayout<C>;
  using Weights = u32[4][4];  // by instruction along k

  const int across, turn;  // which 64 rows of the tile, and which of every DEEP blocks of k
  MixedRing<C> ring;
  const Fragment mine;
  Weights weights[2];
  float base[2];
  float product[C::ROWS / 2], sums[C::ROWS / 2];

  __device__ __forceinline__ MixedLoop(u32 smem, int warpgroup)
      : across(warpgroup % kAcross<C>), turn(warpgroup / kAcross<C>), ring(smem, turn) {}

  // The weights of the slot that the ring stands at.
  __device__ __forceinline__ void expand(Weights& to, float& slab_base) const {
    const int thread = threadIdx.x % 128;
    const u32 slab = ring.slab(across);
    const float4 upper = ptx::load_shared_4(slab + thread * 16);
    const float4 lower = ptx::load_shared_4(slab + 2048 + thread * 16);
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
    if (threadIdx.x % 32 == 0) ring.release(empty);
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
    int left = (blocks - turn + C::DEEP - 1) / C::DEEP;
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
    if (C::DEEP > 1 && blocks % C::DEEP > 0 && blocks % C::DEEP <= turn) {
      ring.pass();
      ring.template move_on<C::DEEP>();
    }
  }

  // --- sums of several ---
  __device__ __forceinline__ u32 place(u32 area, int from) const {
    return area + (from * kAcross<C> + across) * 64 * C::ROWS * 4 + threadIdx.x % 128 * 8;
  }
  __device__ __forceinline__ void add_from(u32 area, int from) {
#pragma unroll
    for (int i = 0; i < C::ROWS / 2; i += 2) {
      const float2 pair = ptx::load_shared_2(place(area, from) + i * 512);
      sums[i] += pair.x, sums[i + 1] += pair.y;
    }
  }
  // The first warpgroup of those that share k has all sums then.
  __device__ __forceinline__ void gather() {
    if constexpr (C::DEEP > 1) {
      const u32 area = ring.smem + L::kSums;
      if (turn > 0) {
#pragma unroll
        for (int i = 0; i < C::ROWS / 2; i += 2)
          ptx::store_shared_2(place(area, turn - 1) + i * 512, sums[i], sums[i + 1]);
      }
      ptx::named_barrier<1, 128 * kWarpgroups<C>>();
      if (turn == 0) {
#pragma unroll
        for (int from = 0; from < C::DEEP - 1; ++from) add_from(area, from);
      }
      ptx::named_barrier<1, 128 * kWarpgroups<C>>();
    }
  }
  // Block 0 of the cluster has all sums then.
  __device__ __forceinline__ void gather_ranks(int rank) {
    const u32 area = ring.smem + L::kFromRanks, arrived = ring.smem + L::kArrived;
    if (rank == 0) {
      ptx::mbarrier_wait_cluster(arrived, 0);
#pragma unroll
      for (int from = 0; from < C::SPLITS - 1; ++from) add_from(area, from);
    } else {
      const u32 to = ptx::map_to_rank(place(area, rank - 1), 0), bar = ptx::map_to_rank(arrived, 0);
#pragma unroll
      for (int i = 0; i < C::ROWS / 2; i += 2) ptx::store_async_2(to + i * 512, sums[i], sums[i + 1], bar);
    }
  }

  // --- D ---
  // Neighbouring rows of the weight are neighbours in D. Threads that have them exchange one of two tokens.
  __device__ __forceinline__ void store(typename C::Out* d, const Extents& p, const GroupTile& at) const {
    const int col = at.tile.col + across * 64 + mine.row / 2 * 2;
    if (at.tile.col + across * 64 >= p.n) return;
    const bool odd = mine.row % 2 != 0;
    const int matrix = !C::DENSE && GroupTable<C>::kMasked ? at.tile.batch : 0;
    const int first = at.tile.row + mine.col + odd;
    typename C::Out* to = d + (static_cast<i64>(matrix) * p.m + first) * p.n + col;
#pragma unroll
    for (int i = 0; i < C::ROWS / 2; i += 2) {
      const float other = __shfl_xor_sync(0xFFFFFFFF, odd ? sums[i] : sums[i + 1], 4);
      const int row = first + i / 4 * 8;
      const bool counts = row < at.rows_end;
      const float low = odd ? other : sums[i], high = odd ? sums[i + 1] : other;
      if (row < at.zeros_end)
        store_pair(to + static_cast<i64>(i / 4 * 8) * p.n + i / 2 % 2 * 8, counts ? low : 0.0f,
                   counts ? high : 0.0f);
    }
  }
};

template <MixedConfig C>
__device__ __forceinline__ void mixed(const MixedOperands& in, const Groups& groups, const Extents& p,
                                      typename C::Out* d) {
  using L = MixedLayout<C>;
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = warpgroup_index(), rank = C::SPLITS > 1 ? ptx::cluster_rank() : 0;
  constexpr int kProducers = 33;  // the bytes' arrival, and one of each lane for its scales

  if (threadIdx.x == 0) {
    MixedRing<C>(smem, 0).init(4 * kAcross<C>, kProducers);
    if constexpr (C::SPLITS > 1) {
      ptx::mbarrier_init(smem + L::kArrived, 1);
      ptx::mbarrier_expect_bytes(smem + L::kArrived, (C::SPLITS - 1) * L::kTileBytes);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (C::SPLITS > 1) ptx::cluster_arrive();
  ptx::wait_for_previous_kernel();
  const MixedTiles<C> tiles = make_tiles<C>(groups, p, smem);
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
    MixedLoop<C> loop(smem, warpgroup);
    for (int number = first; number < tiles.tiles; number += step) {
      clear(loop.sums);
      const bool any = whole_warp(tiles[number].tile.k_end > 0);
      if (any) loop.run(share.count());
      if (any) loop.gather();
      if (loop.turn > 0) continue;
      if constexpr (C::SPLITS > 1) loop.gather_ranks(rank);
      if (rank == 0) loop.store(d, p, tiles[number]);
    }
  }
}

}  // namespace jdg
