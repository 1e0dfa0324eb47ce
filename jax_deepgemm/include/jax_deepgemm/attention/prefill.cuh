// Attention of many queries of a sequence over a paged cache.
//
// clang-format off
//   warpgroups 0, 1 (, 2)   consumers: 64 packed rows each, by the same keys and values
//   the next warpgroup      warp 0: producer of items, keys and values; the others load queries
//   one more                of a cache in e4m3: makes what is multiplied of it
//
//   items:    slot  Item         producer -> all others
//   queries:  slot  [rows][d]    loaders -> consumers
//   keys:     slot  [KEYS][d]    producer -> consumers; record.x: boxes that are not in the pool
//   values:   slot  [KEYS][d]    producer -> consumers
//
//   consumer, tiles from the last to the first:
//     scores of the last tile, their weights
//     for each tile before:    issue its scores, then weights by values of the tile behind it
//                              wait for the scores: mask, maximum, powers
//                              wait for the values: scale the sums, weights to registers
//     weights by values of the first tile; sums to memory
//
//   shared memory:  queries | keys[STAGES] | values[STAGES] | four pipelines | items[2] | counts
// clang-format on
//
// Boxes outside of the pool, and those behind the last key, arrive as zeros. What a page holds behind the
// last key is whatever it was: scores there are masked, and the consumers clear the values, as 0 by NaN is no
// 0.
//
// Weights are powers of 2: `factor` brings scores to log2. The largest score so far, and the sum of weights,
// begin as a head's sink, where there is one.
#pragma once

#include <jax_deepgemm/attention/prefill_load.cuh>
#include <jax_deepgemm/ptx/fp8.cuh>
#include <jax_deepgemm/ptx/named.cuh>
#include <jax_deepgemm/ptx/strided.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kSlack = 8.0f;  // of log2: weights are 256 at most, which float16 has room for
constexpr int kClearBarrier = 1, kTurnBarrier = 2;

// --- consumers ---

// Of each of a thread's rows, what sums so far are multiplied by; `any`: whether for some of the warp it is
// not 1.
struct Shrink {
  float by[2];
  bool any;
};

template <class C>
struct Attender {
  using L = PrefillLayout<C>;
  static constexpr int kHalf = C::KEYS / 2, kColumns = C::KEYS / 8, kSteps = C::KEYS / 16;
  static constexpr int kSums = C::V_DEPTH / 2, kFirst = C::FIRST / 2, kRest = kSums - kFirst;
  static constexpr int kThreads = 128 * C::CONSUMERS;                   // of all consumers
  static constexpr bool kMoved = C::SOFTCAP || C::SLOPES || C::SCALED;  // scores are in log2 before masks

  const Call<C>& p;
  Items<C> items;
  typename L::KeyPipe keys;
  typename L::ValuePipe values;
  typename L::QueryPipe queries;
  const int warpgroup, lane, row;  // of a tile, this thread's first of two
  const float unscaled;            // of products, but for what a head of the cache has
  float scale, factor;             // of products, of scores
  float scores[kHalf];
  float first_sums[kFirst], rest_sums[kRest > 0 ? kRest : 1];
  u32 weights[kSteps][4];
  bool some;  // rows
  // Of this thread's rows:
  float most[2], total[2], slope[2];
  int position[2], first[2], last[2];  // of keys that are seen

  __device__ __forceinline__ Attender(const Call<C>& p, u32 smem, int warpgroup)
      : p(p),
        items(smem),
        keys(smem),
        values(smem),
        queries(smem),
        warpgroup(warpgroup),
        lane(threadIdx.x % 32),
        row(threadIdx.x / 32 * 16 + lane / 4),
        unscaled(C::SOFTCAP ? 2.0f * p.scale / p.softcap * kLog2E : p.scale * kLog2E),
        scale(unscaled),
        factor(kMoved ? 1.0f : unscaled) {}

  __device__ __forceinline__ float& sum(int i) { return i < kFirst ? first_sums[i] : rest_sums[i - kFirst]; }
  __device__ __forceinline__ void pin_sums() {
    ptx::pin(first_sums);
    if constexpr (kRest > 0) ptx::pin(rest_sums);
  }

  // --- rows ---

  __device__ __forceinline__ static int head_of(const Item& item, int packed) {
    return item.head * C::GROUP + packed % C::GROUP;
  }

