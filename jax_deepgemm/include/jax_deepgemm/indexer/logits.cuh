// Scores of keys for tokens: logits[i, j] = scale[j] sum_h weights[i, h] max(queries[i, h] . keys[j], 0) for
// the keys of a token's window, minus infinity elsewhere in its row.
//
// clang-format off
//   warpgroups 0, 1 (, 2)   consumers: 64 keys of a tile each, by one or two banks of tokens
//   the last warpgroup      warp 0: producer; the others: minus infinity where no tile is; with linear
//                           columns (linear.cuh) two of them write these
//
//   keys:    slot  keys [64 of each consumer, d] | scales
//   tokens:  slot  queries [banks][tokens][heads][d] and linear columns | weights [..][heads] | Tokens | Run
//
//   consumer:  for each tile, for each bank:   issue the product
//                                              finish what was summed up before: exchange, store
//                                              wait for the product (the last bank's: release the keys)
//                                              sum it up
//
//   shared memory:  keys[STAGES] | queries[QUERY_STAGES] | scales | weights | tokens | runs | two pipelines
//                   | barriers of linear columns | share
// clang-format on
//
// Each block of threads has a share of all tiles (work.cuh), so that blocks end together however long windows
// are.
//
// A warpgroup has one product at a time; while it sums up, the others' are made. Three of them, with fewer
// registers each, hide more than two: an instruction that reads an accumulator waits four cycles while other
// products are written, so that sums take longer than products.
//
// A thread has 2 keys by a quarter of the heads of each token. max(x, 0) is (x + |x|) / 2: one addition at
// full rate, exact, where max runs at half rate; with linear columns not even that. The factor joins the
// key's scale. Four neighbouring lanes then exchange what they summed, so that each has whole sums of one
// key, of every other token. TENSOR_SUMS: the tensor cores sum up max(x, 0), rounded to bfloat16.
//
// A tile that lies in the windows of all its tokens, all of which exist, is `whole`: stored without a look at
// windows.
#pragma once

#include <jax_deepgemm/indexer/expand.cuh>
#include <jax_deepgemm/indexer/linear.cuh>
#include <jax_deepgemm/indexer/work.cuh>
#include <jax_deepgemm/ptx/mma.cuh>
#include <jax_deepgemm/ptx/tma.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg {

// --- producer ---

// The part of every token's window that all tokens of a block have, where all of them exist.
template <class C>
__device__ __forceinline__ Span common_keys(const Token& t) {
  const bool mine = threadIdx.x % 32 < kBlockTokens<C>;  // a token that does not exist begins with kNever
  const int begin = __reduce_max_sync(0xFFFFFFFF, mine ? t.start : 0);
  return {begin, __reduce_min_sync(0xFFFFFFFF, mine ? t.end : kNever)};
}

template <class C>
__device__ __forceinline__ void load_tokens(const Problem<C>& p, const Queries<C>& queries, int first) {
  using L = LogitsLayout<C>;
  constexpr int kLinearBytes = C::BANKS * C::LINEAR * kSlabBytes;  // by other warps
  queries.expect(L::kQueriesBytes - kLinearBytes + L::kWeightsBytes);
#pragma unroll
  for (int slab = 0; slab < C::SLABS; ++slab)
#pragma unroll
    for (int bank = 0; bank < C::BANKS; ++bank)
      ptx::tma_load(queries.queries() + (slab * kBlockCols<C> + bank * kBankCols<C>)*kSlabBytes, *p.queries,
                    queries.full(), slab * kSlabElements<C>, 0, first + bank * C::TOKENS);
  ptx::tma_load(queries.weights(), *p.weights, queries.full(), 0, first);
}

template <class C>
__device__ __forceinline__ void load_keys(const Problem<C>& p, const Loaded<C>& keys, int first) {
  using L = LogitsLayout<C>;
  keys.expect(Loaded<C>::kBytes + L::kScalesBytes);
#pragma unroll
  for (int slab = 0; slab < C::SLABS; ++slab)
    ptx::tma_load(keys.keys() + slab * kTileKeys<C> * kSlabBytes, *p.keys, keys.full(),
                  slab * kSlabElements<C>, first);
  if constexpr (C::SCALED) ptx::tma_load(keys.scales(), *p.scales, keys.full(), first);
}

