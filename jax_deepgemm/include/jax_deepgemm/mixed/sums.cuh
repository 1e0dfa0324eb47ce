// The accumulator of a consumer warpgroup, and how warpgroups and blocks that share a tile's k put theirs
// together: always in the same order, so that bits are equal every time.
#pragma once

#include <jax_deepgemm/mixed/config.cuh>

namespace jdg {

template <class C>
struct MixedSums {
  using L = MixedLayout<C>;
  static constexpr int kCount = kHeight<C> / 64 * C::ROWS / 2;

  const int across, turn;  // which rows of the tile, and which of every DEEP blocks of k
  MixedRing<C> ring;
  const Fragment mine;
  float sums[kCount];

  __device__ __forceinline__ MixedSums(u32 smem, int warpgroup)
      : across(warpgroup % kAcross<C>), turn(warpgroup / kAcross<C>), ring(smem, turn) {}

  // How many of a tile's blocks of k are this warpgroup's.
  __device__ __forceinline__ int share(int blocks) const { return (blocks - turn + C::DEEP - 1) / C::DEEP; }

  // Every thread reads a slot, so every thread hands it back.
  __device__ __forceinline__ static void release(u32 empty) { ptx::mbarrier_arrive(empty); }

  // The last round of turns may have no block for this warpgroup.
  __device__ __forceinline__ void finish_round(int blocks) {
    if (C::DEEP > 1 && blocks % C::DEEP > 0 && blocks % C::DEEP <= turn) {
      ring.wait_full();
      __syncwarp();  // see Pipeline::pass
      release(ring.empty());
      ring.template move_on<C::DEEP>();
    }
  }

  __device__ __forceinline__ u32 place(u32 area, int from) const {
    return area + (from * kAcross<C> + across) * kCount * 512 + threadIdx.x % 128 * 8;
  }
  __device__ __forceinline__ void add_from(u32 area, int from) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
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
        for (int i = 0; i < kCount; i += 2)
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
      for (int i = 0; i < kCount; i += 2) ptx::store_async_2(to + i * 512, sums[i], sums[i + 1], bar);
    }
  }
};

// The sums of a slab, 64 rows of the weight.
template <class C>
struct SlabSums : MixedSums<C> {
  using MixedSums<C>::MixedSums, MixedSums<C>::mine, MixedSums<C>::sums, MixedSums<C>::across;

  // Neighbouring rows of the weight are neighbours in D. Threads that have them exchange one of two tokens.
  __device__ __forceinline__ void store(typename C::Out* d, const typename C::Scale*, const Extents& p,
                                        const GroupTile& at, int matrix) const {
    const int col = at.tile.col + across * 64 + mine.row / 2 * 2;
    if (at.tile.col + across * 64 >= p.n) return;
    const bool odd = mine.row % 2 != 0;
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

}  // namespace jdg
