// Attention of few rows over a paged cache: every block reads an equal share of all keys.
//
//   warp w    of each round of keys its own KEYS: copies them for itself (cp.async, STAGES tiles in flight),
//             scores them, and has running softmax and sums of its own. No barrier inside a piece of work.
//   block     at the end of a piece, sums of its warps are added in shared memory, in the order of warps.
//             A unit that is one piece is divided and stored; of others, sums go to `parts` for merge.cuh.
//
//   shared memory   STAGES x (K tile, V tile) of each warp, and in their place at the end of a piece float32
//                   sums [warp][ROWS][DV]; then a word for each warp and prefix sums [sequences + 1]
//
// Hazards: a warp writes a slot anew behind a __syncwarp after its last reading (one warp reads and writes
// it); sums go over tiles behind a __syncthreads after all warps' copies have landed and were read.
//
// Nothing here needs more than compute capability 8.0, but the launch of the merging kernel.
#pragma once

#include <jax_deepgemm/attention/keys.cuh>
#include <jax_deepgemm/attention/rows.cuh>
#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg {

// struct Config {
//   using T;                            of q and the result: bf16 or f16
//   bool F16, FP8;                      T is f16; the cache is e4m3
//   int D, DV, GROUP, PAGE;             GROUP: heads of q for one of the cache
//   int ROWS, KEYS, WARPS, STAGES;      ROWS: 16
//   bool CAUSAL, WINDOW, SOFTCAP, SINKS, SLOPES;
//   int SHARED_BYTES;
// };
template <class Config>
struct DecodeLayout {
  static constexpr int kTile = TileShape<Config, Config::D>::BYTES + TileShape<Config, Config::DV>::BYTES;
  static constexpr int kTiles = Config::WARPS * Config::STAGES * kTile;
  static constexpr int kSumPitch = Config::DV + 4;  // float32
  static constexpr int kSums = Config::WARPS * Config::ROWS * (kSumPitch + 2) * 4;
  static constexpr int kBytes = kTiles > kSums ? kTiles : kSums;
};

// What the rows of a lane are: two of a block's 16 packed rows.
template <class Config>
struct PackedRows {
  int packed;  // the block's first
  int all;     // of the sequence
  int head;    // of the cache

  __device__ __forceinline__ bool exists(int row) const { return packed + row < all; }
  __device__ __forceinline__ int token(int row) const { return (packed + row) / Config::GROUP; }
  __device__ __forceinline__ int q_head(int row) const {
    return head * Config::GROUP + (packed + row) % Config::GROUP;
  }
};

// A piece of work: rounds [from, to) of the keys of some rows.
template <class Config>
struct Piece {
  Sequence sequence;
  PackedRows<Config> rows;
  int table;     // the sequence's number
  int from, to;  // rounds
  int slot;      // of its sums, -1: it is the whole unit
};

template <class Config>
struct Decoder {
  using T = typename Config::T;
  using Layout = DecodeLayout<Config>;
  static constexpr int kRound = Config::KEYS * Config::WARPS, kGroups = Config::KEYS / 16;
  static_assert(Config::ROWS == 16, "a tile of mma has 16 rows");

  const AttentionCall<T>& call;
  char* shared;
  float* parts;
  float* part_stats;
  int layer;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 q[Config::D / 16][4];
  float sums[Config::DV / 8][4];
  Running running[2];  // of rows lane / 4 and lane / 4 + 8; a lane's own part of the sums

  __device__ __forceinline__ Decoder(const AttentionCall<T>& call, char* shared, float* parts,
                                     float* part_stats, int layer)
      : call(call), shared(shared), parts(parts), part_stats(part_stats), layer(layer) {}

  __device__ __forceinline__ void run(const Piece<Config>& piece) {
    load_queries(piece);
    see_keys(piece);
    ptx::copy_async_wait<0>();
    __syncthreads();
    put_sums();
    __syncthreads();
    finish(piece);
    __syncthreads();
  }

  __device__ __forceinline__ void load_queries(const Piece<Config>& piece) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const bool exists = piece.rows.exists(row);
      const i64 at =
          static_cast<i64>(piece.sequence.first + piece.rows.token(row)) * heads() + piece.rows.q_head(row);
      const u32* from = reinterpret_cast<const u32*>(call.q + at * Config::D);
#pragma unroll
      for (int step = 0; step < Config::D / 16; ++step) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const int column = step * 16 + query_column<Config>(lane % 4, upper);
          q[step][half + 2 * upper] = exists ? from[column / 2] : 0;
        }
      }
    }
