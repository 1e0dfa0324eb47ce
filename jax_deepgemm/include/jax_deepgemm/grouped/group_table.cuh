// Which rows (or which range of k) belong to which group, and which tiles compute them: read from device
// memory at the start of every kernel, so that the host never knows it.
//
// clang-format off
//   group_sizes (or starts | ends | groups)  --one warp: clamp, scan-->  table in shared memory
//
//   table[i] = {start, end, first tile, group}      i = 0 .. SEGMENTS - 1
//   rows [start, end) hold the segment's numbers, rows [end, next start) are zero     (rows in groups)
//   k in [start, end) is summed                                                       (k in groups)
// clang-format on
//
// Whatever the device memory holds, ranges stay inside the operand: negative sizes count as 0, starts and
// ends are clamped. A tile is found by binary search over `first tile`.
#pragma once

#include <jax_deepgemm/gemm/epilogue.cuh>
#include <jax_deepgemm/ptx/grid.cuh>

namespace jdg {

enum class Grouping {
  kRows,        // rows of A and D in one matrix; group i multiplies B[i]
  kMaskedRows,  // A[i], B[i], D[i] for each group; the first `sizes[i]` rows count
  kInner,       // k of both operands in one matrix; D[i] sums the group's range
  kMaskedInner  // A[i], B[i], D[i]; the first `sizes[i]` of k count
};

// What a grouped kernel is told beside GemmConfig (gemm/config.cuh); ops/grouped/sm90/source.py writes it.
// clang-format off
template <class C>
concept GroupedConfig = requires {
  C::GROUPING;   // Grouping: what the groups divide
  C::SEGMENTED;  // bool: whether `sizes` holds starts, ends and groups instead of sizes
  C::ZERO_ROWS;  // bool: whether rows of a masked group behind its last one are stored as zeros
  C::BIASED;     // bool: whether the epilogue with SwiGLU adds a bias first (gemm_grouped_swiglu.cuh)
  C::CHAINED;    // bool: whether the launch right before this one in its chain writes A and its scales, and
                 // nothing else that is read here (gemm_grouped.cuh)
};
// clang-format on

struct Groups {
  const int* sizes;   // [total], or with SEGMENTED: starts[total], ends[total], groups[total]
  const int* offset;  // [1] index of the first of this device's groups; nullptr: 0
  int total;          // groups in `sizes`
  int here;           // groups of this device
  int shared;         // kMaskedRows: B has this many groups and is used by i % shared
  int extent;         // rows or k of the operand: where ranges are clamped
};

struct Segment {
  int start, end, first_tile, group;
};

template <class C>
struct GroupTable {
  static constexpr bool kRowsInGroups = C::GROUPING == Grouping::kRows;
  static constexpr bool kMasked =
      C::GROUPING == Grouping::kMaskedRows || C::GROUPING == Grouping::kMaskedInner;
  static constexpr bool kInner = C::GROUPING == Grouping::kInner || C::GROUPING == Grouping::kMaskedInner;
  u32 base;
  int segments, tiles;

  __device__ __forceinline__ u32 at(int i) const { return base + i * 16; }
  __device__ __forceinline__ Segment operator[](int i) const {
    const float4 v = ptx::load_shared_4(at(i));
    return {__float_as_int(v.x), __float_as_int(v.y), __float_as_int(v.z), __float_as_int(v.w)};
  }
  __device__ __forceinline__ int word(int i, int which) const {
    return __float_as_int(ptx::load_shared(at(i) + which * 4));
  }

