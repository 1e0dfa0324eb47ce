// D = A B^T (+ C) for large m: a persistent grid of tiles of ROWS x COLS, one block of threads per SM.
//
//   warpgroups 0 .. W-1   consumers: 64 rows of the tile each (wgmma, promotion), then the epilogue
//   warpgroup W           one thread of it is the TMA producer; it runs ahead into the next tile during the epilogue
//
//   shared memory:  A[STAGES] | B[STAGES] | scale quads of A, B | D staging, 2 KB for each consumer warp | barriers
//
// The two consumer warpgroups are not ordered against each other: they drift apart by themselves until one promotes
// while the other multiplies. Forcing an order measured slower (docs/performance.md).
//
// Epilogue, bf16: a warp owns 16 rows of D. It passes 64 columns at a time through its own 2 KB (stmatrix, rows of 128
// bytes, 16-byte chunks exchanged by row to avoid bank conflicts) and stores whole 128-byte lines. No barrier between
// warps, no tensor map for D, and tails in m and n are plain predicates.
#pragma once

#include <jax_deepgemm/mainloop.cuh>

namespace jdg {

struct Problem {
  int m, n, batches;
  int stripe;  // row tiles walked together before the next column, for reuse in L2
};

// The order of tiles: batches, stripes of `stripe` row tiles, columns, rows within the stripe.
template <class C>
__device__ __forceinline__ Tile tile_at(int index, const Problem& p, int k_blocks) {
  const int row_tiles = ceil_div(p.m, C::ROWS), col_tiles = ceil_div(p.n, C::COLS);
  const int batch = index / (row_tiles * col_tiles), rest = index % (row_tiles * col_tiles);
  const int stripe = rest / (p.stripe * col_tiles), within = rest % (p.stripe * col_tiles);
  const int height = min(p.stripe, row_tiles - stripe * p.stripe);
  return {(stripe * p.stripe + within % height) * C::ROWS, within / height * C::COLS, batch, 0, k_blocks};
}

template <class T>
__device__ __forceinline__ T* matrix_of(T* base, const Problem& p, int batch) {
  return base + static_cast<i64>(batch) * p.m * p.n;
}

// Adds C to the accumulator.
template <class C>
__device__ __forceinline__ void add_c(float (&acc)[C::COLS / 2], const typename C::Out* c, const Problem& p,
                                      const Tile& tile, int first_row) {
  const Fragment mine;
#pragma unroll
  for (int i = 0; i < C::COLS / 2; ++i) {
    const int row = first_row + mine.row + i / 2 % 2 * 8, col = tile.col + i / 4 * 8 + mine.col + i % 2;
    if (row < p.m && col < p.n) acc[i] += ptx::to_float(c[static_cast<i64>(row) * p.n + col]);
  }
}

__device__ __forceinline__ void store_as(float* d, float v) { *d = v; }
__device__ __forceinline__ void store_as(bf16* d, float v) { *d = ptx::to_bf16(v); }

// Straight from the accumulator: float32, where four lanes fill a 32-byte sector, and bf16 rows that are not 16-byte
// aligned (n % 8 != 0).
template <class C>
__device__ __forceinline__ void store_direct(const float (&acc)[C::COLS / 2], typename C::Out* d, const Problem& p,
                                             const Tile& tile, int first_row) {
  const Fragment mine;
#pragma unroll
  for (int i = 0; i < C::COLS / 2; i += 2) {
    const int row = first_row + mine.row + i / 2 % 2 * 8, col = tile.col + i / 4 * 8 + mine.col;
    typename C::Out* at = d + static_cast<i64>(row) * p.n + col;
    if (is_same<typename C::Out, float> && p.n % 2 == 0) {
      if (row < p.m && col < p.n) *reinterpret_cast<float2*>(at) = {acc[i], acc[i + 1]};
    } else {
      if (row < p.m && col < p.n) store_as(at, acc[i]);
      if (row < p.m && col + 1 < p.n) store_as(at + 1, acc[i + 1]);
    }
  }
}

// Columns [FIRST, FIRST + WIDTH) of the tile, WIDTH <= 64, through this warp's staging rows.
template <class C, int FIRST, int WIDTH>
__device__ __forceinline__ void store_slab(const float (&acc)[C::COLS / 2], bf16* d, const Problem& p, const Tile& tile,
                                           int first_row, u32 staging) {
  constexpr int kChunks = WIDTH / 8;  // 16-byte chunks in a row
  const int lane = threadIdx.x % 32;
  const u32 row_address = staging + lane % 16 * 128;
  const auto chunk_address = [&](int chunk) { return row_address + ((chunk ^ (lane % 8)) * 16); };
  __syncwarp();
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk += 2) {
    const float* a = acc + (FIRST / 8 + chunk) * 4;
    const u32 top = ptx::pack_bf16(a[0], a[1]), bottom = ptx::pack_bf16(a[2], a[3]);
    if (chunk + 1 < kChunks)
      ptx::store_matrix_x4(chunk_address(chunk + lane / 16), top, bottom, ptx::pack_bf16(a[4], a[5]),
                           ptx::pack_bf16(a[6], a[7]));
    else
      ptx::store_matrix_x2(chunk_address(chunk), top, bottom);
  }
  __syncwarp();
  const int warp_row = first_row + threadIdx.x / 32 % 4 * 16;
#pragma unroll
  for (int i = 0; i < ceil_div(16 * kChunks, 32); ++i) {
    const int index = i * 32 + lane, r = index / kChunks, chunk = index % kChunks;
    const int row = warp_row + r, col = tile.col + FIRST + chunk * 8;
    if ((16 * kChunks % 32 == 0 || r < 16) && row < p.m && col < p.n)
      *reinterpret_cast<uint4*>(d + static_cast<i64>(row) * p.n + col) =
          ptx::load_shared_16_bytes(staging + r * 128 + ((chunk ^ (r % 8)) * 16));
  }
}