  __device__ __forceinline__ void begin(const Item& item) {
    some = item.rows > 0;
    if constexpr (kPackedCache<C>) {
      scale = unscaled * p.k_scale[scale_of<C>(p, item.head)];
      factor = kMoved ? 1.0f : scale;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed = min(item.row + row + half * 8, item.rows - 1);
      position[half] = item.position + packed / C::GROUP;
      last[half] = C::CAUSAL ? min(position[half], item.keys - 1) : item.keys - 1;
      first[half] = C::WINDOW ? position[half] - p.window + 1 : 0;
      most[half] = no_score(), total[half] = 0.0f, slope[half] = 0.0f;
      if constexpr (C::SINKS) {
        most[half] = p.sinks[head_of(item, packed)] * kLog2E / factor;
        total[half] = lane % 4 == 0 ? 1.0f : 0.0f;
      }
      if constexpr (C::SLOPES) slope[half] = p.slopes[head_of(item, packed)] * kLog2E;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum(i) = 0.0f;
  }

  // --- products ---

  __device__ __forceinline__ void issue_scores() {
    using Q = typename L::Queries;
    using K = typename L::Keys;
    const ptx::StridedDescriptor<Q::kGroup> a(keys.smem + warpgroup * Q::row(64));
    const ptx::StridedDescriptor<K::kGroup> b(key_slot<C>(keys));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::DEPTH / 16; ++step) {
      const int slab = step / 4, within = step % 4 * 32;
      C::Scores::issue(scores, a.plus(slab * Q::kSlab + within), b.plus(slab * K::kSlab + within), step > 0);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_values() {
    using V = typename L::Values;
    const ptx::StridedDescriptor<V::kGroup, V::kSlab> b(value_slot<C>(values));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      C::Values::issue(first_sums, weights[step], b.plus(step * V::row(16)), true);
      if constexpr (kRest > 0)
        C::Rest::issue(rest_sums, weights[step],
                       b.plus(step * V::row(16) + C::FIRST / kSlabNumbers * V::kSlab), true);
    }
    ptx::wgmma_commit();
  }

  // Whose turn it is to issue products. The first one's comes at once.
  __device__ __forceinline__ void await_turn() const {
    if constexpr (C::PING_PONG) {
      if (warpgroup == 0)
        ptx::named_barrier<kTurnBarrier, 256>();
      else
        ptx::named_barrier<kTurnBarrier + 1, 256>();
    }
  }
  __device__ __forceinline__ static void give_turn(int to) {
    if constexpr (C::PING_PONG) {
      if (to == 0)
        ptx::named_barrier_arrive<kTurnBarrier, 256>();
      else
        ptx::named_barrier_arrive<kTurnBarrier + 1, 256>();
    }
  }

  template <class P>
  __device__ __forceinline__ void release(P& pipe) const {
    if (lane == 0) pipe.release(pipe.empty());
    pipe.advance();
  }

  // --- scores to weights ---

  __device__ __forceinline__ void move_scores(int tile) {
    const float bound = p.softcap * kLog2E;
    const int at = tile * C::KEYS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      float x = scores[i] * scale;
      if constexpr (C::SOFTCAP) x = bound - 2.0f * bound * ptx::rcp_approx(1.0f + ptx::ex2_approx(x));
      const int half = i / 2 % 2;
      if constexpr (C::SLOPES) x += slope[half] * (at + i / 4 * 8 + i % 2 - position[half]);
      scores[i] = x;
    }
  }

