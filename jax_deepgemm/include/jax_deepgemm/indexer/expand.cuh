// Keys in FP4 become keys in e4m3: numbers of e2m1, two in a byte, with a scale of UE8M0 for every 32 of a
// key, become numbers of e4m3 with one scale of the key. ops/indexer/fp4.py says when that is exact.
//
// clang-format off
//   warpgroup 3         expands: a thread has a key of a tile at a time
//
//   packed keys:  slot  bytes [128, d / 2] | words of four scales [128]      producer -> this warpgroup
//   keys:         slot  keys [128, d] | scales [128]                         this warpgroup -> consumers
//
//   shared memory:  table[20 shifts][8 numbers without their sign]
// clang-format on
//
// A word of eight numbers takes five instructions for four of them: prmt picks bytes of the table by the
// lower three bits of a number, and its fourth bit, which makes it repeat a byte's highest one, gives signs.
//
// Rows of 64 or 32 bytes arrive swizzled, so that neighbouring threads read from different banks; rows of
// keys are swizzled as wgmma wants them.
//
// Hazard: what threads write is read by wgmma, through the async proxy. Every thread has a fence of its own
// behind its writes, before it arrives (PTX ISA 8.6, proxies). Scales are written and read by all threads, so
// that all of them arrive, on both barriers of a slot of keys.
#pragma once

#include <jax_deepgemm/indexer/work.cuh>
#include <jax_deepgemm/ptx/bits.cuh>

namespace jdg {

constexpr int kShifts = 20;  // of powers of two: times 2**6 to 2**-13, of which the last one leaves zeros
constexpr int kLargestShift = 6;
constexpr int kExactShifts = 14;  // beyond the first, down to 2**-8
constexpr u32 kNanCode = 255;

// The bits in e4m3 of a magnitude of e2m1, times 2**(6 - shift), rounded to the nearest, ties to even.
__device__ __forceinline__ u32 expanded_number(int code, int shift) {
  const u32 halves = code < 4 ? code : code < 6 ? 2 * code - 4 : 4 * code - 16;
  u32 units = halves;  // of 2**-9, e4m3's smallest number
  if (shift <= kExactShifts) {
    units <<= kExactShifts - shift;
  } else {
    const int lost = shift - kExactShifts;
    const u32 rest = units & ((1u << lost) - 1), half = 1u << (lost - 1);
    units >>= lost;
    units += rest > half || (rest == half && units % 2);
  }
  if (units < 8) return units;
  const u32 exponent = 31 - __clz(units);
  return (exponent - 2) << 3 | (units >> (exponent - 3) & 7);
}

// By the first threads of a block, before all of them meet.
template <class C>
__device__ __forceinline__ void write_table(u32 smem) {
  const int shift = threadIdx.x / 2, half = threadIdx.x % 2 * 4;
  if (shift >= kShifts) return;
  u32 numbers = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) numbers |= expanded_number(half + i, shift) << 8 * i;
  ptx::store_shared(smem + LogitsLayout<C>::kTable + threadIdx.x * 4, __uint_as_float(numbers));
}

// Numbers 0 to 3 of a word, or 4 to 7 of a word that is shifted.
__device__ __forceinline__ u32 expand_four(float2 table, u32 word) {
  const u32 magnitudes = ptx::permute(__float_as_uint(table.x), __float_as_uint(table.y), word & 0x77777777);
  const u32 signs = ptx::permute(0x80808080, 0x80808080, word);  // 0x80, or 0xFF
  return magnitudes | (signs << 1 & 0x80808080);
}

template <class C>
struct Expander {
  using L = LogitsLayout<C>;
  static constexpr int kBlocks = C::STEPS;  // of 32 numbers, of a key

  PackedKeys<C> packed;
  Keys<C> keys;

  __device__ __forceinline__ explicit Expander(u32 smem) : packed(smem), keys(smem) {}

  // A key's block: its place in rows of kPackedRow bytes, of which those of 64 and of 32 are swizzled.
  __device__ __forceinline__ float4 block_of(int key, int block) const {
    const u32 at = key * L::kPackedRow + block * 16;
    const u32 swizzled = kBlocks == 1 ? at : at ^ (at >> 3 & (kBlocks - 1) * 16);
    return ptx::load_shared_4(packed.keys() + swizzled);
  }

  // A key. All loads stand before what waits for them: there is one warp of these to a quarter of an SM.
  __device__ __forceinline__ void expand(int key) const {
    const u32 scale_at = scale_offset<C>(key);
    const u32 word = __float_as_uint(ptx::load_shared(packed.scales() + scale_at));
    float4 blocks[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) blocks[i] = block_of(key, i);
    int largest = 0;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const u32 any = __float_as_uint(blocks[i].x) | __float_as_uint(blocks[i].y) |
                      __float_as_uint(blocks[i].z) | __float_as_uint(blocks[i].w);
      const u32 code = word >> 8 * i & 255;
      if (any & 0x77777777) largest = max(largest, static_cast<int>(code));
      nan |= code == kNanCode;
    }
    const int base = max(largest - kLargestShift, 1);
    float2 tables[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int code = word >> 8 * i & 255;
      const int shift = max(0, min(base + kLargestShift - code, kShifts - 1));
      tables[i] = ptx::load_shared_2(packed.smem + L::kTable + shift * 8);
    }
    keys.wait_empty();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      store(key, 2 * i, tables[i], blocks[i].x, blocks[i].y);
      store(key, 2 * i + 1, tables[i], blocks[i].z, blocks[i].w);
    }
    const u32 scale = nan ? 0x7FFFFFFFu : static_cast<u32>(base) << 23;
    ptx::store_shared(keys.scales() + scale_at, __uint_as_float(scale));
  }

  // 16 numbers of a key.
  __device__ __forceinline__ void store(int key, int chunk, float2 table, float first, float second) const {
    const u32 a = __float_as_uint(first), b = __float_as_uint(second);
    ptx::store_shared_4(keys.keys() + key * kSlabBytes + ((chunk ^ key % 8) * 16), expand_four(table, a),
                        expand_four(table, a >> 16), expand_four(table, b), expand_four(table, b >> 16));
  }

  __device__ __forceinline__ void run(const Share& share) {
#pragma unroll 1
    for (i64 left = share.tiles; left > 0; --left) {
      packed.wait_full();
#pragma unroll 1
      for (int key = threadIdx.x % 128; key < kTileKeys<C>; key += 128) expand(key);
      ptx::fence_proxy_async();
      keys.fill_with_nothing();
      __syncwarp();
      if (threadIdx.x % 32 == 0) PackedKeys<C>::release(packed.empty());
      packed.advance();
      keys.advance();
    }
  }
};

}  // namespace jdg
