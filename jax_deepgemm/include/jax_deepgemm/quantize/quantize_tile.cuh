// A block of threads turns tiles of numbers, which it holds in registers, into FP8 with scales.
//
// clang-format off
//   tiles            one of 128 x 128, or two, or where 1x128 scales are all several lower ones side by side
//   a thread's part  of each tile: ROWS rows from (2 w + l / 16) * ROWS, 8 columns from l % 16 * 8,
//                    in lane l of warp w
//
//   1x128 scales     amax of a row of a tile: 16 lanes exchange and halve their maxima, ROWS of each tile,
//                    until lane l knows the l-th (of tile l % TILES), computes its scale, and hands the
//                    inverse round
//   128x1 scales     amax of a column: of each warp through shared memory; 128 threads compute the scales
//   128x128 scales   one maximum of everything; also of the transposed copy alone (SQUARE_T)
//
//   values           8 bytes per thread, 16 lanes fill a line of 128
//   transposed       through shared memory [column][row], where 8-byte words of a column are exchanged by
//                    w ^ column / 8, so that neither side has bank conflicts; then as above
// clang-format on
//
// Arithmetic is that of ops/quantize/reference.py, bit for bit: amax over the finite numbers, at least
// MIN_AMAX and what makes the scale a normal number; scale = amax / FP8_MAX and its inverse, correctly
// rounded; value = round(x * inverse), where subnormal x count as zeros.
//
// An infinity does not count in amax, and FP8 conversion would saturate it: a thread that finds one as its
// maximum goes over its numbers once more (E4M3 has no infinity, so there it becomes NaN). NaN needs no care:
// max.f32 passes it by.
#pragma once

#include <jax_deepgemm/quantize/chunk.cuh>

namespace jdg {

enum class Scales { kRow, kColumn, kBlock };

// What a kernel is told at compile time; ops/quantize/sm90.py writes it as `struct Config`.
// clang-format off
template <class C>
concept QuantizeConfig = requires {
  typename C::In;   // elements that are read: bf16, f16 or float
  typename C::Fp8;  // what is written: E4m3 or E5m2
  C::SCALES;        // Scales: what shares a scale, 128 elements of a row or of a column, or a whole tile
  C::TILES;         // tiles that a block of threads holds at once
  C::HEIGHT;        // rows of a tile: 128, or fewer where 1x128 scales are all
  C::ROWS;          // rows of a tile of which a thread holds 8 columns each
  C::MIN_AMAX;      // what a maximum counts as at least
  C::UE8M0;         // bool: whether scales are powers of two
  C::TRANSPOSED;    // bool: whether a transposed copy is written too
  C::SQUARE_T;      // bool: whether all of a tile share a scale in it, where values have scales of rows
  C::LIMITED;       // bool: whether rows from a number on that is read from memory count as zeros
  C::BLOCKED;       // bool: whether a table lists the rows of each tile (RowBlock)
  C::INDEXED;       // bool: whether rows are taken by an index (quantize)
  C::WEIGHTED;      // bool: whether rows have weights (swiglu)
  C::ALIGNED;       // bool: whether rows have a multiple of 8 columns, so that 8 numbers are moved at once
  C::ALIGNED_T;     // bool: the same of the transposed copy's rows
};
// clang-format on

constexpr int kTile = 128;  // rows and columns of a tile, unless it is lower, and elements per scale
constexpr u32 kEveryLane = 0xFFFFFFFF;

// Rows that a tile has where a table says so: ops/quantize/blocks.py makes it. Tiles without any stand at
// its end.
struct alignas(16) RowBlock {
  int first, rows, counted, group;
};

// Which rows count: all of them (limit and blocks are null), those before *limit, or what each block says.
struct CountedRows {
  const int* limit;
  const RowBlock* blocks;
  int batched_limit;
};

// Where a tile is, and the thread's first number in it.
struct Place {
  int batch, tile_row, tile_col, row, col;
  int tile_row_t;  // the tile's first row in the transposed copy
  int end;         // the tile's rows are those before it, ...
  int counted;     // ... and those from here on count as zeros

  __device__ __forceinline__ Place moved(int cols) const {
    Place at = *this;
    at.tile_col += cols;
    at.col += cols;
    return at;
  }
  __device__ __forceinline__ bool empty() const { return end <= tile_row; }