  __device__ __forceinline__ void mask_edge(int tile) {
    const int at = tile * C::KEYS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int column = i / 4 * 8 + i % 2, half = i / 2 % 2;
      const bool seen = column <= last[half] - at && (!C::WINDOW || column >= first[half] - at);
      scores[i] = seen ? scores[i] : no_score();
    }
  }

  __device__ __forceinline__ void mask_missing(u32 missing) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i)
      scores[i] = missing >> i / 4 * 8 / kBoxKeys<C> & 1 ? no_score() : scores[i];
  }

  // The largest score of each row so far, of all lanes that share it. Two chains each, as one waits for
  // itself.
  __device__ __forceinline__ float2 largest() const {
    float high[2][2] = {{most[0], most[0]}, {most[1], most[1]}};
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      float& one = high[i / 2 % 2][i / 4 % 2];
      one = fmaxf(one, scores[i]);
    }
    float rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] = fmaxf(high[half][0], high[half][1]);
      rows[half] = fmaxf(rows[half], __shfl_xor_sync(0xFFFFFFFF, rows[half], 1));
      rows[half] = fmaxf(rows[half], __shfl_xor_sync(0xFFFFFFFF, rows[half], 2));
    }
    return {rows[0], rows[1]};
  }

  // Scores to powers. Returns, of each row, what sums so far are multiplied by. As long as no score is more
  // than kSlack above what they were taken relative to, that stays, and so do the sums.
  __device__ __forceinline__ Shrink powers() {
    const float2 high = largest();
    Shrink shrink;
    bool grown[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float now = half == 0 ? high.x : high.y, before = most[half] * factor;
      grown[half] = now * factor - before > kSlack;
      most[half] = grown[half] ? now : most[half];
      const float offset = most[half] == no_score() ? 0.0f : most[half] * factor;
      shrink.by[half] = grown[half] ? ptx::ex2_approx(before - offset) : 1.0f;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < kHalf; i += 4)
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = ptx::ex2_approx(scores[j] * factor - offset);
          sum += scores[j];
        }
      total[half] = total[half] * shrink.by[half] + sum;
    }
    shrink.any = __ballot_sync(0xFFFFFFFF, grown[0] || grown[1]) != 0;
    return shrink;
  }

  __device__ __forceinline__ static u32 pack(float low, float high) {
    return is_same<typename C::T, f16> ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }

  // An accumulator's columns are an operand's as they lie, 16 at a time.
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kHalf; i += 2) weights[i / 8][i % 8 / 2] = pack(scores[i], scores[i + 1]);
  }

  // Scores of a tile that have arrived. `some` is always so: without a branch ptxas puts the wait for values
  // in front of all powers.
  template <bool EDGE>
  __device__ __forceinline__ Shrink weigh(int tile, u32 missing) {
    if constexpr (kMoved) move_scores(tile);
    if constexpr (EDGE) mask_edge(tile);
    if (missing != 0) mask_missing(missing);
    Shrink shrink = {{1.0f, 1.0f}, false};
    if (some) shrink = powers();
    return shrink;
  }

  // --- tiles ---

  // Boxes of the tile of keys that are not in the pool. Lane 0 reads, because lane 0 is the one that releases
  // the slot.
  __device__ __forceinline__ u32 missing() const {
    float boxes = 0.0f;
    if (lane == 0) boxes = ptx::load_shared(keys.smem + L::KeyPipe::kRecords + keys.stage * 16);
    return __shfl_sync(0xFFFFFFFF, __float_as_uint(boxes), 0);
  }

  // Values behind the sequence's last key that came with its box.
  __device__ __forceinline__ void clear_values(const Item& item) {
    constexpr int kBox = kBoxKeys<C>;
    const int begin = item.keys - (item.end - 1) * C::KEYS;
    const int rows = min(C::KEYS, (begin + kBox - 1) / kBox * kBox) - begin;
    if (rows <= 0) return;
    values.wait_full();
    constexpr int kChunks = L::Values::kSlabs * 8;
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads)
      ptx::store_shared_4(value_slot<C>(values) + L::Values::chunk(begin + i / kChunks, i % kChunks), 0, 0, 0,
                          0);
    ptx::fence_proxy_async();
    ptx::named_barrier<kClearBarrier, kThreads>();
  }

  __device__ __forceinline__ void begin_tiles(const Item& item) {
    queries.wait_full();
    keys.wait_full();
    ptx::pin(scores);
    issue_scores();
    const u32 gone = missing();
    ptx::wgmma_wait<0>();
    ptx::pin(scores);
    release(keys);
    weigh<true>(item.end - 1, gone);
    pack_weights();
    if constexpr (!kPackedCache<C>) clear_values(item);  // which has no NaN
  }

  template <bool EDGE>
  __device__ __forceinline__ void step(int tile) {
    keys.wait_full();
    await_turn();
    ptx::pin(scores);
    pin_sums();
    ptx::pin(weights);
    issue_scores();
    values.wait_full();
    issue_values();
    give_turn(1 - warpgroup);
    const u32 gone = missing();
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    release(keys);
    const Shrink shrink = weigh<EDGE>(tile, gone);
    ptx::pin(scores);
    ptx::wgmma_wait<0>();
    pin_sums();
    ptx::pin(weights);
    release(values);
    if (shrink.any)
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum(i) *= shrink.by[i / 2 % 2];
    pack_weights();
  }

  __device__ __forceinline__ void end_tiles() {
    values.wait_full();
    pin_sums();
    ptx::pin(weights);
    issue_values();
    ptx::wgmma_wait<0>();
    pin_sums();
    release(values);
  }

  // From the last tile down. Tiles between `low` and `high` are seen by all rows of the tile.
  __device__ __forceinline__ void attend(const Item& item) {
    const int top = item.position + item.row / C::GROUP;  // positions of the first and the last row
    const int bottom = item.position + (min(item.row + kTileRows<C>, item.rows) - 1) / C::GROUP;
    const int whole = max(C::CAUSAL ? min(item.keys, top + 1) : item.keys, 0) / C::KEYS;
    const int low = C::WINDOW ? (max(bottom - p.window + 1, 0) + C::KEYS - 1) / C::KEYS : 0;
    begin_tiles(item);
    int tile = item.end - 2;
#pragma unroll 1
    for (; tile >= max(whole, item.begin); --tile) step<true>(tile);
#pragma unroll 1
    for (; tile >= max(low, item.begin); --tile) step<false>(tile);
    if constexpr (C::WINDOW)
#pragma unroll 1
      for (; tile >= item.begin; --tile) step<true>(tile);
    if (lane == 0) queries.release(queries.empty());
    queries.advance();
    end_tiles();
  }

  // --- results ---

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

  __device__ __forceinline__ void store(const Item& item) {
    constexpr int kBlocks = C::V_DEPTH / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[half];
      all += __shfl_xor_sync(0xFFFFFFFF, all, 1);
      all += __shfl_xor_sync(0xFFFFFFFF, all, 2);
      if (!C::CAUSAL && position[half] < 0) all = 0.0f;
      float inverse = all == 0.0f ? 0.0f : 1.0f / all;
      if constexpr (kPackedCache<C>) inverse *= p.v_scale[scale_of<C>(p, item.head)];
      const int packed = item.row + row + half * 8;
      const bool exists = packed < item.rows;
      const i64 at =
          static_cast<i64>(item.token + packed / C::GROUP) * (C::KV_HEADS * C::GROUP) + head_of(item, packed);
      if (exists && lane % 4 == 0)
        p.lse[at] = all != 0.0f ? (most[half] * factor + log2f(all)) * kLn2
                    : C::SINKS  ? p.sinks[head_of(item, packed)]
                                : no_score();
      u16* const to = reinterpret_cast<u16*>(p.out) + at * C::V_DEPTH;
#pragma unroll
      for (int block = 0; block < kBlocks; block += 4) {
        u32 w[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && block + i < kBlocks; ++i) {
          const int j = (block + i) * 4 + 2 * half;
          w[i] = pack(sum(j) * inverse, sum(j + 1) * inverse);
        }
        transpose(w);
        if (exists && block + lane % 4 < kBlocks)
          *reinterpret_cast<uint4*>(to + (block + lane % 4) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (warpgroup == 1) give_turn(0);
#pragma unroll 1
    for (;;) {
      const Item item = items.receive();
      if (item.head < 0) return;
      begin(item);
      if (item.begin < item.end) attend(item);
      store(item);
    }
  }
};

// --- all of it ---

template <PrefillConfig C>
__device__ __forceinline__ void prefill(const Call<C>& p) {
  extern __shared__ __align__(1024) char shared[];
  using L = PrefillLayout<C>;
  const u32 smem = smem_address(shared);
  int* const totals = reinterpret_cast<int*>(shared + L::kCounts);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * C::CONSUMERS, kFillers = kPackedCache<C> ? kWideners : 1;
    typename L::KeyPipe(smem).init(kWarps, kFillers);
    typename L::ValuePipe(smem).init(kWarps, kFillers);
    typename L::PackedPipe(smem).init(kWideners / 32);
    typename L::QueryPipe(smem).init(kWarps, kLoaders);
    typename L::ItemPipe(smem).init(kPrefillWarps<C> - 1);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_previous_kernel();
  count_items<C>(p, totals);
  __syncthreads();
  const int warpgroup = warpgroup_index();
  if (warpgroup == C::CONSUMERS) {
    ptx::lower_registers<kFew<C>>();
    if (warp_index() % 4 == 0)
      PrefillProducer<C>(p, smem, totals).run();
    else
      Loader<C>(p, smem).run();
  } else if (kPackedCache<C> && warpgroup > C::CONSUMERS) {
    ptx::lower_registers<kWidenerRegisters<C>>();
    if constexpr (kPackedCache<C>) Widener<C>(smem).run();
  } else {
    ptx::raise_registers<kMany<C>>();
    Attender<C>(p, smem, warpgroup).run();
  }
}

}  // namespace jdg
