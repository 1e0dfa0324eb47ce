// What quantisation needs: correctly rounded quotients, FP8 conversions, loads that pass the L1 cache by (PTX
// ISA 9.7.3, 9.7.9).
#pragma once

#include <jax_deepgemm/ptx/copy.cuh>

namespace jdg {
using u8 = unsigned char;
}

namespace jdg::ptx {

__device__ __forceinline__ float div_rn(float a, float b) {
  float q;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(q) : "f"(a), "f"(b));
  return q;
}

__device__ __forceinline__ float rcp_rn(float a) {
  float r;
  asm("rcp.rn.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

// min and max that keep NaN (PTX ISA 9.7.3, min and max with .NaN).
__device__ __forceinline__ float min_nan(float a, float b) {
  float v;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// A product that takes subnormal numbers for zeros of their sign.
__device__ __forceinline__ float mul_ftz(float a, float b) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

__device__ __forceinline__ float rcp_approx(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

// 2 to the power of a.
__device__ __forceinline__ float ex2_approx(float a) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

__device__ __forceinline__ float half_to_float(u16 bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}

// Two floats rounded to nearest even and saturated, also infinities; NaN becomes 0x7F. The first is the low
// byte.
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
  u16 packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}
// The low byte first.
__device__ __forceinline__ float2 unpack_e4m3(u16 two) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
  return {half_to_float(static_cast<u16>(halves)), half_to_float(static_cast<u16>(halves >> 16))};
}
__device__ __forceinline__ u16 pack_e5m2(float low, float high) {
  u16 packed;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// Of both halves the number of larger magnitude, its sign of no meaning; a NaN only beside another NaN.
__device__ __forceinline__ u32 max_magnitude_bf16x2(u32 a, u32 b) {
  u32 larger;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
__device__ __forceinline__ u32 max_magnitude_f16x2(u32 a, u32 b) {
  u32 larger;
  asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// 16 bytes that no thread will read again.
__device__ __forceinline__ uint4 load_once(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// 16 bytes that others will read, too: load_once would leave L2 soon.
__device__ __forceinline__ uint4 load_again(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Makes the compiler compute v up to here, and what follows from it anew instead of keeping it.
__device__ __forceinline__ void forget(u32& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void forget(float& v) { asm volatile("" : "+f"(v)); }

}  // namespace jdg::ptx
