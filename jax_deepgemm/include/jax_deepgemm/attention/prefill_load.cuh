// What the other warps of the prefill kernel do: one finds items and loads keys and values, three load
// queries.
//
//   a cache in e4m3:   packed slots of keys or values   producer -> a warpgroup that fills the consumers'
//   slots
#pragma once

#include <jax_deepgemm/attention/prefill_work.cuh>
#include <jax_deepgemm/ptx/copy.cuh>
#include <jax_deepgemm/ptx/halves.cuh>
#include <jax_deepgemm/ptx/tma.cuh>

namespace jdg {

__device__ __forceinline__ float no_score() { return __int_as_float(0xFF800000); }

// Bytes `first` and `first` + 1 of a word of e4m3 as bfloat16 or float16, exactly. Their bits in the places
// of the wider type are 2^-120 or 2^-8 times the numbers. Their NaN becomes 480.
template <bool HALF>
__device__ __forceinline__ u32 widen_e4m3(u32 four, int first) {
  const u32 spread = ptx::permute(four, 0, first == 0 ? 0x1404 : 0x3424);
  const u32 sign = spread & 0x80008000u;
  if constexpr (HALF) return ptx::multiply_halves(sign | (spread >> 1 & 0x3F803F80u), 0x5C005C00u);
  return ptx::multiply_pairs(sign | (spread >> 4 & 0x07F007F0u), 0x7B807B80u);
}

// Where slots are.
template <class C>
__device__ __forceinline__ u32 key_slot(const typename PrefillLayout<C>::KeyPipe& at) {
  return at.smem + PrefillLayout<C>::kKeys + at.stage * PrefillLayout<C>::Keys::kBytes;
}
template <class C>
__device__ __forceinline__ u32 value_slot(const typename PrefillLayout<C>::ValuePipe& at) {
  return at.smem + PrefillLayout<C>::kValues + at.stage * PrefillLayout<C>::Values::kBytes;
}
template <class C>
__device__ __forceinline__ u32 packed_slot(const typename PrefillLayout<C>::PackedPipe& at) {
  return at.smem + PrefillLayout<C>::kPacked + at.stage * PrefillLayout<C>::kPackedBytes;
}

// Where the scales of a layer and kv head are.
template <class C>
__device__ __forceinline__ int scale_of(const Call<C>& p, int head) {
  return clamp_to(*p.layer, 0, p.layers - 1) * C::KV_HEADS + head;
}

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

  const Call<C>& p;
  Walk<C> walk;
  Items<C> items;
  typename L::KeyPipe keys;
  typename L::ValuePipe values;
  typename L::PackedPipe packed;
  const int lane;
  int first_page, pages;  // of the layer; of one that there is not, no pages
  const bool elected;

  __device__ __forceinline__ PrefillProducer(const Call<C>& p, u32 smem, const int* totals)
      : p(p),
        walk(p, totals),
        items(smem),
        keys(smem),
        values(smem),
        packed(smem),
        lane(threadIdx.x % 32),
        elected(ptx::elect()) {
    const int layer = *p.layer;
    const bool exists = layer >= 0 && layer < p.layers;
    first_page = exists ? layer * p.pages : 0;
    pages = exists ? p.pages : 0;
  }

  // Whether this lane has a page of a tile. Boxes that a window has left may be in pages given away, with
  // NaN.
  __device__ __forceinline__ bool has_page(const Item& item, int tile) const {
    const int key = tile * C::KEYS + lane * kBox;
    const int left = C::WINDOW ? item.position + item.row / C::GROUP - p.window + 1 : 0;
    return lane < kBoxes<C> && tile >= item.begin && key < item.keys && key + kBox > left;
  }
  // What the table says. Nothing looks at it before the next tile, so that nothing waits for it.
  __device__ __forceinline__ int entry_of(const int* table, const Item& item, int tile) const {
    return has_page(item, tile) ? table[(tile * C::KEYS + lane * kBox) / C::PAGE] : 0;
  }
  // The page, counted over all layers; -1: none, -2: not in the pool.
  __device__ __forceinline__ int page_of(const Item& item, int tile, int entry) const {
    if (!has_page(item, tile)) return -1;
    return entry >= 0 && entry < pages ? first_page + entry : -2;
  }

