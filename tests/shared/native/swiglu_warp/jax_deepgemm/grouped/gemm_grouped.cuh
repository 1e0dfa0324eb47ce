// What gemm_grouped_swiglu.cuh takes of the kernel around it: one tile, whose place the test says.
#pragma once

#include <jax_deepgemm/ptx/fp8.cuh>

namespace jdg {

constexpr int kSlabRows = 8, kSlabBytes = 1024;
struct Operands {
  int k_blocks;
};
struct Groups {};
struct Extents {
  int m;
};
struct Tile {
  int row, col, batch, col_batch;
};
struct GroupTile {
  Tile tile;
  int rows_end, zeros_end;
};
struct TileRecord {
  int row;
};
template <class C>
struct GroupTable {
  static constexpr bool kRowsInGroups = C::ROWS_IN_GROUPS;
  GroupTile tile;
};
struct Ring {
  u32 smem;
};
template <class C>
struct MainLoop {
  float acc[1][C::COLS / 2];
  Ring ring;
};
template <class C>
constexpr int kParts = 1;
template <class C>
concept GemmConfig = true;
template <class C>
concept GroupedConfig = true;
template <class C>
struct GroupedTiles {
  const Operands in;
  const Groups groups;
  const Extents p;
  const void* d_map;
  void* d;
  const void* c;
  struct {
  } finish;
  GroupTable<C> table;
};

template <class C>
GroupTile group_tile(const GroupTable<C>& table, const TileRecord&, const Extents&, int) {
  return table.tile;
}
namespace ptx {
inline int load_shared_by_blocks(const int* at) { return *at; }
}  // namespace ptx
inline bool whole_warp(bool condition) { return __shfl_sync(0, condition, 0) != 0; }
template <class C>
u32 slabs_of_warp(u32 smem) {
  return smem + threadIdx.x / 32 * C::SLABS * kSlabBytes;
}
template <class C, class Tiles>
void persistent(Tiles) {}

}  // namespace jdg