  // The index-th place, C::HEIGHT rows high and `tiles` tiles wide; neighbours in a row follow each other.
  template <class C>
  __device__ __forceinline__ static Place of(int index, int rows, int cols, int tiles = 1) {
    const u32 across = max(ceil_div(cols, tiles * kTile), 1), down = max(ceil_div(rows, C::HEIGHT), 1);
    const u32 line = static_cast<u32>(index) / across;
    Place at;
    at.batch = C::BLOCKED ? 0 : line / down;
    at.tile_row = at.tile_row_t = (line - at.batch * down) * C::HEIGHT;
    at.tile_col = (index - line * across) * tiles * kTile;
    at.row = at.tile_row + static_cast<int>(threadIdx.x) / 16 * C::ROWS;
    at.col = at.tile_col + static_cast<int>(threadIdx.x) % 16 * kWide;
    at.end = at.counted = rows;
    return at;
  }

  // With BLOCKED, `of` counts tiles only: the rows of this one.
  template <class C>
  __device__ __forceinline__ Place within(const RowBlock& block) const {
    static_assert(C::BLOCKED && C::HEIGHT == kTile);
    Place at = *this;
    at.row += block.first - at.tile_row;
    at.tile_row = block.first;
    at.end = block.first + block.rows;
    at.counted = block.first + block.counted;
    return at;
  }

  template <class C>
  __device__ __forceinline__ RowBlock listed(const RowBlock* blocks) const {
    return blocks[tile_row_t / kTile];
  }
};

// What is written of one matrix of `rows` by `cols`.
struct Quantized {
  u8* values;       // [rows, cols]
  float* scales;    // its grid
  u8* values_t;     // [cols, rows_t], or null
  float* scales_t;  // [ceil(rows_t / 128), cols], with SQUARE_T [.., ceil(cols / 128)], or null
  int rows, cols, rows_t;

  template <class C>
  __device__ __forceinline__ Quantized of_batch(int batch, int scales_per_matrix) const {
    const i64 size = static_cast<i64>(rows) * cols * batch;
    const i64 size_of_t = static_cast<i64>(rows_t) * cols * batch;
    const int across_t = C::SQUARE_T ? ceil_div(cols, kTile) : cols;
    const i64 grid_t = static_cast<i64>(ceil_div(rows_t, kTile)) * across_t * batch;
    return {values + size,
            scales + static_cast<i64>(scales_per_matrix) * batch,
            values_t + size_of_t,
            scales_t + grid_t,
            rows,
            cols,
            rows_t};
  }
};

// C: Fp8, UE8M0, MIN_AMAX, SCALES (of values), TRANSPOSED, TILES (that a block holds at once), HEIGHT (rows
// of a tile), ROWS (of a thread in each), ALIGNED (8-byte stores of values are), ALIGNED_T (those of
// values_t).
template <class C>
struct TileShared {
  static_assert(C::HEIGHT == kTile || (C::SCALES == Scales::kRow && !C::TRANSPOSED));
  static constexpr int kWarps = C::HEIGHT / C::ROWS / 2;
  static constexpr bool kBlock = C::SCALES == Scales::kBlock;
  alignas(16) u64 words[C::TRANSPOSED ? C::TILES * kTile * kTile / 8 : 1];
  alignas(16) float maxima[C::TILES][kBlock ? 1 : kWarps][kTile];
  alignas(16) float inverses[C::TILES][kTile];
};

template <class C>
__device__ __forceinline__ float scale_of(float amax) {
  constexpr float kNormal = C::Fp8::kMax * 0x1p-126f, kLeast = C::MIN_AMAX > kNormal ? C::MIN_AMAX : kNormal;
  const float scale = ptx::div_rn(fmaxf(amax, kLeast), C::Fp8::kMax);
  if constexpr (!C::UE8M0) return scale;
  const u32 bits = __float_as_uint(scale);  // positive and normal
  return __uint_as_float((bits + 0x7FFFFF) & 0x7F800000);
}

// COUNT values in each of 16 lanes -> lane l has the combination over them of value l % COUNT.
template <int COUNT, class Combine>
__device__ __forceinline__ float combine_lanes(float (&v)[COUNT], Combine combine) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = lane & half ? v[i + half] : v[i], give = lane & half ? v[i] : v[i + half];
      v[i] = combine(keep, __shfl_xor_sync(kEveryLane, give, half));
    }
  }
