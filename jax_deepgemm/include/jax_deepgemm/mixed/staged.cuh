// D = A W^T for many tokens A of e4m3 and weights W of FP4, dense or in groups. A warpgroup expands the
// weights of a tile into shared memory, once for two that multiply them from there with up to 256 tokens.
//
// clang-format off
//   warpgroups 0, 1       consumers: parts of 64 tokens in turn, of those that a group still has
//   warpgroup 2           warp 0: tokens by TMA;   warp 1: slabs of W by bulk copies;   warp 2: scales by cp.async
//   warpgroup 3           the expander: slabs to rows of e4m3 as TMA would have left them
//
//   expander    for each block of k:   wait for its slot to be free
//                                      expand, give back the slabs, load those of the next block into registers
//                                      fence, hand over the slot
//   consumer    for each block of k:   for each of its parts:   issue the product
//                                                               scales of tokens times bases of slabs | while the
//                                                               behind the last one: wait full[kb + 1]|  tensor core
//                                                               wait for the product                  |  is busy
//                                                               behind the last one: release slot kb
//                                                               promote
//               store what the group has, through TMA (gemm/epilogue.cuh)
//
//   tokens[STAGES]          ROWS rows of 128 bytes, swizzled        filled by warp 0; as many parts as count
//   weights[STAGES]         COLS rows of 128 bytes, swizzled        filled by the expander
//   staging                 of D (gemm/epilogue.cuh)
//   slabs[SLAB_STAGES]      a slab for each 64 of COLS              filled by warp 1
//   scales[SCALE_STAGES]    quads of blocks of k, [4][ROWS]         filled by warp 2
//   bases[STAGES + 1]       a float for each 64 of COLS             filled by the expander
//   pipelines of slots, of slabs, of scales | table of groups
// clang-format on
//
// Every role walks over the same tiles by itself, as in mixed.cuh. Products are promoted in the order of k.
//
// Hazard: expanded weights are written by ordinary stores and read by wgmma: fence.proxy.async between.
// Hazard: a base may be under way when its warp releases the slot, so their ring has a slot more
// (gemm/ring.cuh). Scales are given back behind the sums that have met them.
#pragma once

#include <jax_deepgemm/mixed/fp4.cuh>
#include <jax_deepgemm/mixed/mixed.cuh>

namespace jdg {

constexpr int kStagedConsumers = 2, kStagedProducer = 2, kExpander = 3;  // warpgroups

template <class C>
struct StagedLayout {
  static constexpr int kHeights = C::COLS / 64, kBaseSlots = C::STAGES + 1;
  static constexpr u32 kTokenBytes = C::ROWS * 128, kWeightBytes = C::COLS * 128;
  static constexpr u32 kSlabsBytes = kHeights * kSlabBytes4;
  // Between the scales of a block of k and the next; eight tokens' quads are stored at once, on all banks.
  static constexpr u32 kScalePitch = (C::ROWS + 8) * 4, kQuadBytes = kQuad * kScalePitch, kBaseBytes = 16;
  static_assert(kHeights <= 4, "bases of a slot");

  static constexpr u32 kTokens = 0;
  static constexpr u32 kWeights = kTokens + C::STAGES * kTokenBytes;
  static constexpr u32 kStaging = kWeights + C::STAGES * kWeightBytes;
  static constexpr u32 kSlabs = kStaging + C::STAGING_BYTES;
  static constexpr u32 kScales = kSlabs + C::SLAB_STAGES * kSlabsBytes;
  static constexpr u32 kBases = kScales + C::SCALE_STAGES * kQuadBytes;
  static constexpr u32 kSlots = kBases + kBaseSlots * kBaseBytes;
  static constexpr u32 kSlabSlots = Pipeline<C::STAGES, kSlots>::kEnd;
  static constexpr u32 kScaleSlots = Pipeline<C::SLAB_STAGES, kSlabSlots>::kEnd;
  static constexpr u32 kTable = Pipeline<C::SCALE_STAGES, kScaleSlots>::kEnd;
  static constexpr u32 kBytes = kTable + C::TABLE_BYTES;
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");
};

// The slots, and the ring of bases, as seen from one side of them.
template <class C>
struct StagedRing : Pipeline<C::STAGES, StagedLayout<C>::kSlots> {
  using L = StagedLayout<C>;
  using Base = Pipeline<C::STAGES, L::kSlots>;
  using Base::smem, Base::stage;

  int base_slot = 0;

