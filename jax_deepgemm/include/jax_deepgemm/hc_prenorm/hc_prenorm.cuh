// D = A B^T in TF32, A bfloat16 and B float32, and the sum of squares of each row of A, which is read once.
// A block of threads has ROWS rows of A, all columns of D, and one of `splits` parts of k.
//
// clang-format off
//   warpgroups 0 .. W-1   consumers, W = ROWS / 64 * GROUPS: warpgroup w multiplies rows w % (ROWS / 64) of
//                         blocks g, g + GROUPS, .. of k, where g = w / (ROWS / 64); a block is 64 of k
//   last warp             one thread of it is the TMA producer
//
//   shared memory (1024-byte aligned):   A[STAGES] | B[STAGES] | pipeline
//   a slot:   A   ROWS rows of 64 bfloat16     B   twice COLS rows of 32 float32; rows of 128 bytes, swizzled
//
//   consumer, for each of its blocks:   wait full   A -> registers, widened, squared, summed
//                                       8 products of A's registers by B's slot   wait   release
//   at the end:   groups 1, 2, .. leave their sums where slots were, and group 0 adds them in this order
// clang-format on
//
// What is outside of A, B and k arrives as zeros. B is rounded to TF32, which A is already, when it is
// loaded.
//
// Hazard: a group waits for its own slots only, and tells one phase from the next only, so a slot must belong
// to one group for ever: STAGES is a multiple of GROUPS.
//
// Hazard: registers that a product reads may not be written, nor read, until it is waited for (PTX ISA
// 9.7.15.5). The wait stands behind each block's products; other warpgroups work meanwhile.
#pragma once

#include <jax_deepgemm/pipeline.cuh>
#include <jax_deepgemm/ptx/bits.cuh>
#include <jax_deepgemm/ptx/tma.cuh>
#include <jax_deepgemm/ptx/wgmma.cuh>

namespace jdg {

// What the kernel is compiled for.
//   Mma                  m64nCOLSk8 in TF32, A in registers
//   ROWS                 of A, 64, 128 or 256
//   COLS                 of D, a multiple of 8
//   GROUPS               of warpgroups, which take blocks of k in turns
//   STAGES               slots
//   ONCE                 whether A's lines are the first to leave L2
//   SHARED_BYTES         of the layout
template <class C>
concept PrenormConfig = C::ROWS % 64 == 0 && C::COLS % 8 == 0 && C::STAGES % C::GROUPS == 0;

struct PrenormSizes {
  int m, n, blocks, splits;  // `blocks` of 64 numbers of k
};

template <PrenormConfig C>
struct PrenormLayout {
  static constexpr int kParts = C::ROWS / 64;  // of rows, one for a warpgroup
  static constexpr int kConsumers = 128 * kParts * C::GROUPS;
  static constexpr u32 kRowBytes = 128, kPartBytes = 64 * kRowBytes;
  static constexpr u32 kA = kParts * kPartBytes, kHalf = C::COLS * kRowBytes;  // of a slot
  static constexpr u32 kPipeline = C::STAGES * (kA + 2 * kHalf);
  using Slots = Pipeline<C::STAGES, kPipeline>;
  static_assert(Slots::kEnd == C::SHARED_BYTES, "the host counts as many bytes");

  __device__ __forceinline__ static u32 a(const Slots& slots) { return slots.smem + slots.stage * kA; }
  __device__ __forceinline__ static u32 b(const Slots& slots) {
    return slots.smem + C::STAGES * kA + slots.stage * 2 * kHalf;
  }
};

// The blocks of k of one split: the first ones have one more each, where they cannot all have as many.
struct SplitRange {
  int first, count;
};
__device__ __forceinline__ SplitRange split_range(int split, const PrenormSizes& size) {
  const int each = size.blocks / size.splits, more = size.blocks % size.splits;
  return {split * each + min(split, more), each + (split < more ? 1 : 0)};
}

template <PrenormConfig C>
__device__ __forceinline__ void load_slots(u32 smem, const TensorMap& a, const TensorMap& b, int row,
                                           const SplitRange& range) {
  using L = PrenormLayout<C>;
  typename L::Slots slots(smem);
  for (int i = 0; i < range.count; ++i) {
    const int k = (range.first + i) * 64;
    slots.wait_empty();
    slots.expect(L::kA + 2 * L::kHalf);
    if constexpr (C::ONCE)
      ptx::tma_load_once(L::a(slots), a, slots.full(), k, row, 0);
    else
      ptx::tma_load(L::a(slots), a, slots.full(), k, row, 0);
    ptx::tma_load(L::b(slots), b, slots.full(), k, 0);
    ptx::tma_load(L::b(slots) + L::kHalf, b, slots.full(), k + 32, 0);
    slots.advance();
  }
}

// This thread's part of wgmma's A in TF32: of rows r and r + 8, numbers c and c + 4 of each eight, where
// r = lane / 4 and c = lane % 4. In shared memory two numbers make a word, of which a thread wants one.
struct PrenormFragment {
  int row;    // of the warpgroup's 64
  u32 at;     // of the first word, in bytes
  u32 which;  // half of a word, as the high half of a float

  __device__ __forceinline__ PrenormFragment() {
    const int thread = threadIdx.x % 128, c = thread % 4;
    row = thread / 32 * 16 + thread % 32 / 4;
    at = row * 128 + (row % 8 * 16 | c / 2 * 4);
    which = c % 2 == 0 ? 0x1044 : 0x3244;
  }