template <class C, int FIRST = 0>
__device__ __forceinline__ void store_staged(const float (&acc)[C::COLS / 2], bf16* d, const Problem& p,
                                             const Tile& tile, int first_row, u32 staging) {
  if constexpr (FIRST < C::COLS) {
    store_slab<C, FIRST, min(64, C::COLS - FIRST)>(acc, d, p, tile, first_row, staging);
    store_staged<C, FIRST + 64>(acc, d, p, tile, first_row, staging);
  }
}

template <class C>
__device__ __forceinline__ void gemm(const Operands& in, const Problem& p, typename C::Out* d,
                                     const typename C::Out* c) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = threadIdx.x / 128;
  const int tiles = ceil_div(p.m, C::ROWS) * ceil_div(p.n, C::COLS) * p.batches;

  init_barriers<C>(smem);
  ptx::wait_for_previous_kernel();
  Position<C> at(smem);

  if (warpgroup == C::WARPGROUPS) {
    if constexpr (C::WARPGROUPS == 2) ptx::lower_registers<40>();
    if (threadIdx.x % 128 == 0)
      for (int index = blockIdx.x; index < tiles; index += gridDim.x)
        load_blocks<C>(at, in, tile_at<C>(index, p, in.k_blocks));
  } else {
    if constexpr (C::WARPGROUPS == 2) ptx::raise_registers<232>();
    const u32 staging = smem + Layout<C>::kStaging + threadIdx.x / 32 * 2048;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile = tile_at<C>(index, p, in.k_blocks);
      const int first_row = tile.row + warpgroup * 64;
      float acc[C::COLS / 2];
      multiply_blocks<C>(acc, at, in, tile, warpgroup);

      typename C::Out* out = matrix_of(d, p, tile.batch);
      if constexpr (C::ADD) add_c<C>(acc, matrix_of(c, p, tile.batch), p, tile, first_row);
      if constexpr (is_same<typename C::Out, float>) {
        store_direct<C>(acc, out, p, tile, first_row);
      } else {
        if (p.n % 8 == 0) store_staged<C>(acc, out, p, tile, first_row, staging);
        else store_direct<C>(acc, out, p, tile, first_row);
      }
    }
  }
}

}  // namespace jdg