#pragma unroll
    for (auto& tile : sums)
#pragma unroll
      for (float& sum : tile) sum = 0.0f;
    running[0] = running[1] = Running{};
  }

  __device__ __forceinline__ int heads() const { return call.kv_heads * Config::GROUP; }

  __device__ __forceinline__ void see_keys(const Piece<Config>& piece) {
    const Sequence& s = piece.sequence;
    const int last = min(piece.rows.packed + Config::ROWS, piece.rows.all) - 1;
    const int end = Config::CAUSAL ? min(s.keys, s.position(last / Config::GROUP) + 1) : s.keys;
    const int begin = Cutting<Config>::begin(s, window());
    const int lowest = Config::WINDOW ? s.position(piece.rows.packed / Config::GROUP) - call.window + 1 : 0;
    const int from = max(piece.from, (lowest - begin) / kRound),
              to = min(piece.to, ceil_div(end - begin, kRound));
    if (from >= to) return;

    const int first = begin + from * kRound + warp * Config::KEYS;
    const bool layer_exists = layer >= 0 && layer < call.layers;
    const i64 k_page =
        static_cast<i64>(call.kv_heads) * Config::PAGE * TileShape<Config, Config::D>::ROW_BYTES;
    const i64 v_page =
        static_cast<i64>(call.kv_heads) * Config::PAGE * TileShape<Config, Config::DV>::ROW_BYTES;
    const i64 page_of_layer = layer_exists ? static_cast<i64>(layer) * call.pages : 0;
    const char* k = call.k + page_of_layer * k_page + piece.rows.head * (k_page / call.kv_heads);
    const char* v = call.v + page_of_layer * v_page + piece.rows.head * (v_page / call.kv_heads);
    Pages<Config> pages(call.tables + static_cast<i64>(piece.table) * call.table_pages,
                        layer_exists ? call.pages : 0, first, end);
    float scale = call.scale;
    if constexpr (Config::FP8)
      scale *= layer_exists ? call.k_scale[layer * call.kv_heads + piece.rows.head] : 0.0f;

    int issued = 0;
    u32 there = 0;  // a bit for each 16 keys in flight: their page is one of the cache
    const auto issue = [&] {
      if (from + issued < to) {
        int page[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          page[g] = pages.of(g);
          there = there << 1 | (page[g] >= 0);
        }
        pages.advance();
        const u32 tile = tile_of(issued % Config::STAGES);
        const int key = first + issued * kRound;
        copy_tile<Config, Config::D>(tile, k, k_page, page, key, end);
        copy_tile<Config, Config::DV>(tile + TileShape<Config, Config::D>::BYTES, v, v_page, page, key, end);
      }
      ++issued;
      ptx::copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < Config::STAGES - 1; ++i) issue();
    for (int round = from; round < to; ++round) {
      issue();
      ptx::copy_async_wait<Config::STAGES - 1>();
      __syncwarp();
      const int behind = min(issued, to - from) - 1 - (round - from);  // tiles that are in flight behind it
      see_tile(piece, tile_of((round - from) % Config::STAGES), first + (round - from) * kRound, end,
               there >> behind * kGroups, scale);
      __syncwarp();
    }
  }

  __device__ __forceinline__ int window() const { return Config::WINDOW ? call.window : 0; }
  __device__ __forceinline__ u32 tile_of(int stage) const {
    return smem_address(shared) + (warp * Config::STAGES + stage) * Layout::kTile;
  }

  __device__ __forceinline__ void see_tile(const Piece<Config>& piece, u32 tile, int first_key, int end,
                                           u32 there, float scale) {
    float scores[Config::KEYS / 8][4];
#pragma unroll
    for (auto& some : scores)
#pragma unroll
      for (float& score : some) score = 0.0f;
    score_tile<Config>(scores, q, tile);
    u32 weights[kGroups][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows that do not exist have queries and scores of 0, which add nothing as weights.
      if (half == 0 || piece.rows.exists(8)) weigh(piece, half, scores, first_key, end, there, scale);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&two)[4] = scores[g * 2 + i / 2];
        weights[g][i] = pack(two[i % 2 * 2], two[i % 2 * 2 + 1]);
      }
    }
    add_values<Config>(sums, weights, tile + TileShape<Config, Config::D>::BYTES);
  }

  __device__ __forceinline__ static u32 pack(float low, float high) {
    return Config::F16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }

  // Scores of one of a lane's rows become weights; its sums so far are brought to the new largest score.
  __device__ __forceinline__ void weigh(const Piece<Config>& piece, int half,
                                        float (&scores)[Config::KEYS / 8][4], int first_key, int end,
                                        u32 there, float scale) {
    const int row = lane / 4 + 8 * half, position = piece.sequence.position(piece.rows.token(row));
    float slope = 0.0f;
    if constexpr (Config::SLOPES) {
      if (piece.rows.exists(row)) slope = call.slopes[piece.rows.q_head(row)] * kLog2E;
    }
    const int stop = Config::CAUSAL ? min(end, position + 1) : position < 0 ? 0 : end;
    const u32 mine = there & ((1u << kGroups) - 1);
    const bool all_seen = first_key + Config::KEYS <= stop && mine == (1u << kGroups) - 1 &&
                          (!Config::WINDOW || first_key > position - call.window);
#pragma unroll
    for (int t = 0; t < Config::KEYS / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[t][half * 2 + i];
        if constexpr (Config::SOFTCAP) {
          const float twice = ptx::ex2_approx(score * (scale * 2.0f * kLog2E / call.softcap));
          score = call.softcap * kLog2E * (1.0f - 2.0f * ptx::rcp_approx(twice + 1.0f));
        } else {
          score *= scale * kLog2E;
        }
        if constexpr (Config::SLOPES) {
          score += slope * static_cast<float>(first_key + t * 8 + lane % 4 * 2 + i - position);
        }
      }
    }
    if (!all_seen) {
#pragma unroll
      for (int t = 0; t < Config::KEYS / 8; ++t) {
        const bool in_cache = mine >> (kGroups - 1 - t / 2) & 1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = first_key + t * 8 + lane % 4 * 2 + i;
          const bool seen = key < stop && in_cache && (!Config::WINDOW || key > position - call.window);
          if (!seen) scores[t][half * 2 + i] = kNothing;
        }
      }
    }
    float largest = running[half].largest;