#pragma unroll
  for (int half = COUNT; half < 16; half *= 2) v[0] = combine(v[0], __shfl_xor_sync(kEveryLane, v[0], half));
  return v[0];
}

// The other direction: lane l holds value l % COUNT.
template <int COUNT>
__device__ __forceinline__ void spread_lanes(float (&v)[COUNT], float mine) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) v[j] = __shfl_sync(kEveryLane, mine, (threadIdx.x & 16) | j);
}

template <int ROWS>
struct Maxima {
  float row[ROWS], col[kWide];
};

template <bool FINITE, int ROWS, class T>
__device__ __forceinline__ void find_maxima(Maxima<ROWS>& of, const Chunk<T> (&x)[ROWS]) {
#pragma unroll
  for (int j = 0; j < ROWS; ++j) of.row[j] = 0.0f;
#pragma unroll
  for (int i = 0; i < kWide; ++i) of.col[i] = 0.0f;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      float v = fabsf(x[j][i]);
      if (FINITE && v == kInfinity) v = 0.0f;
      of.row[j] = fmaxf(of.row[j], v);
      of.col[i] = fmaxf(of.col[i], v);
    }
  }
}

// The same with infinities, two numbers at a time; a maximum may be NaN where all are.
template <int ROWS, class T>
__device__ __forceinline__ void find_paired_maxima(Maxima<ROWS>& of, const Chunk<T> (&x)[ROWS]) {
  using Pairs = Chunk<T>;
  u32 cols[kWide / 2];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    u32 row = x[j].pairs[0];
#pragma unroll
    for (int i = 1; i < kWide / 2; ++i) row = Pairs::larger(row, x[j].pairs[i]);
    of.row[j] = fmaxf(fabsf(Pairs::unpacked(row, 0)), fabsf(Pairs::unpacked(row, 1)));
#pragma unroll
    for (int i = 0; i < kWide / 2; ++i) cols[i] = j ? Pairs::larger(cols[i], x[j].pairs[i]) : x[0].pairs[i];
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) of.col[i] = fabsf(Pairs::unpacked(cols[i / 2], i % 2));
}

template <class C, class T>
__device__ __forceinline__ void find_finite_maxima(Maxima<C::ROWS> (&of)[C::TILES],
                                                   Chunk<T> (&x)[C::TILES][C::ROWS]) {
  float top = 0.0f;
#pragma unroll
  for (int tile = 0; tile < C::TILES; ++tile) {
    if constexpr (is_same<T, float>)
      find_maxima<false>(of[tile], x[tile]);
    else
      find_paired_maxima(of[tile], x[tile]);
#pragma unroll
    for (int j = 0; j < C::ROWS; ++j) top = fmaxf(top, of[tile].row[j]);
  }
  if (top != kInfinity) return;
#pragma unroll
  for (int tile = 0; tile < C::TILES; ++tile) {
    if constexpr (!C::Fp8::kHasInfinity) {
#pragma unroll
      for (int j = 0; j < C::ROWS; ++j) x[tile][j].infinities_to_nan();
    }
    find_maxima<true>(of[tile], x[tile]);
  }
}

template <int ROWS, class T>
__device__ __forceinline__ void forget(Chunk<T> (&x)[ROWS]) {
#pragma unroll
  for (int j = 0; j < ROWS; ++j) x[j].forget();
}

// Eight bytes of a line, of which `left` are inside.
template <bool ALIGNED>
__device__ __forceinline__ void store_bytes(u8* at, uint2 v, int left) {
  if constexpr (ALIGNED) {
    if (left > 0) *reinterpret_cast<uint2*>(at) = v;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) at[i] = static_cast<u8>((i < 4 ? v.x : v.y) >> i % 4 * 8);
  }
}

// The inverses of the thread's columns, or of the block. At once, as stores to shared memory keep the
// compiler from moving loads over them.
template <bool BLOCK>
__device__ __forceinline__ void column_inverses(float (&of)[kWide], float block,
                                                const float (&inverses)[kTile], const Place& at) {
  const float* mine = inverses + (at.col - at.tile_col);
#pragma unroll
  for (int i = 0; i < kWide; i += 4) {
    float4 four = {block, block, block, block};
    if constexpr (!BLOCK) four = *reinterpret_cast<const float4*>(mine + i);
    of[i] = four.x, of[i + 1] = four.y, of[i + 2] = four.z, of[i + 3] = four.w;
  }
}

