// What every Hopper GEMM kernel here shares: the ring of shared-memory slots between one TMA producer thread and the
// consumer warpgroups, and the loops on both sides of it.
//
// wgmma multiplies "rows" (its M side, 64 per warpgroup, A or the weights) by "cols" (its N side, the tile width).
//
//   producer thread                          consumer warpgroup w
//   wait empty[s]                            wait full[s]
//   expect bytes on full[s]                  read scales of this block of k
//   TMA rows tile, cols tile -> slot s       4 wgmma over the 128 bytes of k in the slot
//   every 4th block: TMA scale quads         wait for them, arrive empty[s], promote: acc += scale * product
//
// Vector scales (1x128) are read from the caller's row-major [rows, k/128] array: one TMA box {4 blocks of k, rows}
// serves four blocks of k. Its slots form a ring of their own, SCALE_SLOTS long, without barriers: a quad's last reader
// is done before it releases the data slot of the last block of that quad, and the host sizes the ring so that the
// producer, at most STAGES blocks ahead, has seen that release before it overwrites the quad (sm90/config.py).
//
// Hazard: the FP8 tensor core accumulates with about 14 bits, hence the promotion to float32 after every 128 of k.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/ptx/tma.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg {

enum class Scale {
  kNone,    // BF16
  kVector,  // one factor for each row (column) and 128 of k
  kBlock,   // one factor for each 128 rows (columns) and 128 of k
};

constexpr int kSlotRowBytes = 128;  // bytes of k in a slot: 128 FP8 or 64 BF16 elements
constexpr int kStepsPerBlock = 4;   // wgmma instructions along k for them
constexpr int kQuad = 4;            // blocks of k whose scales travel together

// Where things are in shared memory. C is a kernel's configuration; its fields are named in sm90/config.py.
template <class C>
struct Layout {
  static constexpr u32 kRowsBytes = (C::ROWS_K_MAJOR ? C::ROWS : align_up(C::ROWS, 64)) * kSlotRowBytes;
  static constexpr u32 kColsBytes = (C::COLS_K_MAJOR ? C::COLS : align_up(C::COLS, 64)) * kSlotRowBytes;
  static constexpr u32 kRowScaleBytes = C::ROW_SCALES == Scale::kVector ? C::ROWS * kQuad * 4 : 0;
  static constexpr u32 kColScaleBytes = C::COL_SCALES == Scale::kVector ? align_up(C::COLS * kQuad * 4, 128) : 0;

  static constexpr u32 kRows = 0;
  static constexpr u32 kCols = kRows + C::STAGES * kRowsBytes;
  static constexpr u32 kRowScales = kCols + C::STAGES * kColsBytes;
  static constexpr u32 kColScales = kRowScales + C::SCALE_SLOTS * kRowScaleBytes;
  static constexpr u32 kStaging = kColScales + C::SCALE_SLOTS * kColScaleBytes;
  static constexpr u32 kBarriers = kStaging + C::STAGING_BYTES;
  static constexpr u32 kBytes = kBarriers + 2 * C::STAGES * 8;
  static_assert(kBytes <= C::SHARED_BYTES, "the host computed less shared memory than the kernel uses");

  static constexpr u32 kSlotBytes = kRowsBytes + kColsBytes;
  static constexpr u32 kQuadBytes = kRowScaleBytes + (C::COL_SCALES == Scale::kVector ? C::COLS * kQuad * 4 : 0);
};

// A block of k in the ring, as seen from one side of it.
template <class C>
struct Position {
  u32 smem;
  int stage = 0;
  u32 phase = 0;
  int quad_slot = 0;

  __device__ __forceinline__ explicit Position(u32 base) : smem(base) {}
  __device__ __forceinline__ u32 full() const { return smem + Layout<C>::kBarriers + stage * 8; }
  __device__ __forceinline__ u32 empty() const { return full() + C::STAGES * 8; }
  __device__ __forceinline__ u32 rows() const { return smem + Layout<C>::kRows + stage * Layout<C>::kRowsBytes; }
  __device__ __forceinline__ u32 cols() const { return smem + Layout<C>::kCols + stage * Layout<C>::kColsBytes; }
  __device__ __forceinline__ u32 row_scales() const {
    return smem + Layout<C>::kRowScales + quad_slot * Layout<C>::kRowScaleBytes;
  }
  __device__ __forceinline__ u32 col_scales() const {
    return smem + Layout<C>::kColScales + quad_slot * Layout<C>::kColScaleBytes;
  }
  // `kb` is the block just finished, the next one is kb + 1 or the first of another range.
  __device__ __forceinline__ void advance(int kb, bool last) {
    if (++stage == C::STAGES) {
      stage = 0;
      phase ^= 1;
    }
    if (C::SCALE_SLOTS > 0 && (last || kb % kQuad == kQuad - 1) && ++quad_slot == C::SCALE_SLOTS) quad_slot = 0;
  }
};

