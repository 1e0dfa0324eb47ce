// Sums of rows by their index: to[i] = sum over s of from[index[i, s]] in float32, in the order of s, rounded
// once; an index of no row adds nothing.
//
//   a warp   one piece of one sum: HELD vectors of a lane of each of SLOTS rows, all copied to shared memory
//            before the first is added; more slots in turns
//   a grid   all pieces of some sums, then those of the next
//
// shared memory: [SLOTS * HELD][threads] vectors; each thread reads what it has copied, so none waits for
// another, and it reads before it copies anew (its own asm volatile, in order).
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/rows/take.cuh>

namespace jdg {

struct half {
  u16 bits;
};

namespace ptx {
__device__ __forceinline__ float to_float(half v) { return half_to_float(v.bits); }
__device__ __forceinline__ half to_half(float v) {
  half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}
}  // namespace ptx

template <class T>
__device__ __forceinline__ T rounded(float v) {
  if constexpr (is_same<T, bf16>)
    return ptx::to_bf16(v);
  else if constexpr (is_same<T, half>)
    return ptx::to_half(v);
  else
    return v;
}

// Neighbouring numbers of a row that are moved at once.
template <class T, int BYTES>
union Numbers {
  static constexpr int COUNT = BYTES / static_cast<int>(sizeof(T));
  typename VectorOf<BYTES>::Type vector;
  T number[COUNT];
};

// Vectors that a thread has asked for, in shared memory of its own: were they registers, ptxas would let each
// load wait for the sum of those before. Only 16 bytes are copied so; less is loaded when it is wanted.
template <class T, int BYTES, int COUNT, int THREADS>
struct Asked {
  using Vector = typename VectorOf<BYTES>::Type;
  static constexpr bool COPIED = BYTES == 16;
  Vector loaded[COPIED ? 1 : COUNT];
  u32 shared;

  __device__ __forceinline__ Asked() {
    if constexpr (COPIED) {
      __shared__ uint4 vectors[COUNT * THREADS];
      shared = smem_address(vectors + threadIdx.x);
    }
  }
  __device__ __forceinline__ void ask(int i, bool exists, const Vector* at) {
    if constexpr (COPIED)
      ptx::copy_async(shared + i * THREADS * 16, at, exists ? 16 : 0);
    else
      loaded[i] = exists ? *at : Vector{};
  }
  __device__ __forceinline__ void wait() {
    if constexpr (COPIED) ptx::copy_async_commit(), ptx::copy_async_wait();
  }
  __device__ __forceinline__ Numbers<T, BYTES> operator[](int i) const {
    Numbers<T, BYTES> found;
    if constexpr (COPIED)
      found.vector = ptx::load_shared_16(shared + i * THREADS * 16);
    else
      found.vector = loaded[i];
    return found;
  }
};

// vectors: of a row; pieces: of a sum.
template <class T, int BYTES, int HELD, int SLOTS, int WARPS>
__device__ __forceinline__ void sum_rows(const void* from, const int* index, void* to, int rows_from,
                                         int sums, int slots, int vectors, int pieces) {
  using Vector = typename VectorOf<BYTES>::Type;
  using N = Numbers<T, BYTES>;
  const u32 group = blockIdx.x / static_cast<u32>(pieces), piece = blockIdx.x - group * pieces;
  const i64 sum = static_cast<i64>(group) * WARPS + threadIdx.x / 32;
  if (sum >= sums) return;
  const int begin = static_cast<int>(piece) * 32 * HELD + static_cast<int>(threadIdx.x) % 32;
  const int* wanted = index + sum * slots;
  const Vector* rows = static_cast<const Vector*>(from);

  Asked<T, BYTES, SLOTS * HELD, 32 * WARPS> asked;
  float total[HELD][N::COUNT] = {};
  for (int first = 0; first < slots; first += SLOTS) {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int row = first + s < slots ? wanted[first + s] : -1;
      const bool exists = static_cast<u32>(row) < static_cast<u32>(rows_from);
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        const int v = begin + 32 * k;
        const bool counts = exists && v < vectors;
        asked.ask(s * HELD + k, counts, counts ? rows + static_cast<i64>(row) * vectors + v : rows);
      }
    }
    asked.wait();
#pragma unroll
    for (int s = 0; s < SLOTS; ++s)
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        const N found = asked[s * HELD + k];
#pragma unroll
        for (int i = 0; i < N::COUNT; ++i) total[k][i] += ptx::to_float(found.number[i]);
      }
  }
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    const int v = begin + 32 * k;
    if (v >= vectors) continue;
    N result;
#pragma unroll
    for (int i = 0; i < N::COUNT; ++i) result.number[i] = rounded<T>(total[k][i]);
    static_cast<Vector*>(to)[sum * vectors + v] = result.vector;
  }
}

}  // namespace jdg