template <class C, class T>
__device__ __forceinline__ void store_values(const Chunk<T> (&x)[C::ROWS], const float (&row)[C::ROWS],
                                             float block, const float (&inverses)[kTile], const Quantized& to,
                                             const Place& at) {
  u8* line = to.values + static_cast<i64>(at.row) * to.cols + at.col;
  float col[kWide];
  column_inverses<C::SCALES != Scales::kColumn>(col, block, inverses, at);
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j, line += to.cols) {
    float v[kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = ptx::mul_ftz(x[j][i], C::SCALES == Scales::kRow ? row[j] : col[i]);
    const uint2 bytes = {pack_four<typename C::Fp8>(v[0], v[1], v[2], v[3]),
                         pack_four<typename C::Fp8>(v[4], v[5], v[6], v[7])};
    if (at.row + j < at.end) store_bytes<C::ALIGNED>(line, bytes, to.cols - at.col);
  }
}

// The scales and inverses of the thread's rows in each tile. Neighbouring lanes have neighbouring tiles, so
// that scales that share a sector of memory are stored at once.
template <class C>
__device__ __forceinline__ void row_scales(float (&inverse)[C::TILES][C::ROWS],
                                           const Maxima<C::ROWS> (&maxima)[C::TILES], const Quantized& to,
                                           const Place& at, int apart) {
  float v[C::ROWS * C::TILES];
#pragma unroll
  for (int i = 0; i < C::ROWS * C::TILES; ++i) v[i] = maxima[i % C::TILES].row[i / C::TILES];
  const float scale = scale_of<C>(combine_lanes(v, [](float a, float b) { return fmaxf(a, b); }));
  const int lane = threadIdx.x % 16, row = at.row + lane / C::TILES;
  const int across = ceil_div(to.cols, kTile), tile = (at.tile_col + lane % C::TILES * apart) / kTile;
  const bool there = C::TILES == 1 || tile < across;
  if (lane < C::ROWS * C::TILES && row < at.end && there)
    to.scales[static_cast<i64>(row) * across + tile] = scale;
  spread_lanes(v, ptx::rcp_rn(scale));
#pragma unroll
  for (int i = 0; i < C::ROWS * C::TILES; ++i) inverse[i % C::TILES][i / C::TILES] = v[i];
}

// The maxima of a warp's columns, into maxima[column].
__device__ __forceinline__ void publish_columns(const float (&of)[kWide], float (&maxima)[kTile]) {
  const int lane = threadIdx.x % 32, first = lane % 16 * kWide;
  float half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float keep = lane & 16 ? of[i + 4] : of[i], give = lane & 16 ? of[i] : of[i + 4];
    half[i] = fmaxf(keep, __shfl_xor_sync(kEveryLane, give, 16));
  }
  *reinterpret_cast<float4*>(&maxima[first + lane / 16 * 4]) = {half[0], half[1], half[2], half[3]};
}

// The maximum of a warp's numbers.
template <int ROWS>
__device__ __forceinline__ float warp_maximum(const float (&rows)[ROWS]) {
  float amax = 0.0f;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) amax = fmaxf(amax, rows[j]);
#pragma unroll
  for (int half = 16; half > 0; half /= 2) amax = fmaxf(amax, __shfl_xor_sync(kEveryLane, amax, half));
  return amax;
}

// What the warps found of a tile becomes the maximum of a column, or SQUARE_T: of all.
template <class C>
__device__ __forceinline__ void publish_maxima(const Maxima<C::ROWS>& of,
                                               float (&maxima)[TileShared<C>::kWarps][kTile]) {
  const int warp = threadIdx.x / 32;
  if constexpr (C::SQUARE_T) {
    const float amax = warp_maximum(of.row);
    if (threadIdx.x % 32 == 0) maxima[warp][0] = amax;
  } else {
    publish_columns(of.col, maxima[warp]);
  }
}

