// Attention of many queries of a sequence over a paged cache.
//
// clang-format off
//   warpgroups 0, 1   consumers: 64 packed rows each, by the same keys and values
//   warpgroup 2       warp 0: producer of items, keys and values; the others load queries, and write rows
//                     that no sequence has
//
//   items:    slot  Item                       producer -> all others
//   queries:  slot  [slabs of 64][128 rows]    loaders -> consumers
//   keys:     slot  [slabs of 64][KEYS]        producer -> consumers; record.x: boxes that are not in the pool
//   values:   slot  [slabs of 64][KEYS]        producer -> consumers
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

#include <jax_deepgemm/attention/prefill_work.cuh>
#include <jax_deepgemm/ptx/copy.cuh>
#include <jax_deepgemm/ptx/fp8.cuh>
#include <jax_deepgemm/ptx/named.cuh>
#include <jax_deepgemm/ptx/tma.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kClearBarrier = 1, kTurnBarrier = 2;

__device__ __forceinline__ float no_score() { return __int_as_float(0xFF800000); }

// What all readers of items do. Lane 0 reads, because lane 0 is the one that releases the slot.
template <class C>
struct Items {
  typename PrefillLayout<C>::ItemPipe pipe;

  __device__ __forceinline__ explicit Items(u32 smem) : pipe(smem) {}
  __device__ __forceinline__ u32 place() const {
    return pipe.smem + PrefillLayout<C>::kItems + pipe.stage * kItemBytes;
  }
  __device__ __forceinline__ Item receive() {
    pipe.wait_full();
    float4 a = {}, b = {};
    if (threadIdx.x % 32 == 0) a = ptx::load_shared_4(place()), b = ptx::load_shared_4(place() + 16);
    const auto shared = [](float v) { return __float_as_int(__shfl_sync(0xFFFFFFFF, v, 0)); };
    const Item item = {shared(a.x), shared(a.y), shared(a.z), shared(a.w),
                       shared(b.x), shared(b.y), shared(b.z), shared(b.w)};
    if (threadIdx.x % 32 == 0) pipe.release(pipe.empty());
    pipe.advance();
    return item;
  }
  __device__ __forceinline__ void publish(const Item& item) {
    pipe.wait_empty();
    __syncwarp();  // as in Pipeline::pass
    if (threadIdx.x % 32 == 0) {
      ptx::store_shared_4(place(), item.token, item.rows, item.row, item.head);
      ptx::store_shared_4(place() + 16, item.position, item.keys, item.begin, item.end);
      pipe.fill_with_nothing();
    }
    __syncwarp();
    pipe.advance();
  }
};

// --- producer ---

// A warp. All lanes know the pages of a tile, one of them loads.
template <class C>
struct PrefillProducer {
  using L = PrefillLayout<C>;
  static constexpr int kBox = kBoxKeys<C>;

  const PrefillProblem& p;
  Walk<C> walk;
  Items<C> items;
  typename L::KeyPipe keys;
  typename L::ValuePipe values;
  const int lane, first_page;
  const bool elected;

  __device__ __forceinline__ PrefillProducer(const PrefillProblem& p, u32 smem, const int* totals)
      : p(p),
        walk(p, totals),
        items(smem),
        keys(smem),
        values(smem),
        lane(threadIdx.x % 32),
        first_page(clamp_to(*p.layer, 0, p.layers - 1) * p.pages),
        elected(ptx::elect()) {}

  // This lane's page of a tile, counted over all layers; -1: none, -2: not in the pool.
  __device__ __forceinline__ int page_of(const int* table, const Item& item, int tile) const {
    const int key = tile * C::KEYS + lane * kBox;
    if (lane >= kBoxes<C> || tile < item.begin || key >= item.keys) return -1;
    const int page = table[key / C::PAGE];
    return page >= 0 && page < p.pages ? first_page + page : -2;
  }

  template <int SLABS>
  __device__ __forceinline__ void load(const TensorMap& map, u32 slot, u32 bar, int tile, int head,
                                       int page) {
#pragma unroll
    for (int i = 0; i < kBoxes<C>; ++i) {
      const int at = __shfl_sync(0xFFFFFFFF, page, i), row = (tile * C::KEYS + i * kBox) % C::PAGE;
      if (elected)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
          ptx::tma_load(slot + (slab * C::KEYS + i * kBox) * kSlabBytes, map, bar, slab * kSlabNumbers, row,
                        head, at < 0 ? -1 : at);
    }
  }

