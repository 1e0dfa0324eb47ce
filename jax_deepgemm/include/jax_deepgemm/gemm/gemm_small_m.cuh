// D = A B^T (+ C) for few tokens: a cluster of SPLITS blocks shares the k range of one tile. One tile per
// cluster, all its bytes requested at once. With SWAP_AB the weights B lie on wgmma's 64-row side and the
// tokens A on its narrow side.
//
// clang-format off
//   warpgroups 0 .. W-1   consumers: 64 rows each
//   last warp             one thread of it is the TMA producer
//
//   rank r of the cluster multiplies quads of k [r Q / SPLITS, (r + 1) Q / SPLITS)
//   -> slice s of its float32 partial goes to rank s, into memory of its own there (without a split: over the
//      ring, of which every slot has been read)
//   -> rank r waits for the bytes of all slices r, adds them in rank order, + C, rounds once, stores; where D
//      has C's memory: adds there
// clang-format on
//
// A slice is some of the tile's rows [row][column], so that the sum over ranks needs no atomics: equal bits
// every time. Nobody reads another block's memory, and each waits for what is sent to it: blocks leave
// without waiting for each other.
#pragma once

#include <jax_deepgemm/gemm/epilogue.cuh>

namespace jdg {

// The partial sums that a block adds up, [rank][row of its slice][column].
template <class C>
struct Slices {
  static constexpr int kRows = C::ROWS / C::SPLITS;
  static constexpr int kPitch = C::COLS + 4;  // floats; the padding avoids bank conflicts
  static constexpr u32 kBytes = kRows * kPitch * 4;
  static constexpr bool kExchanged = C::SPLITS > 1;
  static constexpr u32 kBarrier = Layout<C>::kStaging + C::SPLITS * kBytes;
  static_assert(kExchanged ? C::SPLITS * kBytes + 16 <= C::STAGING_BYTES : kBytes <= Layout<C>::kStaging,
                "the slices fit where they are put");

  u32 smem;
  int rank;

  __device__ __forceinline__ u32 base() const { return smem + (kExchanged ? Layout<C>::kStaging : 0); }
  __device__ __forceinline__ u32 barrier() const { return smem + kBarrier; }

  __device__ __forceinline__ void init() const {
    if (!kExchanged || threadIdx.x > 0) return;
    ptx::mbarrier_init(barrier(), 1);
    ptx::mbarrier_expect_bytes(barrier(), C::ROWS * C::COLS * 4);
  }

  // One consumer warpgroup's part of the partial sums.
  __device__ __forceinline__ void send(const float (&acc)[C::COLS / 2], int warpgroup) const {
    const Fragment mine;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warpgroup * 64 + mine.row + half * 8, owner = row / kRows;
      u32 to = base() + rank * kBytes + (row % kRows * kPitch + mine.col) * 4, bar = barrier();
      if constexpr (kExchanged) to = ptx::map_to_rank(to, owner), bar = ptx::map_to_rank(bar, owner);
#pragma unroll
      for (int i = 0; i < C::COLS / 8; ++i) {
        const float a = acc[4 * i + 2 * half], b = acc[4 * i + 2 * half + 1];
        if constexpr (kExchanged)
          ptx::store_async_2(to + i * 32, a, b, bar);
        else
          ptx::store_shared_2(to + i * 32, a, b);
      }
    }
  }

  __device__ __forceinline__ void wait() const {
    if constexpr (kExchanged)
      ptx::mbarrier_wait_cluster(barrier(), 0);
    else
      ptx::named_barrier<1, 128 * C::WARPGROUPS>();
  }

  // Of two neighbouring columns of the tile.
  __device__ __forceinline__ float2 sum(int row, int token) const {
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int from = 0; from < C::SPLITS; ++from) {
      const float2 part = ptx::load_shared_2(base() + from * kBytes + (row * kPitch + token) * 4);
      sum.x += part.x, sum.y += part.y;
    }
    return sum;
  }
};

// COUNT neighbouring columns of D.
template <class C, int COUNT>
__device__ __forceinline__ void store_neighbours(float (&values)[4], typename C::Out* d,
                                                 const typename C::Out* c, const Extents& p, int token,
                                                 int col) {
  const i64 at = static_cast<i64>(token) * row_pitch<C>(p) + col;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (C::ADD && col + i < p.n) values[i] += ptx::to_float(c[at + i]);
  if constexpr (C::REDUCE) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
      if (col + i < p.n) ptx::reduce_add(d + at + i, values[i], values[i + 1]);
  } else if (p.n % COUNT == 0) {
    if constexpr (COUNT == 2)
      store_pair(d + at, values[0], values[1]);
    else if constexpr (is_same<typename C::Out, float>)
      *reinterpret_cast<float4*>(d + at) = {values[0], values[1], values[2], values[3]};
    else
      *reinterpret_cast<uint2*>(d + at) = {ptx::pack_bf16(values[0], values[1]),
                                           ptx::pack_bf16(values[2], values[3])};
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (col + i < p.n) store_one(d + at + i, values[i]);
  }
}

