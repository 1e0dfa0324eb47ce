// Latent attention: 64 rows (token x head) of a sequence by tiles of keys, whose first DV numbers are the
// values too, so that a tile is read once.
//
// clang-format off
//   warpgroup 0   scorer: queries by keys, running softmax; weights by the LEFT first columns of the values
//   warpgroup 1   adder: weights by the other columns
//   warpgroup 2   loaders: each warp has one slot of tiles and copies keys to it row by row, wherever these
//                 lie, and 16 of the 64 queries
//
//   queries:  slot  [slabs of 64][64 rows]     loaders -> scorer
//   tiles:    slot  [slabs of 64][32 keys]     a loader -> both; record: bits of keys that there are
//   weights:  slot  [64 rows][32 keys], factors [64]   scorer -> adder; behind the last, factors only
//
//   scorer:   scores of the first tile, their weights
//             for each further one:    issue its scores, then weights by values of the tile before
//                                      wait for the scores: mask, maximum, powers
//                                      wait for the values: release that tile
//                                      factors and weights to the adder
//             weights by values of the last tile
//
//   shared memory:  queries | tiles[4] | weights | factors | pipelines | a word for each warp | prefix sums
// clang-format on
//
// Work is dealt out as attention/work.cuh says, to teams of TEAM blocks, each of which has other rows of the
// same units, so that keys come from memory once. Of units that several shares have, sums go to `parts` for
// merge.cuh.
//
// Keys that are not there are zeros, as 0 by NaN is no 0. Weights are powers of 2.
#pragma once

#include <jax_deepgemm/attention/rows.cuh>
#include <jax_deepgemm/mla/load.cuh>
#include <jax_deepgemm/ptx/convert.cuh>
#include <jax_deepgemm/ptx/mma.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg {

constexpr float kSlack = 8.0f;  // of log2: weights are 256 at most, which float16 has room for

// --- what both consumers have ---

// Sums of PARTS x COLUMNS columns of the values.
template <class C, int PARTS, int COLUMNS>
struct MlaConsumer {
  using L = MlaLayout<C>;
  static constexpr int kSums = COLUMNS / 2, kSteps = kTileKeys / 16;

  const MlaCall<typename C::T>& call;
  char* shared;
  float* parts;
  typename L::TilePipe tiles;
  typename L::WeightPipe weights;
  int lane = threadIdx.x % 32;
  int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;  // this thread's first of two
  float sums[PARTS][kSums];

  __device__ __forceinline__ MlaConsumer(const MlaCall<typename C::T>& call, char* shared, float* parts)
      : call(call),
        shared(shared),
        parts(parts),
        tiles(smem_address(shared)),
        weights(smem_address(shared)) {}

  __device__ __forceinline__ static u32 tile_at(const typename L::TilePipe& of) {
    return of.smem + L::kTiles + of.stage * L::kTileBytes;
  }
  __device__ __forceinline__ float& factor(int of_row) const {
    return reinterpret_cast<float*>(shared + L::kFactors)[of_row];
  }
  // Those of this thread's rows. Lanes that release the slot read, and the shuffle proves their loads done.
  __device__ __forceinline__ void read_factors(float (&by)[2]) const {
    by[0] = by[1] = 1.0f;
    if (lane % 4 == 0) by[0] = factor(row), by[1] = factor(row + 8);
#pragma unroll
    for (float& one : by) one = __shfl_sync(0xFFFFFFFF, one, lane & ~3);
  }
  template <class P>
  __device__ __forceinline__ void release(P& pipe) const {
    if (lane == 0) pipe.release(pipe.empty());
    pipe.advance();
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& part : sums)
#pragma unroll
      for (float& sum : part) sum = 0.0f;
  }
  __device__ __forceinline__ void shrink(const float (&by)[2]) {
#pragma unroll
    for (auto& part : sums)
#pragma unroll
      for (int i = 0; i < kSums; ++i) part[i] *= by[i / 2 % 2];
  }
  __device__ __forceinline__ void pin_sums() {
#pragma unroll
    for (auto& part : sums) ptx::pin(part);
  }
  __device__ __forceinline__ static u32 pack(float low, float high) {
    return C::F16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }

  // Four words of each of four neighbouring lanes change places: lane i gets the i-th of each.
  __device__ __forceinline__ void transpose(u32 (&w)[4]) const {
    const bool odd = lane & 1, upper = lane & 2;
    const u32 a = __shfl_xor_sync(0xFFFFFFFF, odd ? w[0] : w[1], 1);
    const u32 b = __shfl_xor_sync(0xFFFFFFFF, odd ? w[2] : w[3], 1);
    odd ? (w[0] = a, w[2] = b) : (w[1] = a, w[3] = b);
    const u32 c = __shfl_xor_sync(0xFFFFFFFF, upper ? w[0] : w[2], 2);
    const u32 d = __shfl_xor_sync(0xFFFFFFFF, upper ? w[1] : w[3], 2);
    upper ? (w[0] = c, w[1] = d) : (w[2] = c, w[3] = d);
  }

  // This warpgroup's columns, from `column` on; finished ones are multiplied by what denominators say.
  __device__ __forceinline__ void store(const MlaPiece& piece, int column, const float (&by)[2]) const {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) store_part(piece, column + part * COLUMNS, sums[part], by);
  }
  __device__ __forceinline__ void store_part(const MlaPiece& piece, int column, const float (&sums)[kSums],
                                             const float (&by)[2]) const {
    const int team_row = blockIdx.x % C::TEAM * kMlaRows;
    const i64 first = static_cast<i64>(piece.sequence.first) * call.heads + piece.packed;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + half * 8;
      const bool exists = piece.exists(own);
      if (piece.slot >= 0) {
        const i64 at = static_cast<i64>(piece.slot) * MlaCutting<C>::kRows + team_row + own;
        float* const to = parts + at * C::DV + column + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
          const float2 two = {sums[i + 2 * half], sums[i + 2 * half + 1]};
          if (exists) *reinterpret_cast<float2*>(to + i * 2) = two;
        }
        continue;
      }
      u16* const to = reinterpret_cast<u16*>(call.out) + (first + own) * C::DV + column + lane % 4 * 8;