  __device__ __forceinline__ explicit StagedRing(u32 base) : Base(base) {}
  __device__ __forceinline__ u32 tokens() const { return smem + L::kTokens + stage * L::kTokenBytes; }
  __device__ __forceinline__ u32 weights() const { return smem + L::kWeights + stage * L::kWeightBytes; }
  __device__ __forceinline__ u32 bases() const { return smem + L::kBases + base_slot * L::kBaseBytes; }
  __device__ __forceinline__ void move_on() {
    Base::advance();
    if (++base_slot == L::kBaseSlots) base_slot = 0;
  }
};

// Quads of blocks of k of the tokens' scales.
template <class C>
struct ScaleRing : Pipeline<C::SCALE_STAGES, StagedLayout<C>::kScaleSlots> {
  using L = StagedLayout<C>;
  using Pipeline<C::SCALE_STAGES, L::kScaleSlots>::Pipeline;
  __device__ __forceinline__ u32 of(int block, int token) const {
    return this->smem + L::kScales + this->stage * L::kQuadBytes + block * L::kScalePitch + token * 4;
  }
};

template <class C>
struct SlabRing : Pipeline<C::SLAB_STAGES, StagedLayout<C>::kSlabSlots> {
  using L = StagedLayout<C>;
  using Pipeline<C::SLAB_STAGES, L::kSlabSlots>::Pipeline;
  __device__ __forceinline__ u32 slab(int height) const {
    return this->smem + L::kSlabs + this->stage * L::kSlabsBytes + height * kSlabBytes4;
  }
};

// --- warps of the producer ---

// How many parts of 64 of a tile's tokens count.
template <class C>
__device__ __forceinline__ int parts_of(const GroupTile& at) {
  return min(C::ROWS / 64, ceil_div(at.rows_end - at.tile.row, 64));
}

template <class C>
__device__ __forceinline__ void load_tokens(StagedRing<C>& ring, const MixedOperands<C>& in,
                                            const GroupTile& at) {
  constexpr u32 kPart = 64 * 128;
  const int matrix = MixedTiles<C>::matrix(at), parts = parts_of<C>(at);
#pragma unroll 1
  for (int kb = 0; kb < in.k_blocks; ++kb) {
    ring.wait_empty();
    ring.expect(parts * kPart);
#pragma unroll
    for (int i = 0; i < C::ROWS / 64; ++i)
      if (i < parts)
        ptx::tma_load(ring.tokens() + i * kPart, *in.tokens, ring.full(), kb * 128, at.tile.row + i * 64,
                      matrix);
    ring.move_on();
  }
}

// Eight tokens at a time, a lane each of whose four blocks of k.
template <class C>
__device__ __forceinline__ void load_quads(ScaleRing<C>& ring, const MixedOperands<C>& in,
                                           const GroupTile& at, const Extents& p) {
  const int lane = threadIdx.x % 32, token = lane / 4, block = lane % 4;
  const int tokens = parts_of<C>(at) * 64;
  const float* scales = in.scales + static_cast<i64>(MixedTiles<C>::matrix(at)) * p.m * in.k_blocks;
#pragma unroll 1
  for (int kb = 0; kb < in.k_blocks; kb += kQuad) {
    ring.wait_empty();
    const int from = min(kb + block, in.k_blocks - 1);
#pragma unroll 4
    for (int first = 0; first < tokens; first += 8) {
      const int row = min(at.tile.row + first + token, p.m - 1);
      ptx::copy_async_4(ring.of(block, first + token), scales + (static_cast<i64>(row) * in.k_blocks + from));
    }
    ptx::copy_async_arrive(ring.full());
    ring.advance();
  }
}

template <class C>
__device__ __forceinline__ void load_tile_slabs(SlabRing<C>& ring, const MixedOperands<C>& in,
                                                const GroupTile& at, const Extents& p) {
  constexpr int kHeights = StagedLayout<C>::kHeights;
  const int heights = p.n / 64;
  const i64 weight = C::DENSE ? 0 : at.tile.col_batch;
  const i64 across = static_cast<i64>(in.k_blocks) * kSlabBytes4;  // from one 64 rows of W to the next
  const u8* first = in.slabs + (weight * heights + at.tile.col / 64) * across;
  const int left = heights - at.tile.col / 64;
#pragma unroll 1
  for (int kb = 0; kb < in.k_blocks; ++kb) {
    ring.wait_empty();
    ring.expect(StagedLayout<C>::kSlabsBytes);
#pragma unroll
    for (int i = 0; i < kHeights; ++i)
      ptx::bulk_load(ring.slab(i), first + (i < left ? i : 0) * across, kSlabBytes4, ring.full());
    first += kSlabBytes4;
    ring.advance();
  }
}

// --- the expander: a whole warpgroup, each thread a row of W ---

template <class C>
struct Expander {
  static_assert(C::COLS == 128, "as many rows as threads");

  StagedRing<C> ring;
  SlabRing<C> slabs;
  u32 chunk[8];    // where the row's 16 bytes of each 16 of k are, within a slot
  uint4 words[4];  // of lane q of the row's quad, for each 32 of k
  u32 exponents;   // of the row, for each 32 of k
  float base;      // of the row's slab