#pragma unroll
    for (const auto& some : scores) largest = fmaxf(largest, fmaxf(some[half * 2], some[half * 2 + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 2));
    const float kept = weight_of(running[half].largest, largest), less = subtrahend(largest);
    float sum = running[half].sum * kept;
#pragma unroll
    for (auto& some : scores) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        some[half * 2 + i] = ptx::ex2_approx(some[half * 2 + i] - less);
        sum += some[half * 2 + i];
      }
    }
    running[half] = {largest, sum};
#pragma unroll
    for (auto& tile : sums) {
      tile[half * 2] *= kept;
      tile[half * 2 + 1] *= kept;
    }
  }

  __device__ __forceinline__ float* sums_of(int of_warp, int row) const {
    return reinterpret_cast<float*>(shared) + (of_warp * Config::ROWS + row) * (Layout::kSumPitch + 2);
  }

  __device__ __forceinline__ void put_sums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = running[half].sum;
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      float* to = sums_of(warp, lane / 4 + 8 * half);
      if (lane % 4 == 0) to[Layout::kSumPitch] = running[half].largest, to[Layout::kSumPitch + 1] = sum;
#pragma unroll
      for (int t = 0; t < Config::DV / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) to[value_column<Config>(t, lane % 4 * 2 + i)] = sums[t][half * 2 + i];
      }
    }
  }

  // Four columns of one row at a time: the warps' sums, in their order.
  __device__ __forceinline__ void finish(const Piece<Config>& piece) {
    constexpr int FOURS = Config::DV / 4, ALL = Config::ROWS * FOURS;
    const bool layer_exists = layer >= 0 && layer < call.layers;
    for (int at = threadIdx.x; at < ALL; at += Config::WARPS * 32) {
      const int row = at / FOURS, column = at % FOURS * 4;
      if (!piece.rows.exists(row)) continue;
      Running all;
#pragma unroll
      for (int w = 0; w < Config::WARPS; ++w)
        all.largest = fmaxf(all.largest, sums_of(w, row)[Layout::kSumPitch]);
      float value[4] = {};
#pragma unroll
      for (int w = 0; w < Config::WARPS; ++w) {
        const float* from = sums_of(w, row);
        const float weight = weight_of(from[Layout::kSumPitch], all.largest);
        all.sum += from[Layout::kSumPitch + 1] * weight;
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] += from[column + i] * weight;
      }
      if constexpr (Config::FP8) {
        const float scale = layer_exists ? call.v_scale[layer * call.kv_heads + piece.rows.head] : 0.0f;
#pragma unroll
        for (float& one : value) one *= scale;
      }
      if (piece.slot >= 0) {
        const i64 to = static_cast<i64>(piece.slot) * Config::ROWS + row;
        *reinterpret_cast<float4*>(parts + to * Config::DV + column) =
            make_float4(value[0], value[1], value[2], value[3]);
        if (column == 0) part_stats[to * 2] = all.largest, part_stats[to * 2 + 1] = all.sum;
      } else {
        const i64 to =
            static_cast<i64>(piece.sequence.first + piece.rows.token(row)) * heads() + piece.rows.q_head(row);
        store_row<Config>(call, to, piece.rows.q_head(row), column, value, all);
      }
    }
  }
};