  // A tile, box by box. ROWS: as they lie in the cache. Otherwise as Tile says.
  template <int DEPTH, bool ROWS = false>
  __device__ __forceinline__ void load(const TensorMap& map, u32 slot, u32 bar, int tile, int head,
                                       int page) {
    using T = Tile<C::KEYS, DEPTH>;
    constexpr int kAtOnce = kLarge<C> ? 1 : kBoxes<C>;  // many take registers
#pragma unroll kAtOnce
    for (int i = 0; i < kBoxes<C>; ++i) {
      const int at = __shfl_sync(0xFFFFFFFF, page, i), row = (tile * C::KEYS + i * kBox) % C::PAGE;
      if (elected) {
        if constexpr (ROWS) {
          ptx::tma_load(slot + i * kBox * DEPTH, map, bar, 0, row, head, at < 0 ? -1 : at);
        } else if constexpr (T::kJoined) {
          ptx::tma_load(slot + T::row(i * kBox), map, bar, 0, 0, 0, row / kGroupRows,
                        at < 0 ? -1 : at * C::KV_HEADS + head);
        } else {
#pragma unroll
          for (int slab = 0; slab < T::kSlabs; ++slab)
            ptx::tma_load(slot + T::row(i * kBox) + slab * T::kSlab, map, bar, slab * kSlabNumbers, row, head,
                          at < 0 ? -1 : at);
        }
      }
    }
  }

  template <int DEPTH>
  __device__ __forceinline__ void load_packed(const TensorMap& map, int tile, int head, int page,
                                              u32 missing = 0) {
    packed.wait_empty();
    if (elected) {
      packed.publish(static_cast<int>(missing), 0, 0);
      packed.expect(C::KEYS * DEPTH);
    }
    load<DEPTH, true>(map, packed_slot<C>(packed), packed.full(), tile, head, page);
    packed.advance();
  }

  __device__ __forceinline__ void load_keys(int tile, int head, int page) {
    const u32 missing = __ballot_sync(0xFFFFFFFF, page == -2);
    if constexpr (kPackedCache<C>) {
      load_packed<C::DEPTH>(*p.key_map, tile, head, page, missing);
    } else {
      keys.wait_empty();
      if (elected) {
        keys.publish(static_cast<int>(missing), 0, 0);
        keys.expect(L::Keys::kBytes);
      }
      load<C::DEPTH>(*p.key_map, key_slot<C>(keys), keys.full(), tile, head, page);
      keys.advance();
    }
  }
  __device__ __forceinline__ void load_values(int tile, int head, int page) {
    if constexpr (kPackedCache<C>) {
      load_packed<C::V_DEPTH>(*p.value_map, tile, head, page);
    } else {
      values.wait_empty();
      if (elected) values.expect(L::Values::kBytes);
      load<C::V_DEPTH>(*p.value_map, value_slot<C>(values), values.full(), tile, head, page);
      values.advance();
    }
  }

  // Values come a tile behind keys, as they are used.
  __device__ __forceinline__ void load_item(const Item& item) {
    const int* const table = p.tables + static_cast<i64>(walk.sequence) * p.table_pages;
    int entry = entry_of(table, item, item.end - 1), before = -1;
#pragma unroll 1
    for (int tile = item.end - 1; tile >= item.begin; --tile) {
      const int page = page_of(item, tile, entry);
      entry = entry_of(table, item, tile - 1);
      load_keys(tile, item.head, page);
      if (tile + 1 < item.end) load_values(tile + 1, item.head, before);
      before = page;
    }
    load_values(item.begin, item.head, before);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      const Item item = walk.next();
      items.publish(item);
      if (item.head < 0) return;
      walk.take_ticket();
      if (item.begin < item.end) load_item(item);
    }
  }
};

// --- loaders of queries ---

// Three warps.
template <class C>
struct Loader {
  using L = PrefillLayout<C>;
  static constexpr int kChunks = C::DEPTH / 8;  // of 16 bytes, of a row

  const Call<C>& p;
  Items<C> items;
  typename L::QueryPipe queries;
  const int thread;