template <class C>
__device__ __forceinline__ void init_barriers(u32 smem) {
  Position<C> at(smem);
  if (threadIdx.x == 0) {
    for (at.stage = 0; at.stage < C::STAGES; ++at.stage) {
      ptx::mbarrier_init(at.full(), 1);
      ptx::mbarrier_init(at.empty(), 4 * C::WARPGROUPS);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// The operands in global memory. A batch coordinate is multiplied by 0 where all batches share an operand.
struct Operands {
  const TensorMap* rows;
  const TensorMap* cols;
  const TensorMap* row_scales;  // kVector only
  const TensorMap* col_scales;  // kVector only
  const float* block_scales;    // kBlock only: [batch, block_scale_rows, block_scale_pitch]
  int k_blocks;
  int block_scale_rows, block_scale_pitch;
  int batched_rows, batched_cols, batched_row_scales, batched_col_scales;  // 0 or 1
};

// The part of the product that a block of threads computes at a time.
struct Tile {
  int row, col, batch;
  int k_begin, k_end;  // blocks of k
};

template <class C, bool K_MAJOR, int EXTENT>
__device__ __forceinline__ void load_operand(u32 slot, const TensorMap& map, u32 bar, int first, int kb, int batch) {
  if constexpr (K_MAJOR) {
    ptx::tma_load(slot, map, bar, kb * C::BLOCK_K, first, batch);
  } else {
#pragma unroll
    for (int slab = 0; slab < ceil_div(EXTENT, 64); ++slab)
      ptx::tma_load(slot + slab * 64 * kSlotRowBytes, map, bar, first + slab * 64, kb * C::BLOCK_K, batch);
  }
}

// Producer side, one thread.
template <class C>
__device__ __forceinline__ void load_blocks(Position<C>& at, const Operands& in, const Tile& tile) {
  using L = Layout<C>;
  for (int kb = tile.k_begin; kb < tile.k_end; ++kb) {
    const bool quad = C::SCALE_SLOTS > 0 && (kb == tile.k_begin || kb % kQuad == 0);
    ptx::mbarrier_wait(at.empty(), at.phase ^ 1);
    ptx::mbarrier_expect_bytes(at.full(), L::kSlotBytes + (quad ? L::kQuadBytes : 0));
    load_operand<C, C::ROWS_K_MAJOR, C::ROWS>(at.rows(), *in.rows, at.full(), tile.row, kb,
                                              tile.batch * in.batched_rows);
    load_operand<C, C::COLS_K_MAJOR, C::COLS>(at.cols(), *in.cols, at.full(), tile.col, kb,
                                              tile.batch * in.batched_cols);
    // The innermost coordinate of a TMA box must be a multiple of 16 bytes: quads start at multiples of 4.
    if (C::ROW_SCALES == Scale::kVector && quad)
      ptx::tma_load(at.row_scales(), *in.row_scales, at.full(), kb / kQuad * kQuad, tile.row,
                    tile.batch * in.batched_row_scales);
    if (C::COL_SCALES == Scale::kVector && quad)
      ptx::tma_load(at.col_scales(), *in.col_scales, at.full(), kb / kQuad * kQuad, tile.col,
                    tile.batch * in.batched_col_scales);
    at.advance(kb, kb + 1 == tile.k_end);
  }
}

// This thread's place in the accumulator of its warpgroup: rows row and row + 8, columns 8i + col and 8i + col + 1 for
// every i; acc[4i + {0, 1}] belong to the first row, acc[4i + {2, 3}] to the second (PTX ISA 9.7.15.5, m64nNk*).
struct Fragment {
  int row, col;
  __device__ __forceinline__ Fragment()
      : row(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), col(threadIdx.x % 4 * 2) {}
};

// 128x128 scales of one tile, read through L1 one block of k ahead of their use. A tile whose edges are not multiples
// of 128 touches up to COUNT of them.
template <int COUNT>
struct BlockScales {
  const float* next;   // of the first row of blocks
  int row_step[COUNT];  // from there to the others; the last row of blocks stands for those beyond it
  float ahead[COUNT];

  __device__ __forceinline__ BlockScales(const Operands& in, int first, int batch, int kb) {
    const int row = min(first / 128, in.block_scale_rows - 1);
    next = in.block_scales + (static_cast<i64>(batch) * in.block_scale_rows + row) * in.block_scale_pitch + kb;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) row_step[i] = min(i, in.block_scale_rows - 1 - row) * in.block_scale_pitch;
    fetch(kb < in.k_blocks);
  }
  __device__ __forceinline__ void fetch(bool there) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) ahead[i] = there ? __ldg(next + row_step[i]) : 0.0f;
  }
  __device__ __forceinline__ void take(float (&now)[COUNT], bool more) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) now[i] = ahead[i];
    ++next;
    fetch(more);
  }
};

