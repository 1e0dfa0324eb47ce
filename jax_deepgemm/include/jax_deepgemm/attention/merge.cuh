// The results of units that several pieces were made of (work.cuh), from the sums of decode.cuh, and zeros in
// rows that no sequence has. It may start while that kernel runs (programmatic dependent launch), and every
// block waits for its end, so that what follows this kernel follows that one too.
//
//   a block     one head of every gridDim.x-th token; each of its warps adds every WARPS-th piece's sums, 4
//               columns a lane, then the warps' sums are added in shared memory, in the order of warps
//
//   shared memory   float32 sums [warp][DV], their largest scores and denominators [warp]; a word for each
//                   warp and prefix sums [sequences + 1]
#pragma once

#include <jax_deepgemm/attention/decode.cuh>

namespace jdg {

template <class Config, int WARPS>
struct Merger {
  static constexpr int DV = Config::DV, FOURS = DV / 4, ROUNDS = ceil_div(FOURS, 32);

  const AttentionCall<typename Config::T>& call;
  const Cutting<Config> cutting;
  const float* parts;
  const float* part_stats;
  const int blocks;  // of the kernel before
  float* values;     // [warp][DV]
  Running* stats;    // [warp]
  int* prefix;
  int q_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  __device__ __forceinline__ int window() const { return Config::WINDOW ? call.window : 0; }
  __device__ __forceinline__ i64 row_of(int token) const {
    return static_cast<i64>(token) * (call.kv_heads * Config::GROUP) + q_head;
  }

  __device__ __forceinline__ void run() {
    prefix_sums<WARPS>(prefix, call.sequences, [&](int s) {
      return cutting.all_weights(sequence_of<Config::PAGE>(call, s), window(), call.kv_heads);
    });
    ptx::wait_for_previous_kernel();
    const int step = gridDim.x;
    for (int token = blockIdx.x; token < call.tokens;) {
      // The last sequence that begins at the token or before it: of several, all but the last are empty.
      // Starts that descend, which break the rule, end at some sequence; whether it has the token is looked
      // at.
      const int s = stretch_of(call.starts, call.sequences, token);
      const Sequence sequence = sequence_of<Config::PAGE>(call, s);
      const int own = token - sequence.first;
      if (own < 0 || own >= sequence.rows) {
        put_nothing(token);
      } else if (prefix[s + 1] > prefix[s]) {
        merge(token, s, sequence, own);
      } else {  // the whole sequence is another kernel's
        token += (sequence.rows - own - 1) / step * step;
      }
      token += step;
    }
  }

  __device__ __forceinline__ void put_nothing(int token) const {
    const float nothing[4] = {};
    for (int four = threadIdx.x; four < FOURS; four += WARPS * 32) {
      store_row<Config>(call, row_of(token), q_head, four * 4, nothing, Running{});
    }
  }

  __device__ __forceinline__ void merge(int token, int s, const Sequence& sequence, int own) {
    const int length = cutting.weights(sequence, window());
    const int packed = own * Config::GROUP + q_head % Config::GROUP;
    const int unit = packed / Config::ROWS * call.kv_heads + q_head / Config::GROUP;
    const int row = packed % Config::ROWS, all = cutting.dealt(prefix[call.sequences]);
    if (prefix[s] > all - (unit + 1) * length) {
      put_nothing(token);
      return;
    }
    const int from = prefix[s] + unit * length;
    const bool split = cutting.split > 0;
    const Shares shares(all, blocks);
    const int first = split ? from : shares.of(from);
    const int last = split ? from + length - 1 : shares.of(from + length - 1);
    if (first == last) return;

    Running mine;
    float sums[ROUNDS][4] = {};
#pragma unroll 4
    for (int i = first + warp; i <= last; i += WARPS) {
      const int slot = split ? i : slot_of(i, shares.begin(i) >= from);
      const i64 at = static_cast<i64>(slot) * Config::ROWS + row;
      const Running other = {part_stats[at * 2], part_stats[at * 2 + 1]};
      const float largest = fmaxf(mine.largest, other.largest);
      const float kept = weight_of(mine.largest, largest), added = weight_of(other.largest, largest);
      mine = {largest, mine.sum * kept + other.sum * added};
#pragma unroll
      for (int round = 0; round < ROUNDS; ++round) {
        const int four = round * 32 + lane;
        if (four >= FOURS) break;
        const float4 value = *reinterpret_cast<const float4*>(parts + at * DV + four * 4);
        sums[round][0] = sums[round][0] * kept + value.x * added;
        sums[round][1] = sums[round][1] * kept + value.y * added;
        sums[round][2] = sums[round][2] * kept + value.z * added;
        sums[round][3] = sums[round][3] * kept + value.w * added;
      }
    }
    if (lane == 0) stats[warp] = mine;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (round * 32 + lane < FOURS) values[warp * DV + (round * 32 + lane) * 4 + i] = sums[round][i];
      }
    }
    __syncthreads();
    for (int four = threadIdx.x; four < FOURS; four += WARPS * 32) {
      Running total;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) total.largest = fmaxf(total.largest, stats[w].largest);
      float value[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float weight = weight_of(stats[w].largest, total.largest);
        total.sum += stats[w].sum * weight;
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] += values[w * DV + four * 4 + i] * weight;
      }
      store_row<Config>(call, row_of(token), q_head, four * 4, value, total);
    }
    __syncthreads();  // the next token's sums go to the same places
  }
};

template <class Config, int WARPS>
__device__ __forceinline__ void attention_merge(const AttentionCall<typename Config::T>& call,
                                                Cutting<Config> cutting, const float* parts,
                                                const float* part_stats, int blocks) {
  extern __shared__ __align__(1024) char shared[];
  float* values = reinterpret_cast<float*>(shared);
  Running* stats = reinterpret_cast<Running*>(values + WARPS * Config::DV);
  int* prefix = reinterpret_cast<int*>(stats + WARPS) + WARPS;
  Merger<Config, WARPS>{call, cutting, parts, part_stats, blocks, values, stats, prefix}.run();
}

}  // namespace jdg