  __device__ __forceinline__ Loader(const Call<C>& p, u32 smem)
      : p(p), items(smem), queries(smem), thread(static_cast<int>(threadIdx.x) % 128 - 32) {}

  __device__ __forceinline__ void load(const Item& item) const {
    const char* const from = reinterpret_cast<const char*>(p.q);
#pragma unroll 2
    for (int i = thread; i < kTileRows<C> * kChunks; i += kLoaders) {
      const int row = i / kChunks, chunk = i % kChunks, packed = item.row + row;
      const bool exists = packed < item.rows;
      const int token = item.token + packed / C::GROUP, head = item.head * C::GROUP + packed % C::GROUP;
      const i64 at = static_cast<i64>(token) * (C::KV_HEADS * C::GROUP) + head;
      ptx::copy_async(queries.smem + L::Queries::chunk(row, chunk),
                      exists ? from + (at * C::DEPTH + chunk * 8) * 2 : from, exists ? 16 : 0);
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
};

// --- a cache in e4m3 ---

// A warpgroup that makes what is multiplied of it, in the producer's order.
template <class C>
struct Widener {
  using L = PrefillLayout<C>;
  static constexpr bool kHalf = is_same<typename C::T, f16>;

  Items<C> items;
  typename L::KeyPipe keys;
  typename L::ValuePipe values;
  typename L::PackedPipe packed;
  const int thread;

  __device__ __forceinline__ explicit Widener(u32 smem)
      : items(smem), keys(smem), values(smem), packed(smem), thread(threadIdx.x % kWideners) {}

  // A tile of rows of DEPTH bytes to slabs of 64 numbers. Some are read at once, as no store lets a load
  // pass.
  template <int DEPTH>
  __device__ __forceinline__ void widen(u32 to) const {
    constexpr int kPieces = C::KEYS * DEPTH / 8, kAtOnce = 4;  // of eight numbers
    const u32 from = packed_slot<C>(packed);
#pragma unroll 1
    for (int first = thread; first < kPieces; first += kAtOnce * kWideners) {
      float2 eight[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (kPieces % (kAtOnce * kWideners) == 0 || first + j * kWideners < kPieces)
          eight[j] = ptx::load_shared_2(from + (first + j * kWideners) * 8);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kWideners, row = i / (DEPTH / 8), chunk = i % (DEPTH / 8);
        const u32 low = __float_as_uint(eight[j].x), high = __float_as_uint(eight[j].y);
        if (kPieces % (kAtOnce * kWideners) == 0 || i < kPieces)
          ptx::store_shared_4(to + Tile<C::KEYS, DEPTH>::chunk(row, chunk), widen_e4m3<kHalf>(low, 0),
                              widen_e4m3<kHalf>(low, 2), widen_e4m3<kHalf>(high, 0),
                              widen_e4m3<kHalf>(high, 2));
      }
    }
    ptx::fence_proxy_async();
  }

  template <class P>
  __device__ __forceinline__ void pass_on(P& filled) {
    filled.fill_with_nothing();
    filled.advance();
    __syncwarp();
    if (threadIdx.x % 32 == 0) packed.release(packed.empty());
    packed.advance();
  }
  __device__ __forceinline__ void widen_keys() {
    packed.wait_full();
    keys.wait_empty();
    if (thread == 0) {
      const float4 record = ptx::load_shared_4(packed.smem + L::PackedPipe::kRecords + packed.stage * 16);
      keys.publish(__float_as_int(record.x), 0, 0);
    }
    widen<C::DEPTH>(key_slot<C>(keys));
    pass_on(keys);
  }
  __device__ __forceinline__ void widen_values() {
    packed.wait_full();
    values.wait_empty();
    widen<C::V_DEPTH>(value_slot<C>(values));
    pass_on(values);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      const Item item = items.receive();
      if (item.head < 0) return;
      if (item.begin >= item.end) continue;
#pragma unroll 1
      for (int tile = item.end - 1; tile >= item.begin; --tile) {
        widen_keys();
        if (tile + 1 < item.end) widen_values();
      }
      widen_values();
    }
  }
};

}  // namespace jdg
