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

  // The last round of turns may have no block for this warpgroup.
  __device__ __forceinline__ void finish_round(int blocks) {
    if (C::DEEP > 1 && blocks % C::DEEP > 0 && blocks % C::DEEP <= turn) {
      ring.pass();
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

}  // namespace jdg
