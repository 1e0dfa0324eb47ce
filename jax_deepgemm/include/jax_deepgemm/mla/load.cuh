// Tiles of latent attention: where they lie in shared memory, which of them a block has, and the warps that
// copy them there (mla.cuh says when).
#pragma once

#include <jax_deepgemm/mla/problem.cuh>
#include <jax_deepgemm/pipeline.cuh>
#include <jax_deepgemm/ptx/copy.cuh>
#include <jax_deepgemm/ptx/strided.cuh>

namespace jdg {

constexpr int kMlaRows = 64, kMlaWarps = 12, kSlabBytes = 128;
constexpr int kFactorLanes = 32;  // of a warpgroup, each fourth, which has the factors of its rows

// Operands in shared memory: rows of queries, of keys and of weights; keys as values, in slabs of 64 columns.
using KeyMajor = ptx::StridedDescriptor<1024>;
using ValueMajor = ptx::StridedDescriptor<1024, kTileKeys * kSlabBytes>;

template <MlaConfig C>
struct MlaLayout {
  static constexpr int kSlabs = C::D / 64, kRowBytes = C::D * 2;
  static constexpr int kTileBytes = kSlabs * kTileKeys * kSlabBytes;
  static constexpr u32 kTiles = kSlabs * kMlaRows * kSlabBytes;
  static constexpr u32 kWeights = kTiles + kTileSlots * kTileBytes;
  static constexpr u32 kFactors = kWeights + kMlaRows * kSlabBytes;
  using TilePipe = Pipeline<kTileSlots, kFactors + kMlaRows * 4>;
  using QueryPipe = Pipeline<1, TilePipe::kEnd>;
  using WeightPipe = Pipeline<1, QueryPipe::kEnd>;
  static constexpr u32 kBytes = WeightPipe::kEnd;
  static_assert(C::SHARED_BYTES >= kBytes, "the host knows the layout");
  static_assert(C::D % 64 == 0 && C::LEFT % 64 == 0 && C::DV <= C::D, "parts of values are whole slabs");
  static_assert((C::DV - C::LEFT) % (64 * C::RIGHT_PARTS) == 0, "parts of values are whole slabs");
};

// A block's part of a share without a break: tiles [from, to) of a unit.
struct MlaPiece {
  Sequence sequence;
  int table;     // row of the tables
  int packed;    // the first of the block's rows
  int all;       // rows of the sequence
  int end;       // keys that any of the block's rows sees
  int from, to;  // tiles
  int slot;      // of the sums, -1: it is the whole unit

  __device__ __forceinline__ bool exists(int row) const { return packed + row < all; }
};

// What all warps do alike: pieces of this block, one after the other.
template <class C>
struct MlaPieces {
  const MlaBatch<C, kMlaWarps>& batch;
  int at, end, begin, team;

  __device__ __forceinline__ explicit MlaPieces(const MlaBatch<C, kMlaWarps>& batch)
      : batch(batch), team(blockIdx.x / C::TEAM) {
    const Shares shares(batch.all(), gridDim.x / C::TEAM);
    const bool some = team < shares.count;
    begin = at = some ? shares.begin(team) : 0;
    end = some ? shares.begin(team + 1) : 0;
  }
  __device__ __forceinline__ bool more() const { return at < end; }
  __device__ __forceinline__ MlaPiece next() {
    const auto& call = batch.call;
    const auto& cutting = batch.cutting;
    const int s = batch.of(at);
    const Sequence sequence = mla_sequence<C>(call, s);
    const int length = cutting.weights(sequence), step = cutting.step(), first = at - batch.before(s);
    const int unit = first / length, within = first % length;
    const int count = cutting.split > 0 ? 1 : min(length - within, end - at);
    MlaPiece piece;
    piece.sequence = sequence;
    piece.table = s;
    piece.packed = unit * MlaCutting<C>::kRows + blockIdx.x % C::TEAM * kMlaRows;
    piece.all = sequence.rows * call.heads;
    const int last = min(piece.packed + kMlaRows, piece.all) - 1;
    const bool ends = C::CAUSAL && !C::SPARSE;
    piece.end = ends ? max(0, min(sequence.keys, sequence.position(last / call.heads) + 1)) : sequence.keys;
    if (!piece.exists(0)) piece.end = 0;
    piece.from = within * step;
    piece.to = max(piece.from, min((within + count) * step, ceil_div(piece.end, kTileKeys)));
    piece.slot = count == length ? -1 : cutting.split > 0 ? at : slot_of(team, at == begin);
    at += count;
    return piece;
  }
};

// --- loaders ---

template <class C>
struct MlaLoader {
  using L = MlaLayout<C>;
  const MlaCall<typename C::T>& call;
  char* shared;
  const char* cache;  // of the layer, nullptr: there is none
  typename L::TilePipe tiles;
  typename L::QueryPipe queries;
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  int tile_count = 0;  // of all pieces before