  __device__ __forceinline__ void load_keys(int tile, int head, int page) {
    const u32 missing = __ballot_sync(0xFFFFFFFF, page == -2);
    keys.wait_empty();
    if (elected) {
      keys.publish(static_cast<int>(missing), 0, 0);
      keys.expect(L::kKeyBytes);
    }
    load<L::kSlabs>(*p.k, keys.smem + L::kKeys + keys.stage * L::kKeyBytes, keys.full(), tile, head, page);
    keys.advance();
  }
  __device__ __forceinline__ void load_values(int tile, int head, int page) {
    values.wait_empty();
    if (elected) values.expect(L::kValueBytes);
    load<L::kValueSlabs>(*p.v, values.smem + L::kValues + values.stage * L::kValueBytes, values.full(), tile,
                         head, page);
    values.advance();
  }

  // Values come a tile behind keys, as they are used.
  __device__ __forceinline__ void load_item(const Item& item) {
    const int* const table = p.tables + static_cast<i64>(walk.sequence) * p.table_pages;
    int page = page_of(table, item, item.end - 1), before = -1;
#pragma unroll 1
    for (int tile = item.end - 1; tile >= item.begin; --tile) {
      const int next = page_of(table, item, tile - 1);
      load_keys(tile, item.head, page);
      if (tile + 1 < item.end) load_values(tile + 1, item.head, before);
      before = page, page = next;
    }
    load_values(item.begin, item.head, before);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      const Item item = walk.next();
      items.publish(item);
      if (item.head < 0) return;
      if (item.begin < item.end) load_item(item);
    }
  }
};

// --- loaders of queries ---

template <class C>
struct Loader {
  using L = PrefillLayout<C>;
  static constexpr int kChunks = C::DEPTH / 8;  // of 16 bytes, of a row

  const PrefillProblem& p;
  Items<C> items;
  typename L::QueryPipe queries;
  const int thread;

  __device__ __forceinline__ Loader(const PrefillProblem& p, u32 smem)
      : p(p), items(smem), queries(smem), thread(static_cast<int>(threadIdx.x) % 128 - 32) {}

  __device__ __forceinline__ void load(const Item& item) const {
    const char* const from = static_cast<const char*>(p.q);
#pragma unroll 2
    for (int i = thread; i < kTileRows * kChunks; i += kLoaderThreads) {
      const int row = i / kChunks, chunk = i % kChunks, packed = item.row + row;
      const bool exists = packed < item.rows;
      const int token = item.token + packed / C::GROUP, head = item.head * C::GROUP + packed % C::GROUP;
      const i64 at = static_cast<i64>(token) * (C::KV_HEADS * C::GROUP) + head;
      const u32 to = chunk / 8 * kTileRows * kSlabBytes + row * kSlabBytes + (chunk % 8 ^ row % 8) * 16;
      ptx::copy_async(queries.smem + to, exists ? from + (at * C::DEPTH + chunk * 8) * 2 : from,
                      exists ? 16 : 0);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait();
    ptx::fence_proxy_async();
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      const Item item = items.receive();
      if (item.head < 0) return;
      if (item.begin >= item.end) continue;
      queries.wait_empty();
      load(item);
      queries.fill_with_nothing();
      queries.advance();
    }
  }

  // Tokens [begin, end), shared by the loaders of all blocks.
  __device__ __forceinline__ void clear(int begin, int end) const {
    constexpr int kHeads = C::KV_HEADS * C::GROUP, kVectors = C::V_DEPTH / 8;
    const i64 first = static_cast<i64>(begin) * kHeads, last = static_cast<i64>(end) * kHeads;
    const i64 mine = static_cast<i64>(blockIdx.x) * kLoaderThreads + thread, all = gridDim.x * kLoaderThreads;
    uint4* const out = static_cast<uint4*>(p.out);
    for (i64 i = first * kVectors + mine; i < last * kVectors; i += all) out[i] = make_uint4(0, 0, 0, 0);
    for (i64 i = first + mine; i < last; i += all) p.lse[i] = C::SINKS ? p.sinks[i % kHeads] : no_score();
  }

  // Rows of no sequence.
  __device__ __forceinline__ void clear() const {
    const int begin = clamp_to(p.cu_q_lens[0], 0, p.tokens);
    clear(0, begin);
    clear(max(clamp_to(p.cu_q_lens[p.seqs], 0, p.tokens), begin), p.tokens);
  }
};