  // Of all 64 numbers of the rows in a slot; the eights of a row lie in the order of a swizzle of 128 bytes.
  __device__ __forceinline__ void load(u32 (&a)[8][4], u32 slab) const {
#pragma unroll
    for (int eight = 0; eight < 8; ++eight) {
      const u32 word = (slab + at) ^ eight << 4;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[eight][i] = __float_as_uint(ptx::load_shared(word + i / 2 * 8 + i % 2 * 8 * 128));
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) a[i / 4][i % 4] = ptx::permute(a[i / 4][i % 4], 0, which);
  }
};

// The sums of one thread: columns 8 i + 2 c and the next one of rows r (d[4 i], d[4 i + 1]) and r + 8, and
// squares of its own numbers of both rows.
template <PrenormConfig C>
struct PrenormSums {
  using L = PrenormLayout<C>;
  static constexpr int kCount = C::COLS / 2;
  float d[kCount] = {};
  float squares[2] = {};

  __device__ __forceinline__ void add(const PrenormFragment& mine, u32 slab, u32 b) {
    u32 a[8][4];
    mine.load(a, slab);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float v = __uint_as_float(a[i / 4][i % 4]);
      squares[i % 2] = fmaf(v, v, squares[i % 2]);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
    ptx::pin(d);
    ptx::wgmma_fence();
    const ptx::Descriptor columns = ptx::k_major_descriptor(b);
#pragma unroll
    for (int eight = 0; eight < 8; ++eight)
      C::Mma::issue(d, a[eight], columns.plus(eight / 4 * L::kHalf + eight % 4 * 32), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(d);
  }

  // Sums of the groups, in their order, for the threads of group 0. All slots have been read.
  __device__ __forceinline__ void gather(u32 smem, int group) {
    constexpr u32 kEach = 128 * L::kParts * 4, kGroup = (kCount + 2) * kEach;
    static_assert((C::GROUPS - 1) * kGroup <= L::kPipeline, "sums fit where the slots were");
    const u32 own = smem + threadIdx.x % (128 * L::kParts) * 4;
    ptx::named_barrier<1, L::kConsumers>();
    if (group > 0) {
      const u32 to = own + (group - 1) * kGroup;
#pragma unroll
      for (int i = 0; i < kCount; ++i) ptx::store_shared(to + i * kEach, d[i]);
      ptx::store_shared(to + kCount * kEach, squares[0]);
      ptx::store_shared(to + (kCount + 1) * kEach, squares[1]);
    }
    ptx::named_barrier<1, L::kConsumers>();
    if (group > 0) return;
#pragma unroll
    for (int other = 0; other < C::GROUPS - 1; ++other) {
      const u32 from = own + other * kGroup;
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] += ptx::load_shared(from + i * kEach);
      squares[0] += ptx::load_shared(from + kCount * kEach);
      squares[1] += ptx::load_shared(from + (kCount + 1) * kEach);
    }
  }

  // To one split's results: rows from `row` on, of which there are m.
  __device__ __forceinline__ void store(float* to, float* of_squares, int row, const PrenormSizes& size) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8) {
      float square = squares[half];
      square += __shfl_xor_sync(0xFFFFFFFF, square, 1);
      square += __shfl_xor_sync(0xFFFFFFFF, square, 2);
      if (row >= size.m) continue;
      if (c == 0) of_squares[row] = square;
      float* line = to + static_cast<i64>(row) * size.n;
#pragma unroll
      for (int i = 0; i < C::COLS / 8; ++i) {
        const int col = 8 * i + 2 * c;
        const float first = d[4 * i + 2 * half], second = d[4 * i + 2 * half + 1];
        if (size.n % 2 == 0 && col < size.n) {
          *reinterpret_cast<float2*>(line + col) = {first, second};
        } else {
          if (col < size.n) line[col] = first;
          if (col + 1 < size.n) line[col + 1] = second;
        }
      }
    }
  }
};

// d [splits, m, n], squares [splits, m]; as many blocks of threads as tiles of rows times splits.
template <PrenormConfig C>
__device__ __forceinline__ void hc_prenorm(const TensorMap& a, const TensorMap& b, float* d, float* squares,
                                           const PrenormSizes& size) {
  using L = PrenormLayout<C>;
  extern __shared__ __align__(1024) char shared[];
  const u32 smem = smem_address(shared);
  const int split = blockIdx.x % size.splits, row = static_cast<int>(blockIdx.x / size.splits) * C::ROWS;
  const SplitRange range = split_range(split, size);

  typename L::Slots slots(smem);
  if (threadIdx.x == 0) {
    slots.init(4 * L::kParts);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  const int warpgroup = warpgroup_index();
  if (threadIdx.x >= L::kConsumers) {
    if (ptx::elect()) load_slots<C>(smem, a, b, row, range);
    return;
  }
  const int part = warpgroup % L::kParts, group = warpgroup / L::kParts;
  const PrenormFragment mine;
  PrenormSums<C> sums;
  slots.stage = group;
  for (int i = group; i < range.count; i += C::GROUPS) {
    slots.wait_full();
    sums.add(mine, L::a(slots) + part * L::kPartBytes, L::b(slots));
    if (threadIdx.x % 32 == 0) slots.release(slots.empty());
    slots.stage += C::GROUPS;
    if (slots.stage >= C::STAGES) slots.stage -= C::STAGES, slots.phase ^= 1;
  }
  ptx::let_next_kernel_start();  // not earlier: it would only wait, and take room
  if constexpr (C::GROUPS > 1) sums.gather(smem, group);
  if (group > 0) return;
  const i64 before = static_cast<i64>(split) * size.m;
  sums.store(d + before * size.n, squares + before, row + part * 64 + mine.row, size);
}

}  // namespace jdg
