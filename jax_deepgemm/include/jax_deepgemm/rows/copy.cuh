// Rows copied to wherever they are wanted: to[position[i, s]] = from[i] for each s, and zeros in the rows of
// `to` whose index says that they are copies of none. Each row is read once, however many copies it has.
//
//   a warp   one piece of one row: COUNT vectors of a lane, all loaded before the first is stored, and stored
//            once for each copy. Then the same piece of its share of `to`: rows [i * share, (i + 1) * share),
//            of which it fills those that are copies of none
//   a grid   all pieces of some rows, then those of the next
//
// No shared memory, no barriers. index and position are inverse to each other, so no row of `to` has two
// writers; positions outside of `to` are skipped.
#pragma once

#include <jax_deepgemm/rows/take.cuh>

namespace jdg {

constexpr u32 kWholeWarp = 0xFFFFFFFF;

// slots: copies of each row at most; vectors: of a row; pieces: of a row; share: ceil(rows_to / rows_from).
template <int BYTES, int COUNT, int WARPS>
__device__ __forceinline__ void copy_rows(const void* from, const int* index, const int* position, void* to,
                                          int rows_from, int rows_to, int slots, int vectors, int pieces,
                                          int share) {
  using Vector = typename VectorOf<BYTES>::Type;
  const u32 group = blockIdx.x / static_cast<u32>(pieces), piece = blockIdx.x - group * pieces;
  const i64 row = static_cast<i64>(group) * WARPS + threadIdx.x / 32;
  if (row >= rows_from) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, begin = static_cast<int>(piece) * 32 * COUNT + lane;
  Vector* const write = static_cast<Vector*>(to);

  Vector held[COUNT];
  load_piece(held, static_cast<const Vector*>(from) + row * vectors, true, vectors, begin);
  for (int first = 0; first < slots; first += 32) {
    const int mine = first + lane < slots ? position[row * slots + first + lane] : -1;
    const int count = min(slots - first, 32);
    for (int s = 0; s < count; ++s) {
      const int target = __shfl_sync(kWholeWarp, mine, s);
      if (static_cast<u32>(target) < static_cast<u32>(rows_to))
        store_piece(held, write + static_cast<i64>(target) * vectors, vectors, begin);
    }
  }

  Vector zeros[COUNT] = {};
  for (int first = 0; first < share; first += 32) {
    const i64 mine = row * share + first + lane;
    const bool there = first + lane < share && mine < rows_to;
    const bool empty = there && static_cast<u32>(index[mine]) >= static_cast<u32>(rows_from);
    for (u32 left = __ballot_sync(kWholeWarp, empty); left != 0; left &= left - 1)
      store_piece(zeros, write + (row * share + first + __ffs(left) - 1) * vectors, vectors, begin);
  }
}

}  // namespace jdg
