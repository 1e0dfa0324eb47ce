// D = A B^T (+ C) for few tokens: the weights B lie on wgmma's 64-row side, the tokens A on its narrow side,
// and a cluster of SPLITS blocks shares the k range of one tile. One tile per cluster, all its bytes
// requested at once.
//
//   warpgroups 0 .. W-1   consumers: 64 weight rows each
//   last warp             one thread of it is the TMA producer
//
//   rank r of the cluster multiplies quads of k [r Q / SPLITS, (r + 1) Q / SPLITS)
//   -> float32 partial [token][ROWS + 4] over the ring (every slot has been read)
//   cluster barrier
//   -> rank r adds slice r of all partials, in rank order, + C, rounds once, stores;
//      where D has C's memory: adds there
//   cluster barrier: nobody leaves while peers read its memory
//
// The partial is token-major, so that row-major D is written in whole lines and the sum over ranks needs no
// atomics: equal bits every time.
#pragma once

#include <jax_deepgemm/epilogue.cuh>

namespace jdg {

template <class C>
struct Partial {
  static constexpr int kPitch = C::ROWS + 4;  // floats; the padding avoids bank conflicts
  static_assert(C::COLS * kPitch * 4 <= Layout<C>::kStaging, "the partial tile lies over the ring");
};

template <class C>
__device__ __forceinline__ void store_partial(const float (&acc)[C::COLS / 2], u32 smem, int warpgroup) {
  const Fragment mine;
#pragma unroll
  for (int i = 0; i < C::COLS / 2; ++i) {
    const int token = i / 4 * 8 + mine.col + i % 2, row = warpgroup * 64 + mine.row + i / 2 % 2 * 8;
    ptx::store_shared(smem + (token * Partial<C>::kPitch + row) * 4, acc[i]);
  }
}

template <class C>
__device__ __forceinline__ float4 sum_partials(u32 address) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int rank = 0; rank < C::SPLITS; ++rank) {
    const float4 part = ptx::load_cluster(C::SPLITS > 1 ? ptx::map_to_rank(address, rank) : address);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  return sum;
}

// Four neighbouring columns of D.
template <class C>
__device__ __forceinline__ void store_four(float4 v, typename C::Out* d, const typename C::Out* c,
                                           const Problem& p, int token, int col) {
  const i64 at = static_cast<i64>(token) * p.n + col;
  float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (C::ADD && col + i < p.n) values[i] += ptx::to_float(c[at + i]);
  if constexpr (C::REDUCE) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (col + i < p.n) ptx::reduce_add(d + at + i, values[i]);
  } else if (p.n % 4 == 0) {
    if constexpr (is_same<typename C::Out, float>)
      *reinterpret_cast<float4*>(d + at) = {values[0], values[1], values[2], values[3]};
    else
      *reinterpret_cast<uint2*>(d + at) = {ptx::pack_bf16(values[0], values[1]),
                                           ptx::pack_bf16(values[2], values[3])};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (col + i < p.n) store_one(d + at + i, values[i]);
  }
}

// Where a rank's share of k begins: at a multiple of four blocks.
template <class C>
__device__ __forceinline__ int first_block(int rank, int k_blocks) {
  return min(rank * ceil_div(k_blocks, kQuad) / C::SPLITS * kQuad, k_blocks);
}

template <class C>
__device__ __forceinline__ void gemm_small_m(const Operands& in, const Problem& p, const TensorMap*,
                                             typename C::Out* d, const typename C::Out* c) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  constexpr int kConsumers = 128 * C::WARPGROUPS;
  const int rank = C::SPLITS > 1 ? ptx::cluster_rank() : 0;
  const int row_tiles = ceil_div(p.n, C::ROWS), token_tiles = ceil_div(p.m, C::COLS);
  const int index = blockIdx.x / C::SPLITS;
  const Tile tile = {index / token_tiles % row_tiles * C::ROWS, index % token_tiles * C::COLS,
                     index / (token_tiles * row_tiles), first_block<C>(rank, in.k_blocks),
                     first_block<C>(rank + 1, in.k_blocks)};

  init_barriers<C>(smem);
  ptx::wait_for_previous_kernel();
  Position<C> at(smem);

  if (threadIdx.x >= kConsumers) {
    if (ptx::elect()) load_blocks<C>(at, in, tile, tile.row, tile.col, tile.batch);
    __syncwarp();
  } else {
    const int warpgroup = warpgroup_index();
    float acc[C::COLS / 2];
    clear(acc);
    MainLoop<C> loop(acc, at, warpgroup);
    loop.begin();
    loop.finish(tile);
    ptx::named_barrier<1, kConsumers>();  // the other warpgroup may still read what the partial overwrites
    store_partial<C>(acc, smem, warpgroup);
  }
  if constexpr (C::SPLITS > 1)
    ptx::cluster_barrier();
  else
    __syncthreads();

  constexpr int kQuads = C::ROWS / 4, kShare = ceil_div(C::COLS * kQuads, C::SPLITS);
  for (int i = threadIdx.x; i < kShare; i += kConsumers + 32) {
    const int unit = rank * kShare + i, token = unit / kQuads, row = unit % kQuads * 4;
    if (token < C::COLS && tile.col + token < p.m && tile.row + row < p.n)
      store_four<C>(sum_partials<C>(smem + (token * Partial<C>::kPitch + row) * 4),
                    matrix_of(d, p, tile.batch), matrix_of(c, p, tile.batch * p.batched_c), p,
                    tile.col + token, tile.row + row);
  }
  if constexpr (C::SPLITS > 1) ptx::cluster_barrier();
}

}  // namespace jdg