// The descriptors of one k-step within a slot.
template <class C>
__device__ __forceinline__ void multiply_slot(float (&d)[C::COLS / 2], u32 rows, u32 cols, bool overwrite) {
  const u64 a = C::ROWS_K_MAJOR ? ptx::k_major_descriptor(rows) : ptx::mn_major_descriptor(rows, 64 * kSlotRowBytes);
  const u64 b = C::COLS_K_MAJOR ? ptx::k_major_descriptor(cols) : ptx::mn_major_descriptor(cols, 64 * kSlotRowBytes);
#pragma unroll
  for (int step = 0; step < kStepsPerBlock; ++step)
    C::Mma::issue(d, a + step * (C::ROWS_K_MAJOR ? 2 : 128), b + step * (C::COLS_K_MAJOR ? 2 : 128),
                  !overwrite || step > 0);
  ptx::wgmma_commit();
}

// How many 128-blocks a tile of `width` columns can touch when tiles start at multiples of `width`.
__host__ __device__ constexpr int touched_blocks(int width) { return ceil_div(128 - gcd(width, 128) + width, 128); }

// acc += row scale * block scale * temp; `offset` is the tile's first column modulo 128.
template <class C, int COUNT, class OffsetOrConstant>
__device__ __forceinline__ void promote_by_block(float (&acc)[C::COLS / 2], const float (&temp)[C::COLS / 2],
                                                 const float (&upper)[COUNT], const float (&lower)[COUNT],
                                                 OffsetOrConstant offset) {
#pragma unroll
  for (int i = 0; i < C::COLS / 8; ++i) {
    float u = upper[0], l = lower[0];
#pragma unroll
    for (int j = 1; j < COUNT; ++j)
      if (offset + 8 * i >= 128 * j) u = upper[j], l = lower[j];
    acc[4 * i + 0] += u * temp[4 * i + 0];
    acc[4 * i + 1] += u * temp[4 * i + 1];
    acc[4 * i + 2] += l * temp[4 * i + 2];
    acc[4 * i + 3] += l * temp[4 * i + 3];
  }
}

template <int VALUE>
struct Constant {
  __device__ constexpr operator int() const { return VALUE; }
};

