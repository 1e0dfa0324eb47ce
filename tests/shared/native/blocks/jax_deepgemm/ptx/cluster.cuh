// ptx/cluster.cuh for CPU threads: a variable lies as far into the shared memory of each block of a cluster.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

template <class T>
T* in_block(T* at, u32 rank) {
  const auto begin = reinterpret_cast<char*>(block->shared.data());
  return reinterpret_cast<T*>(reinterpret_cast<char*>(of_cluster[rank]->shared.data()) +
                              (reinterpret_cast<const char*>(at) - begin));
}
inline u32 load_from_block(const u32* at, u32 rank) { return *in_block(at, rank); }
inline void store_in_block(u64* at, u32 rank, u64 v) { *in_block(at, rank) = v; }

inline uint4 load_or_ones(bool wanted, const void* at) {
  uint4 v{~0u, ~0u, ~0u, ~0u};
  if (wanted) v = *static_cast<const uint4*>(__builtin_assume_aligned(at, 16));
  return v;
}
inline void prefetch_bulk(const void*, u32) {}
template <class T>
T load_constant(const T* at) {
  return *at;
}
inline float half_to_float(u16 bits) { return static_cast<float>(same_bits<_Float16>(bits)); }

}  // namespace jdg::ptx