  // The last segment whose first tile is not after `tile`.
  __device__ __forceinline__ int find(int tile) const {
    int low = 0, high = segments - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (word(middle, 2) <= tile)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

// Neighbouring segments that a lane reads together and sums by itself, so that a warp's sum, which costs the
// latency of ten shuffles, is needed once for all of them.
template <class C>
constexpr int kRun = smaller(8, ceil_div(C::TABLE_BYTES / 16 - 3, 32));

// Inclusive sum over a warp; of values up to 2^31, so it does not fit an int.
__device__ __forceinline__ i64 scan(i64 sum) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const i64 below = __shfl_up_sync(0xFFFFFFFF, sum, step);
    if (threadIdx.x % 32 >= step) sum += below;
  }
  return sum;
}

__device__ __forceinline__ int clamp(i64 v, int low, int high) {
  return static_cast<int>(v < low ? low : v > high ? high : v);
}

// What a group takes of k or of the rows: its size, or whole blocks.
template <class C>
__device__ __forceinline__ int room(int size) {
  return C::WHOLE_BLOCKS ? ceil_div(size, 128) * 128 : size;
}

// A size, in a chain past L1, which may hold what was there before.
template <class C>
__device__ __forceinline__ int load_size(const int* at) {
  return C::CHAINED ? ptx::load_shared_by_blocks(at) : *at;
}

// Start and end of every segment, by one warp. Segment 0 of kRows is what lies before the first group of this
// device: zeros.
template <class C>
__device__ __forceinline__ int read_segments(const Groups& g, u32 base) {
  using Table = GroupTable<C>;
  const int lane = threadIdx.x % 32, head = Table::kRowsInGroups ? 1 : 0;
  int size[kRun<C>];
  const auto load_sizes = [&](int first) {
#pragma unroll
    for (int b = 0; b < kRun<C>; ++b) {
      const int i = first + lane * kRun<C> + b;
      size[b] = i < g.total ? load_size<C>(g.sizes + i) : 0;
    }
  };
  if constexpr (!C::SEGMENTED && !Table::kMasked) load_sizes(0);  // on their way together with the offset
  const i64 offset = g.offset ? *g.offset : 0;  // whatever it is: groups that are not there are empty
  const int count = C::SEGMENTED && Table::kRowsInGroups ? g.total : g.here;
  int last = 0;
  if constexpr (C::SEGMENTED) {
    for (int i = lane; i < count; i += 32) {
      const i64 from = Table::kRowsInGroups ? i : i + offset;
      const bool there = from >= 0 && from < g.total;
      const int start = there ? clamp(g.sizes[from], 0, g.extent) : g.extent;
      const int end = there ? clamp(g.sizes[g.total + from], start, g.extent) : g.extent;
      const i64 group = Table::kRowsInGroups ? g.sizes[2 * g.total + from] - offset : i;
      const bool mine = group >= 0 && group < g.here;
      ptx::store_shared_4(base + (head + i) * 16, start, end, 0, mine ? static_cast<int>(group) : -1);
    }
  } else if constexpr (Table::kMasked) {
    for (int i = lane; i < count; i += 32)
      ptx::store_shared_4(base + i * 16, 0, clamp(g.sizes[i], 0, g.extent), 0, i % g.shared);
  } else {
    // Groups that `sizes` does not have are empty, where they belong.
    for (int i = lane; i < count; i += 32) {
      const int place = i + offset < 0 ? 0 : g.extent;
      ptx::store_shared_4(base + (head + i) * 16, place, place, 0, i);
    }
    __syncwarp();
    for (int first = 0; first < g.total; first += 32 * kRun<C>) {
      if (first > 0) load_sizes(first);
      i64 mine = 0;
#pragma unroll
      for (int b = 0; b < kRun<C>; ++b) mine += room<C>(size[b] = clamp(size[b], 0, g.extent));
      i64 sum = last + scan(mine) - mine;
#pragma unroll
      for (int b = 0; b < kRun<C>; ++b) {
        const int i = first + lane * kRun<C> + b, start = clamp(sum, 0, g.extent);
        const i64 group = i - offset;
        if (i < g.total && group >= 0 && group < count)
          ptx::store_shared_4(base + (head + static_cast<int>(group)) * 16, start,
                              clamp(sum + size[b], 0, g.extent), 0, static_cast<int>(group));
        sum += room<C>(size[b]);
      }
      last = __shfl_sync(0xFFFFFFFF, clamp(sum, 0, g.extent), 31);
    }
  }
  if (head && lane == 0) ptx::store_shared_4(base, 0, 0, 0, -1);
  if (lane == 0) ptx::store_shared_4(base + (head + count) * 16, g.extent, g.extent, 0, -1);
  __syncwarp();
  return head + count;
}

// Number of rows that tiles of segment i cover.
template <class C>
__device__ __forceinline__ int covered_rows(const GroupTable<C>& table, int i, const Extents& p) {
  if constexpr (GroupTable<C>::kRowsInGroups) return max(table.word(i + 1, 0) - table.word(i, 0), 0);
  if constexpr (C::GROUPING == Grouping::kMaskedRows) return C::ZERO_ROWS ? p.m : table.word(i, 1);
  return p.m;
}

// By all threads of the block; the table, at `base`, is complete behind the barrier at its end.
template <class C>
__device__ __forceinline__ GroupTable<C> make_table(const Groups& g, const Extents& p, u32 base) {
  GroupTable<C> table{base, 0, 0};
  const u32 totals = base + C::TABLE_BYTES - 16;
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    table.segments = read_segments<C>(g, table.base);
    constexpr int kMostTiles = 0x7FFFFFFF;
    constexpr int kHead = GroupTable<C>::kRowsInGroups ? 1 : 0;
    const int col_tiles = ceil_div(p.n, C::COLS);
    const auto tiles_of = [&](int i) { return ceil_div(covered_rows(table, i, p), C::ROWS) * col_tiles; };
    int before = kHead ? tiles_of(0) : 0;
    for (int first = kHead; first < table.segments; first += 32 * kRun<C>) {
      int tiles[kRun<C>];
      i64 mine = 0;
#pragma unroll
      for (int b = 0; b < kRun<C>; ++b) {
        const int i = first + lane * kRun<C> + b;
        mine += tiles[b] = i < table.segments ? tiles_of(i) : 0;
      }
      i64 sum = before + scan(mine) - mine;
#pragma unroll
      for (int b = 0; b < kRun<C>; ++b) {
        const int i = first + lane * kRun<C> + b;
        if (i < table.segments)
          ptx::store_shared(table.at(i) + 8, __int_as_float(clamp(sum + tiles[b], 0, kMostTiles) - tiles[b]));
        sum += tiles[b];
      }
      before = __shfl_sync(0xFFFFFFFF, clamp(sum, 0, kMostTiles), 31);
    }
    if (lane == 0) ptx::store_shared_4(totals, table.segments, before, 0, 0);
  }
  __syncthreads();
  const float4 v = ptx::load_shared_4(totals);
  table.segments = __float_as_int(v.x), table.tiles = __float_as_int(v.y);
  return table;
}

}  // namespace jdg