// Consumer side, FP8: one temporary accumulator per block of k, promoted with its scales.
template <class C>
__device__ __forceinline__ void multiply_fp8(float (&acc)[C::COLS / 2], Position<C>& at, const Operands& in,
                                             const Tile& tile, int warpgroup) {
  constexpr int kGroups = C::COLS / 8;
  constexpr bool kColVector = C::COL_SCALES == Scale::kVector;
  constexpr bool kRowVector = C::ROW_SCALES == Scale::kVector;
  constexpr int kBlocks = C::COL_SCALES == Scale::kBlock ? touched_blocks(C::COLS) : 1;
  constexpr bool kHasBlocks = C::COL_SCALES == Scale::kBlock || C::ROW_SCALES == Scale::kBlock;
  // Per-column scales are a factor for every element or column. Where registers allow, they are formed under the
  // multiplication; otherwise promotion reads them from the slot, which is then released behind it.
  constexpr int kFactors = kRowVector ? C::COLS / 2 : 2 * kGroups;
  constexpr bool kFactorsEarly = kColVector && C::COLS + kFactors <= C::REGISTERS - 40;

  const Fragment mine;
  const int scaled = C::ROW_SCALES == Scale::kBlock ? tile.row + 64 * warpgroup : tile.col;
  const int batch = tile.batch * (C::ROW_SCALES == Scale::kBlock ? in.batched_row_scales : in.batched_col_scales);
  BlockScales<kBlocks> blocks(in, scaled, batch, kHasBlocks ? tile.k_begin : in.k_blocks);

  for (int kb = tile.k_begin; kb < tile.k_end; ++kb) {
    const bool last = kb + 1 == tile.k_end;
    float upper = 1.0f, lower = 1.0f, block[kBlocks] = {1.0f}, col[kFactorsEarly ? 2 * kGroups : 1];
    float temp[C::COLS / 2];

    // Scales before the multiplication is issued: behind it they cost 3 to 9 % of the rate (docs/performance.md).
    if constexpr (kHasBlocks) blocks.take(block, !last);
    ptx::mbarrier_wait(at.full(), at.phase);
    if constexpr (kRowVector) {
      const u32 address = at.row_scales() + ((64 * warpgroup + mine.row) * kQuad + kb % kQuad) * 4;
      upper = ptx::load_shared(address);
      lower = ptx::load_shared(address + 8 * kQuad * 4);
    }
    const u32 col_scales = at.col_scales() + (mine.col * kQuad + kb % kQuad) * 4;
    const auto col_scale = [&](int i) { return ptx::load_shared(col_scales + (i / 2 * 8 + i % 2) * kQuad * 4); };
    if constexpr (kFactorsEarly) {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) col[i] = col_scale(i);
    }

    ptx::pin(temp);
    ptx::wgmma_fence();
    multiply_slot<C>(temp, at.rows() + warpgroup * 64 * kSlotRowBytes, at.cols(), true);

    // Under the multiplication: the factors that promotion needs.
    float factor[kFactorsEarly ? kFactors : 1], uppers[kBlocks], lowers[kBlocks];
    if constexpr (kFactorsEarly) {
#pragma unroll
      for (int i = 0; i < kFactors; ++i)
        factor[i] = kRowVector ? (i % 4 < 2 ? upper : lower) * col[i / 4 * 2 + i % 2] : block[0] * col[i];
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) uppers[j] = upper * block[j], lowers[j] = lower * block[j];

    ptx::wgmma_wait<0>();
    ptx::pin(temp);
    const auto release = [&] {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(at.empty());
    };
    if constexpr (!kColVector || kFactorsEarly) release();

    if constexpr (kFactorsEarly) {
#pragma unroll
      for (int i = 0; i < C::COLS / 2; ++i) acc[i] += factor[kRowVector ? i : i / 4 * 2 + i % 2] * temp[i];
    } else if constexpr (kColVector) {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        const float scale = col_scale(i);
        const int at_upper = i / 2 * 4 + i % 2;
        acc[at_upper] += uppers[0] * scale * temp[at_upper];
        acc[at_upper + 2] += (kRowVector ? lowers[0] * scale : uppers[0] * scale) * temp[at_upper + 2];
      }
      release();
    } else if constexpr (128 % C::COLS == 0) {
      promote_by_block<C>(acc, temp, uppers, lowers, Constant<0>());
    } else if constexpr (C::COLS % 64 == 0) {  // two possible offsets: two straight copies beat run-time selects
      if (tile.col % 128 == 0) promote_by_block<C>(acc, temp, uppers, lowers, Constant<0>());
      else promote_by_block<C>(acc, temp, uppers, lowers, Constant<64>());
    } else {
      promote_by_block<C>(acc, temp, uppers, lowers, tile.col % 128);
    }
    at.advance(kb, last);
  }
}

// Consumer side, BF16: one accumulator over all of k, one block in flight behind the one being issued.
template <class C>
__device__ __forceinline__ void multiply_bf16(float (&acc)[C::COLS / 2], Position<C>& at, const Tile& tile,
                                              int warpgroup) {
  constexpr u32 kWarpgroupBytes = 64 * kSlotRowBytes;  // K-major: 64 rows; MN-major: one slab of 64
  u32 previous = 0;
  ptx::pin(acc);
  for (int kb = tile.k_begin; kb < tile.k_end; ++kb) {
    ptx::mbarrier_wait(at.full(), at.phase);
    ptx::wgmma_fence();
    multiply_slot<C>(acc, at.rows() + warpgroup * kWarpgroupBytes, at.cols(), false);
    ptx::wgmma_wait<1>();
    if (kb > tile.k_begin && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(previous);
    previous = at.empty();
    at.advance(kb, kb + 1 == tile.k_end);
  }
  ptx::wgmma_wait<0>();
  ptx::pin(acc);
  if (tile.k_begin < tile.k_end && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(previous);
}

// acc = rows tile * cols tile over the tile's range of k, all scales applied.
template <class C>
__device__ __forceinline__ void multiply_blocks(float (&acc)[C::COLS / 2], Position<C>& at, const Operands& in,
                                                const Tile& tile, int warpgroup) {
#pragma unroll
  for (int i = 0; i < C::COLS / 2; ++i) acc[i] = 0.0f;
  if constexpr (C::ROW_SCALES == Scale::kNone) multiply_bf16<C>(acc, at, tile, warpgroup);
  else multiply_fp8<C>(acc, at, in, tile, warpgroup);
}

}  // namespace jdg
