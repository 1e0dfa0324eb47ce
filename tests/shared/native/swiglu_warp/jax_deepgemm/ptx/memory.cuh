// What kernels take of the device's header of this name, likewise.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

#define pack_bf16 device_pack_bf16
#define pack_f16 device_pack_f16
#define to_bf16 device_to_bf16
#define store_shared_pair device_store_shared_pair
#define thread_index device_thread_index
#define touch device_touch
#define load_in_order device_load_in_order
#define load_in_order_2 device_load_in_order_2
#include_next <jax_deepgemm/ptx/memory.cuh>
#undef pack_bf16
#undef pack_f16
#undef to_bf16
#undef store_shared_pair
#undef thread_index
#undef touch
#undef load_in_order
#undef load_in_order_2

namespace jdg::ptx {

inline bf16 to_bf16(float v) { return {static_cast<u16>(pack_bf16(v, 0.0f) & 0xFFFF)}; }
inline float load_in_order(const float* at) { return *at; }
inline float2 load_in_order_2(const float* at) { return {at[0], at[1]}; }
inline void touch(const float* at) { (void)*static_cast<const volatile float*>(at); }
u32 pack_f16(float low, float high);  // not run on a CPU

}  // namespace jdg::ptx
