// Rows by their index: to[i] = from[index[i]], zeros where there is no such row.
//
//   a warp   one piece of one row: COUNT vectors of a lane, all loaded before the first is stored; the warp
//            of a row's first piece takes the row's scales too, where there are some
//   a grid   the first pieces of all rows, then the second ones, ..: of rows that many copies are made of, so
//            much is read at a time as stays in L2
//
// Nothing is read twice by a warp, so loads pass L1 by; stores are marked for early eviction.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg {

template <int BYTES>
struct VectorOf;
template <>
struct VectorOf<16> {
  using Type = uint4;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<4> {
  using Type = u32;
};
template <>
struct VectorOf<2> {
  using Type = u16;
};
template <>
struct VectorOf<1> {
  using Type = u8;
};

// What lies at an address, or zeros. Without a branch, so that all loads of a lane come first.
__device__ __forceinline__ uint4 load_vector_if(bool wanted, const uint4* at) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@wanted ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(at), "r"(static_cast<u32>(wanted))
      : "memory");
  return v;
}
template <class V>
__device__ __forceinline__ V load_vector_if(bool wanted, const V* at) {
  return wanted ? *at : V{};
}

__device__ __forceinline__ void store_vector(uint4* at, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
template <class V>
__device__ __forceinline__ void store_vector(V* at, V v) {
  *at = v;
}

// Of a row of `vectors` vectors, COUNT of a lane from vector `begin` on; zeros of a row that does not exist.
template <class V, int COUNT>
__device__ __forceinline__ void load_piece(V (&held)[COUNT], const V* read, bool exists, int vectors,
                                           int begin) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const int v = begin + 32 * k;
    held[k] = load_vector_if(exists && v < vectors, read + v);
  }
}
template <class V, int COUNT>
__device__ __forceinline__ void store_piece(const V (&held)[COUNT], V* write, int vectors, int begin) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const int v = begin + 32 * k;
    if (v < vectors) store_vector(write + v, held[k]);
  }
}

template <class V, int COUNT>
__device__ __forceinline__ void take_piece(const V* from, V* to, i64 source, i64 target, bool exists,
                                           int vectors, int begin) {
  V held[COUNT];
  load_piece(held, from + source * vectors, exists, vectors, begin);
  store_piece(held, to + target * vectors, vectors, begin);
}

// Grid x: rows, WARPS of a block; y: pieces of COUNT vectors of a lane. SCALES: bytes of their vectors, 0 for
// none. vectors, scale_vectors: of a row.
template <int BYTES, int COUNT, int WARPS, int SCALES>
__device__ __forceinline__ void take(const void* from, const void* from_scales, const int* index, void* to,
                                     void* to_scales, int rows_from, int rows_to, int vectors,
                                     int scale_vectors) {
  using Vector = typename VectorOf<BYTES>::Type;
  const int lane = static_cast<int>(threadIdx.x) % 32, piece = static_cast<int>(blockIdx.y);
  const i64 row = static_cast<i64>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= rows_to) return;
  const int source = index[row];
  const bool exists = static_cast<u32>(source) < static_cast<u32>(rows_from);
  take_piece<Vector, COUNT>(static_cast<const Vector*>(from), static_cast<Vector*>(to), source, row, exists,
                            vectors, piece * 32 * COUNT + lane);
  if constexpr (SCALES != 0) {
    using Scale = typename VectorOf<SCALES>::Type;
    if (piece != 0) return;
    for (int begin = lane; begin < scale_vectors; begin += 32)
      take_piece<Scale, 1>(static_cast<const Scale*>(from_scales), static_cast<Scale*>(to_scales), source,
                           row, exists, scale_vectors, begin);
  }
}

}  // namespace jdg