// The pages of a tile, by a warp, of which every lane has the number of a page from `known` on. Outside of
// the cache there are zeros.
template <class C>
__device__ __forceinline__ void load_pages(const Problem<C>& p, const Loaded<C>& keys, int page, int known,
                                           bool elected) {
  using L = LogitsLayout<C>;
  if (elected) keys.expect(Loaded<C>::kBytes + L::kScalesBytes);
#pragma unroll
  for (int i = 0; i < kTilePages<C>; ++i) {
    const int at = __shfl_sync(0xFFFFFFFF, page, known + i);
    if (elected) {
      ptx::tma_load_once(keys.keys() + i * C::PAGE * Loaded<C>::kRow, *p.keys, keys.full(), 0, 0, at);
      ptx::tma_load(keys.scales() + i * L::kPagePitch, *p.scales, keys.full(), 0, at);
    }
  }
}

// What a share has of a block of tokens. Each lane knows a token of it.
struct Work {
  int block;
  Span tiles;  // none: nothing is left
  Token token;
};

// A warp. One lane of it loads; all of them look at windows. Tokens come early: as soon as all slots of keys
// hold tiles of the block before, so that consumers have left the slot of tokens that is filled next.
template <class C>
struct Producer {
  static constexpr int kKnown = 32 / kTilePages<C>;  // tiles
  static constexpr bool kEarly = C::PAGE == 0;       // for pages there are not registers enough

  const Problem<C>& p;
  Loaded<C> keys;
  Queries<C> queries;
  i64 left;
  int block, skip;
  const int lane;
  const bool elected;

  __device__ __forceinline__ Producer(const Problem<C>& p, const Share& share, u32 smem)
      : p(p),
        keys(smem),
        queries(smem),
        left(share.tiles),
        block(share.block),
        skip(share.tile),
        lane(threadIdx.x % 32),
        elected(ptx::elect()) {}

  __device__ __forceinline__ Work next() {
    Work work = {0, {0, 0}, {0, kNever, 0, 0, 0}};
#pragma unroll 1
    while (left > 0 && work.tiles.size() == 0) {
      work.block = block;
      work.token = token_of_lane(p, block);
      Span tiles = tiles_of_warp<C>(work.token);
      tiles.begin += skip;
      if (tiles.size() > left) tiles.end = tiles.begin + static_cast<int>(left);
      work.tiles = tiles;
      left -= tiles.size();
      ++block, skip = 0;
    }
    return work;
  }

  __device__ __forceinline__ void publish(const Work& work) {
    const Token& token = work.token;
    const Span common = common_keys<C>(token), tiles = work.tiles;
    queries.wait_empty();
    if (lane < kBlockTokens<C>) {
      const u32 at = queries.token(lane);
      const u32 low = static_cast<u32>(token.row), high = static_cast<u32>(token.row >> 32);
      ptx::store_shared_4(at, token.start, token.end, token.first, token.last);
      ptx::store_shared_2(at + kTokenRow, __uint_as_float(low), __uint_as_float(high));
    }
    if (elected) {
      ptx::store_shared_4(queries.run(), tiles.begin * kTileKeys<C>, tiles.size(), common.begin, common.end);
      load_tokens(p, queries, token_index(p, work.block, 0));
    } else {
      queries.fill_with_nothing();
    }
    __syncwarp();
    queries.advance();
  }

  __device__ __forceinline__ void load(const Work& work, Span tiles) {
    if constexpr (C::PAGE > 0) {
      load_paged(request_of_block(p, work.block), tiles, __reduce_max_sync(0xFFFFFFFF, work.token.end));
    } else if (elected) {
#pragma unroll 1
      for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        keys.wait_empty();
        load_keys(p, keys, tile * kTileKeys<C>);
        keys.advance();
      }
    }
    __syncwarp();
  }

  // Tiles of pages, before a key that no window reaches. Numbers of 32 pages are read at once.
  __device__ __forceinline__ void load_paged(int request, Span tiles, int end) {
    const int* const table = p.tables + static_cast<i64>(request) * p.table_width;
    int page = -1;
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      const int known = (tile - tiles.begin) % kKnown;
      if (known == 0) {
        const int at = tile * kTilePages<C> + lane;
        page = at < p.table_width && at * C::PAGE < end ? table[at] : -1;
      }
      if (elected) keys.wait_empty();
      load_pages(p, keys, page, known * kTilePages<C>, elected);
      keys.advance();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    Work now = next();
    if (now.tiles.size() > 0) publish(now);
#pragma unroll 1
    while (now.tiles.size() > 0) {
      const int middle = kEarly ? min(now.tiles.begin + C::STAGES, now.tiles.end) : now.tiles.end;
      load(now, {now.tiles.begin, middle});
      const Work then = next();
      if (then.tiles.size() > 0) publish(then);
      if (kEarly) load(now, {middle, now.tiles.end});
      now = then;
    }
    queries.wait_empty();
    if (elected) ptx::store_shared_4(queries.run(), 0, 0, 0, 0);
    queries.fill_with_nothing();
  }
};

