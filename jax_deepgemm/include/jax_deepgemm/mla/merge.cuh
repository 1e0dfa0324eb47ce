// The results of units that several shares had (mla.cuh), and zeros in rows that no sequence has. It may
// start while that kernel runs, and every block waits for its end.
//
//   a block     ROWS rows (heads of one token), each of WARPS warps, which add every WARPS-th piece's sums;
//               then the warps' sums are added in shared memory, in the order of warps
//
//   shared memory   float32 sums [row][warp][DV], their largest scores and denominators; a word for each
//                   warp and prefix sums [sequences + 1]
#pragma once

#include <jax_deepgemm/attention/rows.cuh>
#include <jax_deepgemm/mla/problem.cuh>
#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/convert.cuh>

namespace jdg {

// Four columns of a finished row, and at column 0 its logarithm.
template <class C>
__device__ __forceinline__ void mla_store(const MlaCall<typename C::T>& call, i64 row, int column,
                                          const float (&value)[4], const Running& all) {
  const float by = all.sum == 0.0f ? 0.0f : 1.0f / all.sum;
  u32 pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float low = value[2 * i] * by, high = value[2 * i + 1] * by;
    pairs[i] = C::F16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }
  *reinterpret_cast<uint2*>(call.out + row * C::DV + column) = make_uint2(pairs[0], pairs[1]);
  if (column == 0) call.lse[row] = log_sum(all);
}

template <class C, int WARPS, int ROWS>
__device__ __forceinline__ void mla_merge(const MlaCall<typename C::T>& call, MlaCutting<C> cutting,
                                          const float* parts, const float* part_stats, int teams) {
  constexpr int DV = C::DV, FOURS = DV / 4, TURNS = FOURS / 32, ALL = WARPS * ROWS;
  extern __shared__ __align__(1024) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = warp % WARPS;
  float* const values = reinterpret_cast<float*>(shared) + warp / WARPS * WARPS * DV;  // [warp][DV]
  Running* const stats =
      reinterpret_cast<Running*>(reinterpret_cast<float*>(shared) + ALL * DV) + warp / WARPS * WARPS;
  int* const prefix = reinterpret_cast<int*>(shared + ALL * (DV * 4 + 8)) + ALL;
  const MlaBatch<C, ALL> batch = {call, cutting, prefix};
  batch.count();
  const int token = blockIdx.x, head = blockIdx.y * ROWS + warp / WARPS;
  const i64 to = static_cast<i64>(token) * call.heads + head;
  // The last sequence that begins at the token or before it: of several, all but the last are empty. Starts
  // that descend, which break the rule, end at some sequence; whether it has the token is looked at.
  const int s = C::SPARSE ? token : stretch_of(call.starts, call.sequences, token);
  const Sequence sequence = mla_sequence<C>(call, s);
  const int own = token - sequence.first, length = cutting.weights(sequence);
  const int packed = own * call.heads + min(head, call.heads - 1), row = packed % MlaCutting<C>::kRows;
  const int unit = packed / MlaCutting<C>::kRows;
  ptx::wait_for_previous_kernel();
  if (own < 0 || own >= sequence.rows || batch.before(s) > batch.all() - (unit + 1) * length) {
    const float nothing[4] = {};
    for (int four = share * 32 + lane; four < FOURS; four += WARPS * 32) {
      if (head < call.heads) mla_store<C>(call, to, four * 4, nothing, Running{});
    }
    return;
  }
  const int from = batch.before(s) + unit * length;
  const bool split = cutting.split > 0;
  const Shares shares(batch.all(), teams);
  const int first = split ? from : shares.of(from);
  const int last = split ? from + length - 1 : shares.of(from + length - 1);
  const bool mine = first != last && head < call.heads;
  if (WARPS == 1 && !mine) return;
  if (WARPS > 1 && ROWS == 1 && !mine) return;

  Running all;
  float sums[TURNS][4] = {};
#pragma unroll 2
  for (int i = first + share; i <= last; i += WARPS) {
    const int slot = split ? i : slot_of(i, shares.begin(i) >= from);
    const i64 at = static_cast<i64>(slot) * MlaCutting<C>::kRows + row;
    const Running other = {part_stats[at * 2], part_stats[at * 2 + 1]};
    const float largest = fmaxf(all.largest, other.largest);
    const float kept = weight_of(all.largest, largest), added = weight_of(other.largest, largest);
    all = {largest, all.sum * kept + other.sum * added};
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const float4 value = *reinterpret_cast<const float4*>(parts + at * DV + (turn * 32 + lane) * 4);
      sums[turn][0] = sums[turn][0] * kept + value.x * added;
      sums[turn][1] = sums[turn][1] * kept + value.y * added;
      sums[turn][2] = sums[turn][2] * kept + value.z * added;
      sums[turn][3] = sums[turn][3] * kept + value.w * added;
    }
  }
  if constexpr (WARPS == 1) {
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) mla_store<C>(call, to, (turn * 32 + lane) * 4, sums[turn], all);
    return;
  }
  if (lane == 0) stats[share] = all;
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[share * DV + (turn * 32 + lane) * 4 + i] = sums[turn][i];
  }
  __syncthreads();
  for (int four = share * 32 + lane; four < FOURS; four += WARPS * 32) {
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
    mla_store<C>(call, to, four * 4, value, total);
  }
}

}  // namespace jdg