// --- consumers ---

template <class C>
struct Attender {
  using L = PrefillLayout<C>;
  static constexpr int kHalf = C::KEYS / 2, kColumns = C::KEYS / 8, kSteps = C::KEYS / 16;
  static constexpr int kSums = C::V_DEPTH / 2;
  static constexpr bool kMoved = C::SOFTCAP || C::SLOPES || C::SCALED;  // scores are in log2 before masks

  const PrefillProblem& p;
  Items<C> items;
  typename L::KeyPipe keys;
  typename L::ValuePipe values;
  typename L::QueryPipe queries;
  const int warpgroup, lane, row;  // of a tile, this thread's first of two
  const float factor;
  float scores[kHalf];
  float sums[kSums];
  u32 weights[kSteps][4];
  bool some;  // rows
  // Of this thread's rows:
  float most[2], total[2], slope[2];
  int position[2], first[2], last[2];  // of keys that are seen

  __device__ __forceinline__ Attender(const PrefillProblem& p, u32 smem, int warpgroup)
      : p(p),
        items(smem),
        keys(smem),
        values(smem),
        queries(smem),
        warpgroup(warpgroup),
        lane(threadIdx.x % 32),
        row(threadIdx.x / 32 * 16 + lane / 4),
        factor(kMoved ? 1.0f : p.scale) {}

  // --- rows ---

  __device__ __forceinline__ static int head_of(const Item& item, int packed) {
    return item.head * C::GROUP + packed % C::GROUP;
  }

  __device__ __forceinline__ void begin(const Item& item) {
    some = item.rows > 0;
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
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
  }

  // --- products ---