#pragma unroll
      for (int block = 0; block < kSums / 4; block += 4) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = (block + i) * 4 + 2 * half;
          w[i] = pack(sums[j] * by[half], sums[j + 1] * by[half]);
        }
        transpose(w);
        if (exists) *reinterpret_cast<uint4*>(to + block * 8) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
};

// --- scorer ---

template <class C>
struct MlaScorer : MlaConsumer<C, 1, C::LEFT> {
  using Base = MlaConsumer<C, 1, C::LEFT>;
  using L = MlaLayout<C>;
  using Base::call, Base::shared, Base::lane, Base::row, Base::sums, Base::tiles, Base::weights;
  static constexpr int kScores = kTileKeys / 2;

  float* part_stats;
  typename L::QueryPipe queries;
  float factor;  // of scores: they become powers of 2
  float scores[kScores];
  u32 held[C::HELD > 0 ? C::HELD : 1][4];
  u32 powers[Base::kSteps][4];
  float most[2], total[2];
  int stop[2];  // the first key that rows do not see

  __device__ __forceinline__ MlaScorer(const MlaCall<typename C::T>& call, char* shared, float* parts,
                                       float* part_stats)
      : Base(call, shared, parts),
        part_stats(part_stats),
        queries(smem_address(shared)),
        factor(call.scale * kLog2E) {}