// Four columns of a finished row of the result, and at column 0 its logarithm.
template <class Config, class T>
__device__ __forceinline__ void store_row(const AttentionCall<T>& call, i64 row, int head, int column,
                                          const float (&value)[4], const Running& all) {
  Running total = all;
  if constexpr (Config::SINKS) total = with_sink(all, call.sinks[head]);
  const float kept = weight_of(all.largest, total.largest);
  const float by = total.sum > 0.0f || total.sum != total.sum ? kept / total.sum : 0.0f;
  u32 pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float low = value[2 * i] * by, high = value[2 * i + 1] * by;
    pairs[i] = Config::F16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }
  *reinterpret_cast<uint2*>(call.out + row * Config::DV + column) = make_uint2(pairs[0], pairs[1]);
  if (column == 0) call.lse[row] = log_sum(total);
}

// Brings tables to L2 while lengths are waited for: a line of them by each thread of the launch.
template <class T>
__device__ __forceinline__ void touch_tables(const AttentionCall<T>& call) {
  constexpr int LINE = 32;  // numbers
  const i64 at = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * LINE;
  if (at < static_cast<i64>(call.sequences) * call.table_pages) ptx::prefetch(call.tables + at);
}

template <class Config>
__device__ __forceinline__ void attention_decode(const AttentionCall<typename Config::T>& call,
                                                 Cutting<Config> cutting, float* parts, float* part_stats) {
  extern __shared__ __align__(1024) char shared[];
  static_assert(Config::SHARED_BYTES >= DecodeLayout<Config>::kBytes, "the host knows the layout");
  int* prefix = reinterpret_cast<int*>(shared + DecodeLayout<Config>::kBytes) + Config::WARPS;
  const int window = Config::WINDOW ? call.window : 0;
  ptx::let_next_kernel_start();
  touch_tables(call);
  const int layer = *call.layer;
  prefix_sums<Config::WARPS>(prefix, call.sequences, [&](int s) {
    return cutting.all_weights(sequence_of<Config::PAGE>(call, s), window, call.kv_heads);
  });

  const Shares shares(cutting.dealt(prefix[call.sequences]), gridDim.x);
  const int block = blockIdx.x;
  if (block >= shares.count) return;
  const int begin = shares.begin(block), end = shares.begin(block + 1);
  Decoder<Config> decoder(call, shared, parts, part_stats, layer);
  for (int at = begin; at < end;) {
    const int s = stretch_of(prefix, call.sequences, at);
    const Sequence sequence = sequence_of<Config::PAGE>(call, s);
    const int length = cutting.weights(sequence, window);
    const int unit = (at - prefix[s]) / length, within = (at - prefix[s]) % length;
    const int count = cutting.split > 0 ? 1 : min(length - within, end - at);
    const int slot = count == length ? -1 : cutting.split > 0 ? at : slot_of(block, at == begin);
    const int rounds = cutting.split > 0 ? cutting.split : 1;
    decoder.run({sequence,
                 {unit / call.kv_heads * Config::ROWS, sequence.rows * Config::GROUP, unit % call.kv_heads},
                 s,
                 within * rounds,
                 (within + count) * rounds,
                 slot});
    at += count;
  }
}

}  // namespace jdg