  __device__ __forceinline__ void issue_scores() {
    const auto a = ptx::k_major_descriptor(keys.smem + warpgroup * 64 * kSlabBytes);
    const auto b = ptx::k_major_descriptor(keys.smem + L::kKeys + keys.stage * L::kKeyBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::DEPTH / 16; ++step) {
      const int slab = step / 4, within = step % 4 * 32;
      C::Scores::issue(scores, a.plus(slab * kTileRows * kSlabBytes + within),
                       b.plus(slab * C::KEYS * kSlabBytes + within), step > 0);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_values() {
    const auto b = ptx::mn_major_descriptor(values.smem + L::kValues + values.stage * L::kValueBytes,
                                            C::KEYS * kSlabBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      C::Values::issue(sums, weights[step], b.plus(step * 16 * kSlabBytes), true);
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
    const int at = tile * C::KEYS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      float x = scores[i] * p.scale;
      if constexpr (C::SOFTCAP) x = p.cap - 2.0f * p.cap * ptx::rcp_approx(1.0f + ptx::ex2_approx(x));
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

  // Returns, of each row, what sums so far are multiplied by.
  __device__ __forceinline__ float2 powers() {
    const float2 high = largest();
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float now = half == 0 ? high.x : high.y;
      const float offset = now == no_score() ? 0.0f : now * factor;
      shrink[half] = ptx::ex2_approx(most[half] * factor - offset);
      most[half] = now;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < kHalf; i += 4)
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = ptx::ex2_approx(scores[j] * factor - offset);
          sum += scores[j];
        }
      total[half] = total[half] * shrink[half] + sum;
    }
    return {shrink[0], shrink[1]};
  }

  __device__ __forceinline__ static u32 pack(float low, float high) {
    return C::HALF ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }

  // An accumulator's columns are an operand's as they lie, 16 at a time.
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kHalf; i += 2) weights[i / 8][i % 8 / 2] = pack(scores[i], scores[i + 1]);
  }

  // Scores of a tile that have arrived. `some` is always so: without a branch ptxas puts the wait for values
  // in front of all powers.
  template <bool EDGE>
  __device__ __forceinline__ float2 weigh(int tile, u32 missing) {
    if constexpr (kMoved) move_scores(tile);
    if constexpr (EDGE) mask_edge(tile);
    if (missing != 0) mask_missing(missing);
    float2 shrink = {1.0f, 1.0f};
    if (some) shrink = powers();
    return shrink;
  }

  // --- tiles ---

  // Boxes of the tile of keys that are not in the pool. The shuffle tells the compiler that all lanes have
  // the same, and proves the load done.
  __device__ __forceinline__ u32 missing() const {
    const float4 record = ptx::load_shared_4(keys.smem + L::KeyPipe::kRecords + keys.stage * 16);
    return __shfl_sync(0xFFFFFFFF, __float_as_uint(record.x), 0);
  }

  // Values behind the sequence's last key that came with its box.
  __device__ __forceinline__ void clear_values(const Item& item) {
    constexpr int kBox = kBoxKeys<C>;
    const int begin = item.keys - (item.end - 1) * C::KEYS;
    const int rows = min(C::KEYS, (begin + kBox - 1) / kBox * kBox) - begin;
    if (rows <= 0) return;
    values.wait_full();
    const u32 at = values.smem + L::kValues + values.stage * L::kValueBytes + begin * kSlabBytes;
    for (int i = threadIdx.x; i < rows * L::kValueSlabs * 8; i += 256)
      ptx::store_shared_4(at + i / (rows * 8) * C::KEYS * kSlabBytes + i % (rows * 8) * 16, 0, 0, 0, 0);
    ptx::fence_proxy_async();
    ptx::named_barrier<kClearBarrier, 256>();
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
    clear_values(item);
  }

  template <bool EDGE>
  __device__ __forceinline__ void step(int tile) {
    keys.wait_full();
    await_turn();
    ptx::pin(scores);
    ptx::pin(sums);
    ptx::pin(weights);
    issue_scores();
    values.wait_full();
    issue_values();
    give_turn(1 - warpgroup);
    const u32 gone = missing();
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    release(keys);
    const float2 shrink = weigh<EDGE>(tile, gone);
    ptx::pin(scores);
    ptx::wgmma_wait<0>();
    ptx::pin(sums);
    ptx::pin(weights);
    release(values);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] *= i / 2 % 2 ? shrink.y : shrink.x;
    pack_weights();
  }

  __device__ __forceinline__ void end_tiles() {
    values.wait_full();
    ptx::pin(sums);
    ptx::pin(weights);
    issue_values();
    ptx::wgmma_wait<0>();
    ptx::pin(sums);
    release(values);
  }

  // From the last tile down. Tiles between `low` and `high` are seen by all rows of the tile.
  __device__ __forceinline__ void attend(const Item& item) {
    const int top = item.position + item.row / C::GROUP;  // positions of the first and the last row
    const int bottom = item.position + (min(item.row + kTileRows, item.rows) - 1) / C::GROUP;
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
      const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
      const int packed = item.row + row + half * 8;
      const bool exists = packed < item.rows;
      const i64 at =
          static_cast<i64>(item.token + packed / C::GROUP) * (C::KV_HEADS * C::GROUP) + head_of(item, packed);
      if (exists && lane % 4 == 0)
        p.lse[at] = all != 0.0f ? (most[half] * factor + log2f(all)) * kLn2
                    : C::SINKS  ? p.sinks[head_of(item, packed)]
                                : no_score();
      u16* const to = static_cast<u16*>(p.out) + at * C::V_DEPTH;
#pragma unroll
      for (int block = 0; block < kBlocks; block += 4) {
        u32 w[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && block + i < kBlocks; ++i) {
          const int j = (block + i) * 4 + 2 * half;
          w[i] = pack(sums[j] * inverse, sums[j + 1] * inverse);
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
__device__ __forceinline__ void prefill(const PrefillProblem& p) {
  extern __shared__ __align__(1024) char shared[];
  using L = PrefillLayout<C>;
  const u32 smem = smem_address(shared);
  int* const totals = reinterpret_cast<int*>(shared + L::kCounts);
  if (threadIdx.x == 0) {
    typename L::KeyPipe(smem).init(kConsumerWarps);
    typename L::ValuePipe(smem).init(kConsumerWarps);
    typename L::QueryPipe(smem).init(kConsumerWarps, kLoaderThreads);
    typename L::ItemPipe(smem).init(kConsumerWarps + 3);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_previous_kernel();
  count_items<C>(p, totals);
  __syncthreads();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 2) {
    ptx::lower_registers<kFew<C>>();
    if (warp_index() % 4 == 0) {
      PrefillProducer<C>(p, smem, totals).run();
    } else {
      const Loader<C> loader(p, smem);
      if constexpr (C::FILL) loader.clear();
      Loader<C>(loader).run();
    }
  } else {
    ptx::raise_registers<kMany<C>>();
    Attender<C>(p, smem, warpgroup).run();
  }
}

}  // namespace jdg