  __device__ __forceinline__ void begin(const MlaPiece& piece) {
    this->clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = kNothing, total[half] = 0.0f, stop[half] = piece.end;
      if constexpr (!C::SPARSE) {
        const int packed = min(piece.packed + row + half * 8, piece.all - 1);
        const int position = piece.sequence.position(packed / call.heads);
        stop[half] = C::CAUSAL ? min(piece.end, position + 1) : position < 0 ? 0 : piece.end;
      }
    }
  }

  // Queries to registers, as operands.
  __device__ __forceinline__ void hold_queries() {
    const int matrix = lane / 8, own = row - lane / 4 + matrix % 2 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < C::HELD; ++step) {
      const int chunk = step % 4 * 2 + matrix / 2;
      const u32 at = queries.smem + (step / 4 * kMlaRows + own) * kSlabBytes + (chunk ^ own % 8) * 16;
      ptx::load_matrix_x4(held[step], at);
    }
  }

  __device__ __forceinline__ void issue_scores() {
    const KeyMajor a(queries.smem), b(Base::tile_at(tiles));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::D / 16; ++step) {
      const int slab = step / 4, within = step % 4 * 32;
      const u64 keys = b.plus(slab * kTileKeys * kSlabBytes + within);
      if (step < C::HELD) {
        C::HeldScores::issue(scores, held[step < C::HELD ? step : 0], keys, step > 0);
      } else {
        C::Scores::issue(scores, a.plus(slab * kMlaRows * kSlabBytes + within), keys, step > 0);
      }
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_values(const typename L::TilePipe& of) {
    const ValueMajor b(Base::tile_at(of));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Base::kSteps; ++step)
      C::LeftSums::issue(sums[0], powers[step], b.plus(step * 16 * kSlabBytes), true);
    ptx::wgmma_commit();
  }

  // Scores of keys that rows do not see become minus infinity. `there`: bits of this thread's columns, which
  // are 8 j + 2 (lane % 4) and the next.
  __device__ __forceinline__ void mask(int tile) {
    u32 there = 0;
    if (lane == 0) there = *reinterpret_cast<const u32*>(shared + L::TilePipe::kRecords + tiles.stage * 16);
    there = __shfl_sync(0xFFFFFFFF, there, 0);  // lane 0 releases the slot
    const int first = tile * kTileKeys;
    if (there == 0xFFFFFFFFu && first + kTileKeys <= min(stop[0], stop[1])) return;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const bool seen = (there >> column & 1) && first + column < stop[i / 2 % 2];
      scores[i] = seen ? scores[i] : kNothing;
    }
  }

  // Scores to powers; what sums so far are multiplied by. As long as no score is more than kSlack above what
  // they were taken relative to, that stays, and so do the sums.
  __device__ __forceinline__ void weigh(int tile, float (&by)[2]) {
    mask(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high[2] = {most[half], most[half]};
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
        high[i / 4 % 2] = fmaxf(high[i / 4 % 2], fmaxf(scores[i], scores[i + 1]));
      }
      float now = fmaxf(high[0], high[1]);
      now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFF, now, 1));
      now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFF, now, 2));
      const float before = most[half] * factor;
      const bool grown = now * factor - before > kSlack;
      most[half] = grown ? now : most[half];
      const float offset = most[half] == kNothing ? 0.0f : most[half] * factor;
      by[half] = grown ? ptx::ex2_approx(before - offset) : 1.0f;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = ptx::ex2_approx(scores[j] * factor - offset);
          sum += scores[j];
        }
      }
      total[half] = total[half] * by[half] + sum;
    }
  }
  __device__ __forceinline__ void pack_powers() {
#pragma unroll
    for (int i = 0; i < kScores; i += 2) powers[i / 8][i % 8 / 2] = this->pack(scores[i], scores[i + 1]);
  }

  // Factors, and weights where there are some, to the adder.
  template <bool WEIGHTS>
  __device__ __forceinline__ void hand_over(const float (&by)[2]) {
    weights.wait_empty();
    if (lane % 4 == 0) Base::factor(row) = by[0], Base::factor(row + 8) = by[1];
    if constexpr (WEIGHTS) {
#pragma unroll
      for (int step = 0; step < Base::kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int own = row + i % 2 * 8, chunk = step * 2 + i / 2;
          const u32 at = L::kWeights + own * kSlabBytes + (chunk ^ own % 8) * 16 + lane % 4 * 4;
          *reinterpret_cast<u32*>(shared + at) = powers[step][i];
        }
      }
      ptx::fence_proxy_async();
    }
    __syncwarp();
    if (lane % 4 == 0) weights.fill_with_nothing();
    weights.advance();
  }

  __device__ __forceinline__ void apply(const float (&by)[2]) {
    if (__ballot_sync(0xFFFFFFFF, by[0] != 1.0f || by[1] != 1.0f)) this->shrink(by);
  }

  // Scores of the tile that `tiles` is at have come.
  __device__ __forceinline__ void attend(const MlaPiece& piece) {
    float by[2];
    queries.wait_full();
    hold_queries();
    tiles.wait_full();
    ptx::pin(scores);
    issue_scores();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    weigh(piece.from, by);
    pack_powers();
    hand_over<true>(by);  // sums so far are zeros
#pragma unroll 1
    for (int tile = piece.from + 1; tile < piece.to; ++tile) {
      const auto before = tiles;
      tiles.advance();
      tiles.wait_full();
      ptx::pin(scores);
      this->pin_sums();
      ptx::pin(powers);
      issue_scores();
      issue_values(before);
      ptx::wgmma_wait<1>();
      ptx::pin(scores);
      weigh(tile, by);
      ptx::pin(scores);
      ptx::wgmma_wait<0>();
      this->pin_sums();
      ptx::pin(powers);
      if (lane == 0) before.release(before.empty());
      pack_powers();
      hand_over<true>(by);
      apply(by);
    }
    queries.release(queries.empty());
    queries.advance();
    this->pin_sums();
    ptx::pin(powers);
    issue_values(tiles);
    ptx::wgmma_wait<0>();
    this->pin_sums();
    this->release(tiles);
  }

  __device__ __forceinline__ void run(const MlaPiece& piece) {
    begin(piece);
    if (piece.from < piece.to) attend(piece);
    float inverse[2];
    const i64 first = static_cast<i64>(piece.sequence.first) * call.heads + piece.packed;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[half];
      all += __shfl_xor_sync(0xFFFFFFFF, all, 1);
      all += __shfl_xor_sync(0xFFFFFFFF, all, 2);
      const int own = row + half * 8;
      const Running sum = {most[half] == kNothing ? kNothing : most[half] * factor, all};
      inverse[half] = all == 0.0f ? 0.0f : 1.0f / all;
      if (lane % 4 != 0 || !piece.exists(own)) continue;
      if (piece.slot >= 0) {
        const i64 at =
            static_cast<i64>(piece.slot) * MlaCutting<C>::kRows + blockIdx.x % C::TEAM * kMlaRows + own;
        part_stats[at * 2] = sum.largest, part_stats[at * 2 + 1] = sum.sum;
      } else {
        call.lse[first + own] = log_sum(sum);
      }
    }
    hand_over<false>(inverse);
    this->store(piece, 0, inverse);
  }
};

