// What there is to do: windows of tokens, tiles of keys, this block of threads' share of them, and minus
// infinity where no tile is.
//
// Tokens are taken by kBlockTokens neighbours, which share the tiles of kTileKeys<C> keys that cover the
// windows of all of them. The tiles of all blocks of tokens, one behind the other, are cut into equal shares,
// one for each block of threads, which finds its own by counting: windows are data, and nothing is known of
// them before.
#pragma once

#include <jax_deepgemm/indexer/config.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg {

template <class C>
struct Problem {
  const TensorMap* queries;
  const TensorMap* keys;
  const TensorMap* scales;
  const TensorMap* weights;
  const int* starts;  // windows, as the caller has them
  const int* ends;
  typename C::Out* out;
  int tokens, num_keys;          // in all
  int columns;                   // of the result
  int batch_tokens, batch_keys;  // rows of a batch, of which each next one begins so many keys further on

  // Pages: batches are requests, whose keys are where their row of the table says. OF_TOKENS: requests have
  // any number of tokens; of each token, which one is its request.
  const int* tables;
  int table_width;
  const int* requests;
};

constexpr int kNever = 0x7FFFFFFF;

__device__ __forceinline__ int clamp(int v, int low, int high) { return max(low, min(v, high)); }
__device__ __forceinline__ i64 clamp_wide(i64 v, i64 low, i64 high) {
  return v > high ? high : v < low ? low : v;
}

// OF_TOKENS: how many tokens a block has, which is named by its first one; 0: no block begins with it. A run
// of tokens of one request is taken kBlockTokens at a time. Every kReach-th token begins anew, so that no
// look back at a long run is longer.
template <class C>
__device__ __forceinline__ int count_tokens(const Problem<C>& p, int block) {
  constexpr int kReach = 8 * kBlockTokens<C>;
  if (block >= p.tokens) return 0;
  const int request = p.requests[block], within = block % kReach;
  const int most = min(kBlockTokens<C>, min(kReach - within, p.tokens - block));
  int before = 0, count = 1;
#pragma unroll 1
  while (before < within && p.requests[block - before - 1] == request) ++before;
  if (before % kBlockTokens<C> != 0) return 0;
#pragma unroll 1
  while (count < most && p.requests[block + count] == request) ++count;
  return count;
}

// Blocks of tokens. Those of a request are its own.
template <class C>
__device__ __forceinline__ int blocks_of_request(const Problem<C>& p) {
  return ceil_div(p.batch_tokens, kBlockTokens<C>);
}
template <class C>
__device__ __forceinline__ int count_blocks(const Problem<C>& p) {
  if constexpr (C::OF_TOKENS) return p.tokens;
  if constexpr (C::PAGE > 0) return p.tokens / p.batch_tokens * blocks_of_request(p);
  return ceil_div(p.tokens, kBlockTokens<C>);
}

// Whose table the pages of a block are in.
template <class C>
__device__ __forceinline__ int request_of_block(const Problem<C>& p, int block) {
  if constexpr (C::OF_TOKENS) return p.requests[block];
  return block / blocks_of_request(p);
}

// Which of all tokens is the i-th of a block; p.tokens: none.
template <class C>
__device__ __forceinline__ int token_index(const Problem<C>& p, int block, int i) {
  if constexpr (C::OF_TOKENS) return i < count_tokens(p, block) ? block + i : p.tokens;
  if constexpr (C::PAGE > 0) {
    const int each = blocks_of_request(p), request = block / each;
    const int token = block % each * kBlockTokens<C> + i;
    return token < p.batch_tokens ? min(request * p.batch_tokens + token, p.tokens) : p.tokens;
  }
  return min(block * kBlockTokens<C> + i, p.tokens);
}

// Keys `first` .. `first + columns` of a row are its columns. A token beyond the last one has none.
template <class C>
__device__ __forceinline__ Token token_at(const Problem<C>& p, int index) {
  if (index >= p.tokens) return {0, kNever, 0, 0, 0};
  const int start = clamp(p.starts[index], 0, p.num_keys);
  const int end = clamp(p.ends[index], start, p.num_keys);
  const int first = C::COMPRESSED ? start : index / p.batch_tokens * p.batch_keys;
  const int last = first + min(p.columns, kNever - first);
  const i64 before = static_cast<i64>(index) * p.columns - first;
  const u64 row = reinterpret_cast<u64>(p.out) + before * sizeof(typename C::Out);
  return {row, start, min(end, last), first, last};
}

// A range of tiles, or of keys.
struct Span {
  int begin, end;
  __device__ __forceinline__ int size() const { return max(end - begin, 0); }
};

// The tiles that cover keys [begin, end); none of an empty range.
template <class C>
__device__ __forceinline__ Span tiles_of(int begin, int end) {
  if (begin >= end) return {0, 0};
  return {begin / kTileKeys<C>, (end - 1) / kTileKeys<C> + 1};
}

// The tiles of a block of tokens, by one thread.
template <class C>
__device__ __forceinline__ int count_tiles(const Problem<C>& p, int block) {
  int begin = kNever, end = 0;
  const auto add = [&](int token) {
    const Token t = token_at(p, token);
    if (t.start < t.end) begin = min(begin, t.start), end = max(end, t.end);
  };
  if constexpr (C::OF_TOKENS) {
    const int count = count_tokens(p, block);
#pragma unroll 1
    for (int i = 0; i < count; ++i) add(block + i);
  } else {
#pragma unroll
    for (int i = 0; i < kBlockTokens<C>; ++i) add(token_index(p, block, i));
  }
  return tiles_of<C>(begin, end).size();
}