// --- consumers ---

template <class C>
struct Scorer {
  using Out = typename C::Out;
  static constexpr int kCount = kBankCols<C> / 2;     // of a thread's accumulator
  static constexpr int kPerToken = C::HEADS / 4;      // heads of a token that a thread sums up
  static constexpr int kSteps = C::HEADS / 16;        // products of a warp, of a token
  static constexpr int kPairs = (C::TOKENS + 1) / 2;  // logits of a thread, of a bank
  static constexpr bool kKeepRows =                   // in registers
      kPairs * C::BANKS <= 2 && C::CONSUMERS == 2;
  static constexpr float kHalf = C::TENSOR_SUMS ? 1.0f : 0.5f;  // what sums are multiplied by
  using Product = float[kCount];
  using Sums = float[2 * C::TOKENS];

  struct Tile {
    int key;
    bool whole;
    float scale;
  };

  Keys<C> keys;
  Queries<C> queries;
  const int warpgroup, lane;
  const int mine;      // this thread's key of a tile, once sums are exchanged
  const u32 scale_at;  // where its scale is
  u32 tokens;          // what is known of those whose logits are being summed up
  float weights[C::BANKS][C::TENSOR_SUMS ? 1 : C::TOKENS * kPerToken];
  float steps[C::BANKS][C::TOKENS];  // of this thread's digits of linear columns
  u32 factors[C::BANKS][C::TENSOR_SUMS ? C::TOKENS * kSteps : 1][2];
  u64 rows[C::BANKS][kKeepRows ? kPairs : 1];

  __device__ __forceinline__ Scorer(u32 smem, int warpgroup)
      : keys(smem),
        queries(smem),
        warpgroup(warpgroup),
        lane(threadIdx.x % 32),
        mine(threadIdx.x / 32 * 16 + lane / 4 + (lane & 2) * 4),
        scale_at(scale_offset<C>(mine)) {}

  // --- a block of tokens ---

  // What is known of the token that this thread's logit is of. The last of an odd number is alone.
  __device__ __forceinline__ u32 token_of(int bank, int pair) const {
    const int token = min(2 * pair + (lane & 1), C::TOKENS - 1);
    return tokens + (bank * C::TOKENS + token) * kTokenBytes;
  }
  __device__ __forceinline__ u64 row_of(int bank, int pair) const {
    const float2 row = ptx::load_shared_2(token_of(bank, pair) + kTokenRow);
    return static_cast<u64>(__float_as_uint(row.y)) << 32 | __float_as_uint(row.x);
  }

  __device__ __forceinline__ void begin_tokens() {
    tokens = queries.token(0);
#pragma unroll
    for (int bank = 0; bank < C::BANKS; ++bank) {
      if constexpr (C::TENSOR_SUMS)
        load_factors(bank);
      else
        load_weights(bank);
      if constexpr (C::LINEAR > 0) load_steps(bank);
#pragma unroll
      for (int pair = 0; kKeepRows && pair < kPairs; ++pair) rows[bank][pair] = row_of(bank, pair);
    }
  }

  // Two neighbouring heads' weights, of those from `first` on.
  __device__ __forceinline__ float2 weights_from(int bank, int first) const {
    return ptx::load_shared_2(queries.weights() + (bank * kBankHeads<C> + first + lane % 4 * 2) * 4);
  }

  __device__ __forceinline__ void load_weights(int bank) {
#pragma unroll
    for (int i = 0; i < C::TOKENS * kPerToken; i += 2) {
      const float2 two = weights_from(bank, i * 4);
      weights[bank][i] = two.x, weights[bank][i + 1] = two.y;
    }
  }

  __device__ __forceinline__ void load_steps(int bank) {
#pragma unroll
    for (int token = 0; token < C::TOKENS; ++token)
      steps[bank][token] = digit_value(lane % 4) *
                           ptx::load_shared(tokens + (bank * C::TOKENS + token) * kTokenBytes + kTokenStep);
  }