// The scales of a tile's columns into `scales` [row of tiles, cols], and their inverses; `line` is the
// thread's column. SQUARE_T: their one scale into [row of tiles, tiles].
template <class C>
__device__ __forceinline__ void column_scales(float* scales, TileShared<C>& shared, const Quantized& to,
                                              const Place& at, int tile, int line) {
  float amax = 0.0f;
#pragma unroll
  for (int w = 0; w < TileShared<C>::kWarps; ++w)
    amax = fmaxf(amax, shared.maxima[tile][w][C::SQUARE_T ? 0 : line]);
  const float scale = scale_of<C>(amax);
  shared.inverses[tile][line] = ptx::rcp_rn(scale);
  if (at.tile_col + line >= to.cols || at.tile_row >= at.end) return;
  const i64 down = at.tile_row_t / kTile;
  if constexpr (!C::SQUARE_T)
    scales[down * to.cols + at.tile_col + line] = scale;
  else if (line == 0)
    scales[down * ceil_div(to.cols, kTile) + at.tile_col / kTile] = scale;
}

// The inverse of the tile's one scale.
template <class C>
__device__ __forceinline__ float block_scale(const float (&maxima)[C::ROWS], TileShared<C>& shared,
                                             const Quantized& to, const Place& at) {
  float amax = warp_maximum(maxima);
  if (threadIdx.x % 32 == 0) shared.maxima[0][0][threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < TileShared<C>::kWarps; ++w) amax = fmaxf(amax, shared.maxima[0][0][w]);
  const float scale = scale_of<C>(amax);
  if (threadIdx.x == 0 && at.tile_row < to.rows && at.tile_col < to.cols)
    to.scales[at.tile_row / kTile * ceil_div(to.cols, kTile) + at.tile_col / kTile] = scale;
  return ptx::rcp_rn(scale);
}

// The values of a tile into shared memory, [column][row].
template <class C, class T>
__device__ __forceinline__ void transpose(const Chunk<T> (&x)[C::ROWS], float block,
                                          const float (&inverses)[kTile], u8* tile, const Place& at) {
  const int first = at.col - at.tile_col, group = first / kWide, rows = at.row - at.tile_row;
  float col[kWide];
  column_inverses<C::SCALES == Scales::kBlock>(col, block, inverses, at);
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    u8* const word = tile + (first + i) * kTile + ((rows / 8) ^ group) * 8 + rows % 8;
    float v[C::ROWS];
#pragma unroll
    for (int j = 0; j < C::ROWS; ++j) v[j] = ptx::mul_ftz(x[j][i], col[i]);
    const u32 low = pack_four<typename C::Fp8>(v[0], v[1], v[2], v[3]);
    if constexpr (C::ROWS == 8)
      *reinterpret_cast<uint2*>(word) = {low, pack_four<typename C::Fp8>(v[4], v[5], v[6], v[7])};
    else
      *reinterpret_cast<u32*>(word) = low;
  }
}

// store_values and transpose in one, of eight rows, so that each number is unpacked once.
template <class C, class T>
__device__ __forceinline__ void store_both(const Chunk<T> (&x)[C::ROWS], const float (&row)[C::ROWS],
                                           const float (&inverses)[kTile], u8* tile, const Quantized& to,
                                           const Place& at) {
  using Fp8 = typename C::Fp8;
  static_assert(C::ROWS == 8 && C::SCALES == Scales::kRow);
  const int first = at.col - at.tile_col, group = first / kWide, rows = at.row - at.tile_row;
  u8* line = to.values + static_cast<i64>(at.row) * to.cols + at.col;
  float col[kWide];
  column_inverses<false>(col, 1.0f, inverses, at);
  u32 turned[2][kWide];
#pragma unroll
  for (int j = 0; j < C::ROWS; j += 2) {
    float v[2][kWide];
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      v[0][i] = x[j][i], v[1][i] = x[j + 1][i];
      const u32 pair = Fp8::pack(ptx::mul_ftz(v[0][i], col[i]), ptx::mul_ftz(v[1][i], col[i]));
      if (j % 4 == 0)
        turned[j / 4][i] = pair;
      else
        turned[j / 4][i] |= pair << 16;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k, line += to.cols) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) v[k][i] = ptx::mul_ftz(v[k][i], row[j + k]);
      const uint2 bytes = {pack_four<Fp8>(v[k][0], v[k][1], v[k][2], v[k][3]),
                           pack_four<Fp8>(v[k][4], v[k][5], v[k][6], v[k][7])};
      if (at.row + j + k < at.end) store_bytes<C::ALIGNED>(line, bytes, to.cols - at.col);
    }
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i)
    *reinterpret_cast<uint2*>(tile + (first + i) * kTile + ((rows / 8) ^ group) * 8) = {turned[0][i],
                                                                                        turned[1][i]};
}