  __device__ __forceinline__ explicit Expander(u32 smem) : ring(smem), slabs(smem) {
    const int row = threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk[i] = row * 128 + (i ^ row % 8) * 16;
  }

  __device__ __forceinline__ void load() {
    const int row = threadIdx.x % 64, warp = row / 16, half = row / 8 % 2, g = row % 8;
    const u32 slab = slabs.slab(threadIdx.x % 128 / 64), quad = slab + half * 2048 + (warp * 32 + g * 4) * 16;
#pragma unroll
    for (int q = 0; q < 4; ++q) words[q] = ptx::load_shared_16(quad + (q ^ g / 2) * 16);
    exponents = __float_as_uint(ptx::load_shared(slab + kSlabExponents + ((warp * 8 + g) * 2 + half) * 4));
    base = ptx::load_shared(slab + kSlabBase);
  }

  __device__ __forceinline__ static u32 element(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }

  __device__ __forceinline__ void expand() const {
    const u32 to = ring.weights();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Fp4Table table(exponents, j);
      u32 first[4], second[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) expand_fp4(element(words[q], j), table, first[q], second[q]);
      ptx::store_shared_4(to + chunk[2 * j], first[0], first[1], first[2], first[3]);
      ptx::store_shared_4(to + chunk[2 * j + 1], second[0], second[1], second[2], second[3]);
    }
  }

  __device__ __forceinline__ void load_next() {
    slabs.wait_full();
    load();
  }

  __device__ __forceinline__ void run(int blocks) {
    load_next();
#pragma unroll 1
    for (int kb = 0; kb < blocks; ++kb) {
      ring.wait_empty();
      expand();
      if (threadIdx.x % 64 == 0) ptx::store_shared(ring.bases() + threadIdx.x % 128 / 16, base);
      ptx::mbarrier_arrive(slabs.empty());
      slabs.advance();
      ptx::fence_proxy_async();
      // Under the fence, unless it would keep the consumers waiting.
      const bool more = kb + 1 < blocks, now = more && whole_warp(slabs.is_full());
      if (now) load();
      ptx::mbarrier_arrive(ring.full());
      ring.move_on();
      if (more && !now) load_next();
    }
  }
};

// --- consumers ---

template <class C>
struct StagedLoop {
  static constexpr int kHeights = C::COLS / 64;

  const int warpgroup;
  StagedRing<C> ring;
  ScaleRing<C> scales;
  const Fragment mine;
  Accumulator<C> acc;
  float product[C::COLS / 2];

  __device__ __forceinline__ StagedLoop(u32 smem, int warpgroup)
      : warpgroup(warpgroup), ring(smem), scales(smem) {}

  // The first row of a part within its tile: warpgroups take parts in turn, so that each has its share of
  // however many a group fills.
  __device__ __forceinline__ static int row_of(int part, int warpgroup) {
    return (part * kStagedConsumers + warpgroup) * 64;
  }
  __device__ __forceinline__ static int parts(int rows, int warpgroup) {
    return max(0, min(kParts<C>, ceil_div(rows - warpgroup * 64, 64 * kStagedConsumers)));
  }

  // One part of the slot that the ring stands at, block j of a quad. FINAL: the last part; `more`: whether a
  // block follows.
  template <bool FINAL>
  __device__ __forceinline__ void multiply(int part, int j, bool more) {
    const ptx::Descriptor rows = ptx::k_major_descriptor(ring.tokens() + row_of(part, warpgroup) * 128);
    const ptx::Descriptor cols = ptx::k_major_descriptor(ring.weights());
    const u32 empty = ring.empty(), of_rows = scales.of(j, row_of(part, warpgroup) + mine.row);
    ptx::pin(product);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      C::Mma::issue(product, rows.plus(step * 32), cols.plus(step * 32), step > 0);
    ptx::wgmma_commit();
    const float upper = ptx::load_shared(of_rows), lower = ptx::load_shared(of_rows + 8 * 4);
    float uppers[kHeights], lowers[kHeights];
#pragma unroll
    for (int i = 0; i < kHeights; ++i) {
      const float base = ptx::load_shared(ring.bases() + i * 4);
      uppers[i] = upper * base, lowers[i] = lower * base;
    }
    if constexpr (FINAL) {
      ring.move_on();
      if (more) ring.wait_full();
    }
    ptx::wgmma_wait<0>();
    ptx::pin(product);
    if constexpr (FINAL) ring.release(empty);
#pragma unroll
    for (int i = 0; i < C::COLS / 2; i += 4) {
      acc[part][i] += uppers[i / 32] * product[i];
      acc[part][i + 1] += uppers[i / 32] * product[i + 1];
      acc[part][i + 2] += lowers[i / 32] * product[i + 2];
      acc[part][i + 3] += lowers[i / 32] * product[i + 3];
    }
  }