// Four neighbouring columns of the product.
template <class C, class E>
__device__ __forceinline__ void store_four(float (&values)[4], typename C::Out* d, const typename C::Out* c,
                                           const Extents& p, const E& finish, int token, int col) {
  constexpr int kCount = 4 * Stored<E, C>::COLS / C::COLS;
  const Extents out = E::stored(p);
  finish.apply(values, p, col);
  store_neighbours<C, kCount>(values, d, c, out, token, E::column(col / (4 / kCount)));
  E::fill_hole(d + static_cast<i64>(token) * out.n, col, p.n);
}

// This block's slice of the tile, four neighbouring columns of D by a thread at a time.
template <class C, class E>
__device__ __forceinline__ void store_slice(const Slices<C>& slices, typename C::Out* d,
                                            const typename C::Out* c, const Extents& p, const E& finish,
                                            const Tile& tile) {
  constexpr int kFours = C::COLS / 4, kUnits = Slices<C>::kRows * kFours;
  const int first = tile.row + slices.rank * Slices<C>::kRows;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < kUnits; unit += 128 * C::WARPGROUPS) {
    const int row = unit / kFours, col = unit % kFours * 4;
    const float2 left = slices.sum(row, col), right = slices.sum(row, col + 2);
    float four[4] = {left.x, left.y, right.x, right.y};
    if (first + row < p.m && tile.col + col < p.n)
      store_four<C>(four, d, c, p, finish, first + row, tile.col + col);
  }
}

// The same with SWAP_AB, where columns of D are rows of the tile: two tokens at a time.
template <class C, class E>
__device__ __forceinline__ void store_swapped_slice(const Slices<C>& slices, typename C::Out* d,
                                                    const typename C::Out* c, const Extents& p,
                                                    const E& finish, const Tile& tile) {
  constexpr int kFours = Slices<C>::kRows / 4, kUnits = kFours * C::COLS / 2;
  const int first = tile.row + slices.rank * Slices<C>::kRows;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < kUnits; unit += 128 * C::WARPGROUPS) {
    const int row = unit % kFours * 4, token = unit / kFours * 2;
    float two[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 sums = slices.sum(row + i, token);
      two[0][i] = sums.x, two[1][i] = sums.y;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (tile.col + token + i < p.m && first + row < p.n)
        store_four<C>(two[i], d, c, p, finish, tile.col + token + i, first + row);
  }
}

// The tile of a cluster: neighbours share weights.
template <class C>
__device__ __forceinline__ Tile cluster_tile(const Extents& p, int k_begin, int k_end) {
  const int index = blockIdx.x / C::SPLITS;
  const int tokens = ceil_div(p.m, C::SWAP_AB ? C::COLS : C::ROWS);  // in tiles
  const int weights = ceil_div(p.n, C::SWAP_AB ? C::ROWS : C::COLS);
  const int token = index % tokens, weight = index / tokens % weights;
  const int row = (C::SWAP_AB ? weight : token) * C::ROWS, col = (C::SWAP_AB ? token : weight) * C::COLS;
  return {row, col, index / (tokens * weights), k_begin, k_end};
}

// Where a rank's share of k begins: at a multiple of four blocks.
template <class C>
__device__ __forceinline__ int first_block(int rank, int k_blocks) {
  return min(rank * ceil_div(k_blocks, kQuad) / C::SPLITS * kQuad, k_blocks);
}

template <GemmConfig C, class E = AsItIs>
__device__ __forceinline__ void gemm_small_m(const Operands& in, const Extents& p, const TensorMap*,
                                             typename C::Out* d, const typename C::Out* c,
                                             const E& finish = {}) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  constexpr int kConsumers = 128 * C::WARPGROUPS;
  const int rank = C::SPLITS > 1 ? ptx::cluster_rank() : 0;
  const Tile tile =
      cluster_tile<C>(p, first_block<C>(rank, in.k_blocks), first_block<C>(rank + 1, in.k_blocks));

  const Slices<C> slices{smem, rank};
  slices.init();
  init_barriers<C>(smem);
  if constexpr (C::SPLITS > 1) ptx::cluster_arrive();
  ptx::wait_for_previous_kernel();
  Ring<C> ring(smem);

  if (threadIdx.x >= kConsumers) {
    if (ptx::elect()) load_blocks<C>(ring, in, tile, tile.row, tile.col, tile.batch);
    __syncwarp();
    if constexpr (C::SPLITS > 1) ptx::cluster_wait();
  } else {
    const int warpgroup = warpgroup_index();
    Accumulator<C> acc;
    clear(acc[0]);
    MainLoop<C> loop(acc, ring, warpgroup);
    loop.begin(tile);
    loop.finish(tile);
    if constexpr (C::SPLITS > 1)
      ptx::cluster_wait();  // all ranks have made their barriers
    else
      ptx::named_barrier<1, kConsumers>();  // the other warpgroup may still read what is overwritten
    slices.send(acc[0], warpgroup);
    slices.wait();
    typename C::Out* out = matrix_of<C>(d, E::stored(p), tile.batch);
    const typename C::Out* addend = matrix_of<C>(c, E::stored(p), tile.batch * p.batched_c);
    const E mine = finish.of(tile.batch, p);
    if constexpr (C::SWAP_AB)
      store_swapped_slice<C>(slices, out, addend, p, mine, tile);
    else
      store_slice<C>(slices, out, addend, p, mine, tile);
  }
}

}  // namespace jdg
