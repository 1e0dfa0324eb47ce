// Loads, stores, reductions, conversions and register re-allocation.
#pragma once

#include <jax_deepgemm/ptx/types.cuh>

namespace jdg::ptx {

__device__ __forceinline__ float load_shared(u32 address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void store_shared(u32 address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

__device__ __forceinline__ void store_shared_2(u32 address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

__device__ __forceinline__ void store_shared_4(u32 address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void store_shared_byte(u32 address, int value) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Two bytes, the low one first.
__device__ __forceinline__ void store_shared_pair(u32 address, u16 bytes) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bytes) : "memory");
}

__device__ __forceinline__ float2 load_shared_2(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ float4 load_shared_4(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}

// Into the shared memory of a block of the cluster, counted by an mbarrier there; both addresses come from
// map_to_rank.
__device__ __forceinline__ void store_async_2(u32 address, float a, float b, u32 bar) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "f"(a), "f"(b), "r"(bar)
      : "memory");
}

// Four 8x8 matrices of 16-bit elements, one 16-byte row address per lane.
__device__ __forceinline__ void store_matrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ bf16 to_bf16(float v) { return {static_cast<u16>(pack_bf16(v, 0.0f) & 0xFFFF)}; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(static_cast<u32>(v.bits) << 16); }
__device__ __forceinline__ float to_float(float v) { return v; }

// Brings what lies there into L1.
__device__ __forceinline__ void touch(const float* at) {
  asm volatile(
      "{\n.reg .f32 unused;\nld.global.ca.f32 unused, [%0];\n}\n" ::"l"(__cvta_generic_to_global(at)));
}

// The same into L2, without a wait.
__device__ __forceinline__ void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
}

// From global memory, by addresses that might be shared memory's for all that ptxas knows: it moves these
// loads over no store to shared memory in front of them, which would cost registers.
__device__ __forceinline__ float load_in_order(const float* at) {
  float v;
  asm volatile("ld.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_in_order_2(const float* at) {
  float2 v;
  asm volatile("ld.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(at) : "memory");
  return v;
}

// To global memory: of an address that was a number before, the compiler would not know it.
__device__ __forceinline__ void store_global(float* to, float v) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(v) : "memory");
}
__device__ __forceinline__ void store_global(bf16* to, float v) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "h"(to_bf16(v).bits)
               : "memory");
}

// Adds to global memory, rounded to nearest even; subnormal numbers count as zero.
__device__ __forceinline__ void reduce_add(float* to, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
               "f"(a), "f"(b)
               : "memory");
}

// threadIdx.x, read anew, for code behind a main loop. Kept through the loop it would take a register where
// few are free: an FP8 tile of 128x208 needs 104 for sums and 104 for the product, of 232.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// What is computed of this number further on is computed there, and not kept from one round of a loop to the
// next, which would take registers.
__device__ __forceinline__ void forget(int& number) { asm volatile("" : "+r"(number)); }

template <int REGISTERS>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace jdg::ptx