  // Even columns are weights in bfloat16, odd ones what that leaves of them.
  __device__ __forceinline__ void load_factors(int bank) {
    const bool rest = lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < C::TOKENS * kSteps; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = weights_from(bank, i * 16 + half * 8);
        const u32 most = ptx::pack_bf16(two.x, two.y);
        const float low = __uint_as_float(most << 16), high = __uint_as_float(most & 0xFFFF0000);
        factors[bank][i][half] = rest ? ptx::pack_bf16(two.x - low, two.y - high) : most;
      }
  }

  // --- a product ---

  __device__ __forceinline__ void issue(Product& product, int bank) const {
    const auto a = ptx::k_major_descriptor(keys.keys() + warpgroup * 64 * kSlabBytes);
    const auto b = ptx::k_major_descriptor(queries.queries() + bank * kBankCols<C> * kSlabBytes);
    ptx::pin(product);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::STEPS; ++step) {
      const int slab = step / 4, within = step % 4 * 32;
      C::Mma::issue(product, a.plus(slab * kTileKeys<C> * kSlabBytes + within),
                    b.plus(slab * kBlockCols<C> * kSlabBytes + within), step > 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ static void await(Product& product) {
    ptx::wgmma_wait<0>();
    ptx::pin(product);
  }

  // Twice the sum over this thread's heads, of a token and one of two keys.
  __device__ __forceinline__ float sum(const Product& product, int bank, int token, int key) const {
    float total = linear_half(product, bank, token, key);
#pragma unroll
    for (int i = 0; i < kPerToken; ++i) {
      const float x = product[token * kPerToken * 2 + i / 2 * 4 + 2 * key + i % 2];
      const float w = weights[bank][token * kPerToken + i];
      const float twice = C::LINEAR > 0 ? fabsf(x) : x + fabsf(x);
      total = C::LINEAR == 0 && i == 0 ? w * twice : total + w * twice;
    }
    return total;
  }

  // This thread's digit of it.
  __device__ __forceinline__ float linear_half(const Product& product, int bank, int token, int key) const {
    if constexpr (C::LINEAR == 0) return 0.0f;
    return steps[bank][token] * product[kBankHeads<C> / 2 + token / 2 * 4 + 2 * key + token % 2];
  }

  // What is left of a bank's product: sums of all its tokens, for both keys.
  __device__ __forceinline__ void sum_bank(const Product& product, int bank, Sums& sums) const {
#pragma unroll
    for (int token = 0; token < C::TOKENS; ++token) {
      if constexpr (C::TENSOR_SUMS) {
        sum_by_products(product, bank, token, sums);
      } else {
        sums[2 * token] = sum(product, bank, token, 0);
        sums[2 * token + 1] = sum(product, bank, token, 1);
      }
    }
  }

  // The accumulator's columns are a warp's operand as they lie, 16 heads at a time. All lanes of a quad get
  // whole sums. Tokens have products of their own, so that NaN stays with its token; two of them, as a
  // product waits for the one that it adds to.
  __device__ __forceinline__ void sum_by_products(const Product& product, int bank, int token,
                                                  Sums& sums) const {
    float total[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float* const x = product + token * kPerToken * 2 + step * 8;
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = ptx::pack_relu_bf16(x[2 * i], x[2 * i + 1]);
      ptx::mma_bf16(total[step % 2], a, factors[bank][token * kSteps + step]);
    }
    sums[2 * token] = (total[0][0] + total[0][1]) + (total[1][0] + total[1][1]);
    sums[2 * token + 1] = (total[0][2] + total[0][3]) + (total[1][2] + total[1][3]);
  }

  // Sums become logits of this thread's key: of one of every two tokens.
  __device__ __forceinline__ void finish(const Sums& sums, int bank, const Tile& tile) const {
    const bool lower = lane & 2, odd = lane & 1;
    float whole[C::TOKENS];
#pragma unroll
    for (int token = 0; token < C::TOKENS; ++token)
      whole[token] = with_other<2>(sums[2 * token], sums[2 * token + 1], lower);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const bool alone = 2 * pair + 1 == C::TOKENS;
      const float total = with_other<1>(whole[2 * pair], whole[alone ? 2 * pair : 2 * pair + 1], odd);
      if (!alone || !odd) store(bank, pair, tile, total * tile.scale);
    }
  }

  // The first of two numbers, or the second, together with what another lane has of it.
  template <int STEP>
  __device__ __forceinline__ static float with_other(float a, float b, bool second) {
    const float mine = second ? b : a;
    if constexpr (C::TENSOR_SUMS)
      return mine;
    else
      return mine + __shfl_xor_sync(0xFFFFFFFF, second ? a : b, STEP);
  }

  __device__ __forceinline__ void store(int bank, int pair, const Tile& tile, float logit) const {
    const i64 key = static_cast<i64>(tile.key) + mine;
    Out* const to = reinterpret_cast<Out*>(kKeepRows ? rows[bank][pair] : row_of(bank, pair)) + key;
    if (tile.whole) return ptx::store_global(to, logit);
    const float4 token = ptx::load_shared_4(token_of(bank, pair));
    const int start = __float_as_int(token.x), end = __float_as_int(token.y);
    const int first = __float_as_int(token.z), last = __float_as_int(token.w);
    if (key >= first && key < last)
      ptx::store_global(to, key >= start && key < end ? logit : minus_infinity());
  }

  // --- all tiles ---

  // The next block of tokens. The shuffle tells the compiler that all lanes have the same.
  __device__ __forceinline__ Run receive() const {
    queries.wait_full();
    const float4 run = ptx::load_shared_4(queries.run());
    const auto shared = [](float v) { return __float_as_int(__shfl_sync(0xFFFFFFFF, v, 0)); };
    const Run at = {shared(run.x), shared(run.y), shared(run.z), shared(run.w)};
    if (at.tiles > 0) queries.wait_ready();
    return at;
  }

  __device__ __forceinline__ Tile tile_at(const Run& at) const {
    const float scale = C::SCALED ? ptx::load_shared(keys.scales() + scale_at) : 1.0f;
    return {at.key, at.begin <= at.key && at.key + kTileKeys<C> <= at.end, kHalf * scale};
  }

  // All tiles of a block of tokens. While a product is made, what was summed up before is finished (before
  // the first one that is a tile whose keys are in no row), and the next tile is awaited.
  __device__ __forceinline__ void score(Run at) {
    Product product;
    Sums sums = {};
    Tile before = {kNever, false, 0.0f};
    keys.wait_full();
    Tile tile = tile_at(at);
#pragma unroll 1
    for (; at.tiles > 0; --at.tiles) {
      Tile next = tile;
      u32 read = 0;
#pragma unroll
      for (int bank = 0; bank < C::BANKS; ++bank) {
        issue(product, bank);
        // Always so. Without a branch ptxas puts the shuffles between instructions of the product.
        if (at.begin >= 0) finish(sums, bank > 0 ? bank - 1 : C::BANKS - 1, bank > 0 ? tile : before);
        if (bank == C::BANKS - 1) {
          read = keys.empty();
          keys.advance();
          at.key += kTileKeys<C>;
          if (at.tiles > 1) {
            keys.wait_full();
            next = tile_at(at);
          }
        }
        await(product);
        if (bank == C::BANKS - 1 && (kPacked<C> || lane == 0)) Keys<C>::release(read);
        sum_bank(product, bank, sums);
      }
      before = tile, tile = next;
    }
    finish(sums, C::BANKS - 1, before);
  }

  __device__ __forceinline__ void run() {
    for (Run at = receive(); at.tiles > 0; at = receive()) {
      begin_tokens();
      score(at);
      Queries<C>::release(queries.empty());
      queries.advance();
    }
  }
};

