// Neighbours of a row as they lie in memory, and float32 in the types that rows and caches have.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/quantize/chunk.cuh>

namespace jdg {

struct e4m3 {
  u8 bits;
};

// COUNT neighbours, which one instruction moves where they are 16 bytes or fewer.
template <class T, int COUNT>
struct alignas(min(16, COUNT* static_cast<int>(sizeof(T)))) Neighbours {
  using One = T;
  T v[COUNT];
};

template <class Many, class T>
__device__ __forceinline__ auto* at(T* first) {
  if constexpr (is_same<T, const typename Many::One>)
    return reinterpret_cast<const Many*>(first);
  else
    return reinterpret_cast<Many*>(first);
}

__device__ __forceinline__ float wide(float v) { return v; }
__device__ __forceinline__ float wide(bf16 v) { return ptx::to_float(v); }
__device__ __forceinline__ float wide(f16 v) { return ptx::half_to_float(v.bits); }

// Rounded to nearest even and held to +-448; NaN becomes 0x7F. GPUs before 8.9 have no instruction for it.
__device__ __forceinline__ u8 to_e4m3(float v) {
#if __CUDA_ARCH__ >= 890
  return static_cast<u8>(ptx::pack_e4m3(v, 0.0f));
#else
  if (v != v) return 0x7F;
  const u32 sign = __float_as_uint(v) >> 24 & 0x80;
  const float size = fminf(fabsf(v), 448.0f);
  const u32 bits = __float_as_uint(size), rounded = bits + 0x7FFFF + (bits >> 20 & 1);
  const u32 found = size < 0.015625f ? static_cast<u32>(rintf(size * 512.0f)) : (rounded >> 20) - (120u << 3);
  return static_cast<u8>(sign | found);
#endif
}

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, bf16& to) { to = ptx::to_bf16(v); }
__device__ __forceinline__ void narrow(float v, f16& to) {
  to.bits = static_cast<u16>(ptx::pack_f16(v, 0.0f) & 0xFFFF);
}
__device__ __forceinline__ void narrow(float v, e4m3& to) { to.bits = to_e4m3(v); }

}  // namespace jdg