// The same by a warp, of which every lane below kBlockTokens has a token.
template <class C>
__device__ __forceinline__ Span tiles_of_warp(const Token& t) {
  const bool some = t.start < t.end;
  const int begin = __reduce_min_sync(0xFFFFFFFF, some ? t.start : kNever);
  return tiles_of<C>(begin, __reduce_max_sync(0xFFFFFFFF, some ? t.end : 0));
}

// The token of a lane; lanes beyond have none.
template <class C>
__device__ __forceinline__ Token token_of_lane(const Problem<C>& p, int block) {
  const int lane = threadIdx.x % 32;
  return token_at(p, lane < kBlockTokens<C> ? token_index(p, block, lane) : p.tokens);
}

// The first tile of a share: which one, of which block of tokens; how many follow it, itself included.
struct Share {
  int block, tile;
  i64 tiles;
};

__device__ __forceinline__ i64 sum_of_warp(i64 v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFF, v, step);
  return v;
}

__device__ __forceinline__ int sum_up_to_lane(int v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFF, v, step);
    if (threadIdx.x % 32 >= step) v += below;
  }
  return v;
}

// By all threads. Each warp counts the tiles of a run of blocks of tokens; the one in whose run the share
// begins looks for the place.
template <class C>
__device__ __forceinline__ Share share_of_block(const Problem<C>& p, char* shared) {
  constexpr int kWarps = kIndexerThreads<C> / 32;
  i64* const counts = reinterpret_cast<i64*>(shared + LogitsLayout<C>::kShare);
  int* const place = reinterpret_cast<int*>(counts + kWarps);
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int blocks = count_blocks(p), run = align_up(ceil_div(blocks, kWarps), 32);
  const int first = warp * run, last = min(first + run, blocks);

  i64 mine = 0;
#pragma unroll 4
  for (int block = first + lane; block < last; block += 32) mine += count_tiles(p, block);
  mine = sum_of_warp(mine);
  if (lane == 0) counts[warp] = mine;
  __syncthreads();
  i64 before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    before += i < warp ? counts[i] : 0;
    all += counts[i];
  }
  const i64 begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
  if (before <= begin && begin < before + mine) {
    i64 further = begin - before;
#pragma unroll 1
    for (int chunk = first; chunk < last; chunk += 32) {
      const int tiles = chunk + lane < last ? count_tiles(p, chunk + lane) : 0;
      const int up_to = sum_up_to_lane(tiles), chunk_tiles = __shfl_sync(0xFFFFFFFF, up_to, 31);
      if (further < chunk_tiles) {
        const int tile = static_cast<int>(further) - (up_to - tiles);
        if (tile >= 0 && tile < tiles) place[0] = chunk + lane, place[1] = tile;
        break;
      }
      further -= chunk_tiles;
    }
  }
  __syncthreads();
  return {begin < end ? place[0] : 0, begin < end ? place[1] : 0, end - begin};
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }

// Minus infinity to elements [begin, end) of a row, by a warp.
template <class Out>
__device__ __forceinline__ void fill(Out* row, i64 begin, i64 end) {
  constexpr int kVector = 16 / sizeof(Out);
  constexpr u32 kBits = sizeof(Out) == 4 ? 0xFF800000u : 0xFF80FF80u;
  const int lane = threadIdx.x % 32;
  if (begin >= end) return;
  const int unaligned = static_cast<int>(reinterpret_cast<u64>(row + begin) % 16 / sizeof(Out));
  const i64 aligned = clamp_wide(begin + (kVector - unaligned) % kVector, begin, end);
  if (begin + lane < aligned) ptx::store_global(row + begin + lane, minus_infinity());
  const i64 vectors = (end - aligned) / kVector;
  uint4* const to = reinterpret_cast<uint4*>(row + aligned);
#pragma unroll 4
  for (i64 i = lane; i < vectors; i += 32) to[i] = make_uint4(kBits, kBits, kBits, kBits);
  const i64 rest = aligned + vectors * kVector;
  if (rest + lane < end) ptx::store_global(row + rest + lane, minus_infinity());
}

// Columns of rows that no tile covers, by `workers` warps of every block of threads.
template <class C>
__device__ __forceinline__ void fill_rows(const Problem<C>& p, int worker, int workers) {
  using Out = typename C::Out;
  const int blocks = count_blocks(p);
#pragma unroll 1
  for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Token mine = token_of_lane(p, block);
    const Span tiles = tiles_of_warp<C>(mine);
#pragma unroll 1
    for (int i = worker; i < kBlockTokens<C>; i += workers) {
      const int token = token_index(p, block, i);
      if (token >= p.tokens) break;
      const i64 first = __shfl_sync(0xFFFFFFFF, mine.first, i), columns = p.columns;
      const auto column = [&](int tile) {
        return clamp_wide(static_cast<i64>(tile) * kTileKeys<C> - first, 0, columns);
      };
      Out* const row = p.out + static_cast<i64>(token) * p.columns;
      fill(row, 0, column(tiles.begin));
      fill(row, column(tiles.end), columns);
    }
  }
}

}  // namespace jdg