// --- adder ---

template <class C>
struct MlaAdder : MlaConsumer<C, C::RIGHT_PARTS, (C::DV - C::LEFT) / C::RIGHT_PARTS> {
  static constexpr int kColumns = (C::DV - C::LEFT) / C::RIGHT_PARTS;
  using Base = MlaConsumer<C, C::RIGHT_PARTS, kColumns>;
  using L = MlaLayout<C>;
  using Base::Base, Base::row, Base::sums, Base::tiles, Base::weights;

  __device__ __forceinline__ void issue_values() {
    const KeyMajor a(tiles.smem + L::kWeights);
    const ValueMajor b(Base::tile_at(tiles) + C::LEFT / 64 * kTileKeys * kSlabBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Base::kSteps; ++step)
#pragma unroll
      for (int part = 0; part < C::RIGHT_PARTS; ++part)
        C::RightSums::issue(sums[part], a.plus(step * 32),
                            b.plus((part * kColumns / 64 * kTileKeys + step * 16) * kSlabBytes), true);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void release_weights() {
    if (Base::lane % 4 == 0) weights.release(weights.empty());
    weights.advance();
  }

  __device__ __forceinline__ void run(const MlaPiece& piece) {
    this->clear();
    float by[2];
#pragma unroll 1
    for (int tile = piece.from; tile < piece.to; ++tile) {
      tiles.wait_full();
      weights.wait_full();
      this->read_factors(by);
      if (__ballot_sync(0xFFFFFFFF, by[0] != 1.0f || by[1] != 1.0f)) this->shrink(by);
      this->pin_sums();
      issue_values();
      ptx::wgmma_wait<0>();
      this->pin_sums();
      release_weights();
      this->release(tiles);
    }
    weights.wait_full();
    this->read_factors(by);
    release_weights();
    this->store(piece, C::LEFT, by);
  }
};

// --- all of it ---

template <MlaConfig C>
__device__ __forceinline__ void mla(const MlaCall<typename C::T>& call, MlaCutting<C> cutting, float* parts,
                                    float* part_stats) {
  extern __shared__ __align__(1024) char shared[];
  using L = MlaLayout<C>;
  const u32 smem = smem_address(shared);
  if (threadIdx.x == 0) {
    typename L::TilePipe(smem).init(8);
    typename L::QueryPipe(smem).init(128, 128);
    typename L::WeightPipe(smem).init(kFactorLanes, kFactorLanes);
    ptx::fence_mbarrier_init();
  }
  ptx::let_next_kernel_start();
  const MlaBatch<C, kMlaWarps> batch = {call, cutting,
                                        reinterpret_cast<int*>(shared + L::kBytes) + kMlaWarps};
  batch.count();
  __syncthreads();
  MlaPieces<C> pieces(batch);
  const int warpgroup = warpgroup_index();
  if (warpgroup == 2) {
    ptx::lower_registers<56>();
    MlaLoader<C> loader(call, shared);
#pragma unroll 1
    while (pieces.more()) loader.run(pieces.next());
  } else if (warpgroup == 1) {
    ptx::raise_registers<224>();
    MlaAdder<C> adder(call, shared, parts);
#pragma unroll 1
    while (pieces.more()) adder.run(pieces.next());
  } else {
    ptx::raise_registers<224>();
    MlaScorer<C> scorer(call, shared, parts, part_stats);
#pragma unroll 1
    while (pieces.more()) scorer.run(pieces.next());
  }
}

}  // namespace jdg