  __device__ __forceinline__ MlaLoader(const MlaCall<typename C::T>& call, char* shared)
      : call(call), shared(shared), tiles(smem_address(shared)), queries(smem_address(shared)) {
    const int layer = *call.layer;
    const bool exists = layer >= 0 && layer < call.layers;
    const i64 bytes = static_cast<i64>(call.pages) * C::PAGE * L::kRowBytes;
    cache = exists ? reinterpret_cast<const char*>(call.cache) + layer * bytes : nullptr;
    tiles.stage = warp;
  }

  // Four rows of a slab each time, of which `row` is this lane's: 128 bytes by eight lanes.
  __device__ __forceinline__ void copy_rows(u32 to, int slab_rows, int row, const char* from,
                                            bool exists) const {
    const u32 at = to + row * kSlabBytes + (lane % 8 ^ row % 8) * 16;
#pragma unroll
    for (int slab = 0; slab < L::kSlabs; ++slab) {
      ptx::copy_async(at + slab * slab_rows * kSlabBytes, from + slab * kSlabBytes + lane % 8 * 16,
                      exists ? 16 : 0);
    }
  }

  // Where this lane's key of a tile lies, counted in keys; -1: nowhere.
  __device__ __forceinline__ int place(const MlaPiece& piece, int tile) const {
    const int key = tile * kTileKeys + lane;
    if (tile >= piece.to || key >= piece.end || cache == nullptr) return -1;
    const int* const row = call.tables + static_cast<i64>(piece.table) * call.columns;
    if constexpr (C::SPARSE) {
      const int slot = row[key];
      return slot < call.pages * C::PAGE ? max(slot, -1) : -1;
    }
    const int page = row[key / C::PAGE];
    return page >= 0 && page < call.pages ? page * C::PAGE + key % C::PAGE : -1;
  }

  __device__ __forceinline__ void copy_tile(int where) const {
    const u32 to = tiles.smem + L::kTiles + tiles.stage * L::kTileBytes;
#pragma unroll 2
    for (int four = 0; four < 8; ++four) {
      const int within = four * 4 + lane / 8, at = __shfl_sync(0xFFFFFFFF, where, within);
      const char* const from =
          at < 0 ? reinterpret_cast<const char*>(call.q) : cache + static_cast<i64>(at) * L::kRowBytes;
      copy_rows(to, kTileKeys, within, from, at >= 0);
    }
  }

  __device__ __forceinline__ void copy_queries(const MlaPiece& piece) const {
    const i64 first = static_cast<i64>(piece.sequence.first) * call.heads + piece.packed;
#pragma unroll 2
    for (int four = 0; four < 4; ++four) {
      const int row = warp * 16 + four * 4 + lane / 8;
      const bool exists = piece.exists(row);
      copy_rows(queries.smem, kMlaRows, row,
                reinterpret_cast<const char*>(call.q) + (exists ? first + row : 0) * L::kRowBytes, exists);
    }
  }

  // Behind a wait for this warp's copies.
  __device__ __forceinline__ static void land() {
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    ptx::fence_proxy_async();
    __syncwarp();
  }

  __device__ __forceinline__ void run(const MlaPiece& piece) {
    if (piece.from >= piece.to) return;
    int tile = piece.from + (tiles.stage - tile_count) % kTileSlots;
    if (tile < piece.from) tile += kTileSlots;
    tile_count = (tile_count + piece.to - piece.from) % kTileSlots;
    bool asked = false;
    int where = place(piece, tile);
#pragma unroll 1
    for (; tile < piece.to; tile += kTileSlots) {
      const u32 there = __ballot_sync(0xFFFFFFFF, where >= 0);
      tiles.wait_empty();
      __syncwarp();
      copy_tile(where);
      if (lane == 0) {
        *reinterpret_cast<u32*>(shared + L::TilePipe::kRecords + tiles.stage * 16) = there;
      }
      where = place(piece, tile + kTileSlots);
      if (!asked) begin_queries(piece);
      land();
      if (!asked) end_queries();
      if (lane == 0) tiles.fill_with_nothing();
      asked = true;
      tiles.phase ^= 1;
    }
    if (asked) return;
    begin_queries(piece);
    land();
    end_queries();
  }
  __device__ __forceinline__ void begin_queries(const MlaPiece& piece) const {
    queries.wait_empty();
    __syncwarp();
    copy_queries(piece);
  }
  __device__ __forceinline__ void end_queries() {
    queries.fill_with_nothing();
    queries.advance();
  }
};

}  // namespace jdg