  // Hands a quad of scales back, all of which the sums have met.
  __device__ __forceinline__ void release_quad() {
    scales.release(scales.empty());
    scales.advance();
  }

  template <int PARTS>
  __device__ __forceinline__ void run_parts(int blocks) {
    ring.wait_full();
#pragma unroll 1
    for (int kb = 0; kb < blocks; ++kb) {
      const int j = kb % kQuad;
      const bool more = kb + 1 < blocks;
      if (j == 0) scales.wait_full();
#pragma unroll
      for (int part = 0; part + 1 < PARTS; ++part) multiply<false>(part, j, false);
      multiply<true>(PARTS - 1, j, more);
      if (j + 1 == kQuad || !more) release_quad();
    }
  }

  __device__ __forceinline__ void pass(int blocks) {
#pragma unroll 1
    for (int kb = 0; kb < blocks; ++kb) {
      ring.wait_full();
      if (kb % kQuad == 0) scales.wait_full();
      __syncwarp();  // see Pipeline::pass
      ring.release(ring.empty());
      ring.move_on();
      if (kb % kQuad == 0) release_quad();
    }
  }

  // A tile's blocks of k, for so many of its rows.
  __device__ __forceinline__ void run(int blocks, int rows) {
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) clear(acc[part]);
    if (blocks == 0) return;
    const int count = parts(rows, warpgroup);
    if (kParts<C> > 1 && whole_warp(count > 1))
      run_parts<kParts<C>>(blocks);
    else if (whole_warp(count > 0))
      run_parts<1>(blocks);
    else
      pass(blocks);
  }

  __device__ __forceinline__ void store(const TensorMap* d_map, typename C::Out* d, const Extents& p,
                                        const GroupTile& at) {
    const u32 slabs =
        ring.smem + StagedLayout<C>::kStaging + ptx::thread_index() / 32 * C::SLABS * kSlabBytes;
#pragma unroll
    for (int part = 0; part < kParts<C>; ++part) {
      const int first = at.tile.row + row_of(part, ptx::thread_index() / 128);
      clear_rows_from<C>(acc[part], first, at.rows_end);
      store_group_tile<C>(acc[part], d_map, d, nullptr, slabs, p, at, first);
    }
  }
};

template <class C>
  requires MixedConfig<C> && GemmConfig<C>
__device__ __forceinline__ void staged(const MixedOperands<C>& in, const Groups& groups, const Extents& p,
                                       const TensorMap* d_map, typename C::Out* d) {
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int warpgroup = warpgroup_index();

  if (threadIdx.x == 0) {
    StagedRing<C>(smem).init(128 * kStagedConsumers, 1 + 128);  // the tokens' bytes and the expander
    SlabRing<C>(smem).init(128);
    ScaleRing<C>(smem).init(128 * kStagedConsumers, 32);
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_previous_kernel();
  const MixedTiles<C> tiles = make_tiles<C>(groups, p, smem + StagedLayout<C>::kTable);
  __syncthreads();

  const auto each_product = [&](auto&& work) {
    for (int number = blockIdx.x; number < tiles.tiles; number += gridDim.x) {
      const GroupTile at = tiles[number];
      if (whole_warp(at.tile.k_end > 0)) work(at);
    }
  };
  if (warpgroup == kStagedProducer) {
    ptx::lower_registers<C::PRODUCER_REGISTERS>();
    const int warp = warp_index() % 4;
    if (warp == 2) {
      ScaleRing<C> ring(smem);
      each_product([&](const GroupTile& at) { load_quads<C>(ring, in, at, p); });
    } else if (warp < 2 && ptx::elect()) {
      StagedRing<C> ring(smem);
      SlabRing<C> slabs(smem);
      for (int number = blockIdx.x; number < tiles.tiles; number += gridDim.x) {
        const GroupTile at = tiles[number];
        if (at.tile.k_end == 0) continue;
        if (warp == 0)
          load_tokens<C>(ring, in, at);
        else
          load_tile_slabs<C>(slabs, in, at, p);
      }
    }
  } else if (warpgroup == kExpander) {
    ptx::lower_registers<C::EXPANDER_REGISTERS>();
    Expander<C> expander(smem);
    each_product([&](const GroupTile&) { expander.run(in.k_blocks); });
  } else {
    ptx::raise_registers<C::REGISTERS>();
    StagedLoop<C> loop(smem, warpgroup);
    for (int number = blockIdx.x; number < tiles.tiles; number += gridDim.x) {
      const GroupTile at = tiles[number];
      loop.run(whole_warp(at.tile.k_end > 0) ? in.k_blocks : 0, at.rows_end - at.tile.row);
      loop.store(d_map, d, p, tiles[number]);
    }
    if (C::TMA_STORE) ptx::tma_store_wait_read();
  }
}

}  // namespace jdg