template <class C>
__device__ __forceinline__ void store_transposed(const u8* tile, const Quantized& to, const Place& at) {
  constexpr int kStep = kTile / C::ROWS;  // columns that the block stores at a time
  const int part = threadIdx.x % 16, left = to.rows_t - at.tile_row_t - part * 8;
  const int first = threadIdx.x / 16;
  u8* line_at = to.values_t + static_cast<i64>(at.tile_col + first) * to.rows_t + at.tile_row_t + part * 8;
#pragma unroll
  for (int i = 0; i < kTile; i += kStep, line_at += static_cast<i64>(kStep) * to.rows_t) {
    const int line = i + first;
    const uint2 bytes = *reinterpret_cast<const uint2*>(tile + line * kTile + (part ^ (line / kWide)) * 8);
    if (at.tile_col + line < to.cols) store_bytes<C::ALIGNED_T>(line_at, bytes, left);
  }
}

// Everything that is asked of a block's tiles. All its threads call it; calls may follow each other. The
// tiles are `apart` columns from each other.
//
//   maxima -> shared | barrier | column scales by some warps, values with row scales by all | barrier |
//   transposed values -> shared | barrier | -> memory
template <class C, class T>
__device__ __forceinline__ void quantize_tiles(Chunk<T> (&x)[C::TILES][C::ROWS], TileShared<C>& shared,
                                               const Quantized& to, const Place& at, int apart) {
  constexpr bool kRows = C::SCALES == Scales::kRow, kBlock = C::SCALES == Scales::kBlock;
  constexpr bool kColumns = C::SCALES == Scales::kColumn || (C::TRANSPOSED && kRows);
  static_assert(!kBlock || C::TILES == 1);
  static_assert(!C::SQUARE_T || (C::TRANSPOSED && kRows));
  Maxima<C::ROWS> maxima[C::TILES];
  float block = 1.0f, row[C::TILES][C::ROWS];
  find_finite_maxima<C>(maxima, x);
  if constexpr (kBlock) block = block_scale<C>(maxima[0].row, shared, to, at);
  if constexpr (kColumns) {
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile) publish_maxima<C>(maxima[tile], shared.maxima[tile]);
  }
  if constexpr (kColumns) {
    __syncthreads();
    const int mine = threadIdx.x / kTile;  // 256 threads compute the scales of two tiles
    if (mine < C::TILES)
      column_scales<C>(kRows ? to.scales_t : to.scales, shared, to, at.moved(mine * apart), mine,
                       threadIdx.x % kTile);
  }
  if constexpr (C::SCALES == Scales::kColumn) __syncthreads();
  if constexpr (kRows) row_scales<C>(row, maxima, to, at, apart);
  constexpr bool kBoth = kRows && C::TRANSPOSED && C::ROWS == 8 && C::TILES == 1 && !is_same<T, float>;
  if constexpr (kBoth) {
    __syncthreads();
    forget(x[0]);
    store_both<C>(x[0], row[0], shared.inverses[0], reinterpret_cast<u8*>(shared.words), to, at);
  }
#pragma unroll
  for (int tile = 0; tile < C::TILES && !kBoth; ++tile) {
    forget(x[tile]);
    store_values<C>(x[tile], row[tile], block, shared.inverses[tile], to, at.moved(tile * apart));
  }
  if constexpr (C::TRANSPOSED) {
    u8* const words = reinterpret_cast<u8*>(shared.words);
    if constexpr (kColumns && !kBoth) __syncthreads();
#pragma unroll
    for (int tile = 0; tile < C::TILES && !kBoth; ++tile) {
      forget(x[tile]);
      transpose<C>(x[tile], block, shared.inverses[tile], words + tile * kTile * kTile,
                   at.moved(tile * apart));
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < C::TILES; ++tile)
      store_transposed<C>(words + tile * kTile * kTile, to, at.moved(tile * apart));
  }
}

}  // namespace jdg