// --- all of it ---

template <class C>
__device__ __forceinline__ void init_pipelines(u32 smem) {
  if (threadIdx.x == 0) {
    if constexpr (kPacked<C>) {
      PackedKeys<C>(smem).init(4);
      Keys<C>(smem).init(128 * C::CONSUMERS, 128);
    } else {
      Keys<C>(smem).init(4 * C::CONSUMERS);
    }
    Queries<C>(smem).init();
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

template <LogitsConfig C>
__device__ __forceinline__ void logits(const Problem<C>& p) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = warpgroup_index(), warp = warp_index() % 4;

  if constexpr (kPacked<C>) write_table<C>(smem);
  init_pipelines<C>(smem);
  ptx::wait_for_previous_kernel();
  const Share share = share_of_block(p, shared);
  if (warpgroup == C::CONSUMERS) {
    ptx::lower_registers<C::CONSUMERS == 3 ? 32 : 40>();
    constexpr int kFillWarps = C::LINEAR > 0 ? 3 - kLinearWarps : 3;
    if (warp == 0)
      Producer<C>(p, share, smem).run();
    else if (warp > kFillWarps)
      write_linear_columns<C>(smem, warp - 1 - kFillWarps);
    else
      fill_rows(p, warp - 1, kFillWarps);
  } else if (kPacked<C> && warpgroup > C::CONSUMERS) {
    ptx::lower_registers<72>();
    if constexpr (kPacked<C>) Expander<C>(smem).run(share);
  } else {
    ptx::raise_registers<kPacked<C> ? 200 : C::CONSUMERS == 3 ? 160 : 232>();
    Scorer<C>(smem, warpgroup).run();
  }
}

}  // namespace jdg
