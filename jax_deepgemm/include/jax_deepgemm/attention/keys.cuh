// Tiles of KEYS keys and their values, which a warp copies for itself from the pages of a sequence, and takes
// apart into operands of mma.
//
// Rows of a tile are keys, PITCH bytes each; a row's pieces of 16 bytes are swapped by the row's number so
// that ldmatrix reads eight rows from eight different groups of banks. Keys that nobody sees are zeros: a
// value that counts with weight 0 must not be NaN.
//
// E4M3 becomes bf16 or f16 in registers, exactly. What a lane gets then belongs to other columns than with
// elements of 16 bits, so columns of Q (see `query_column`), and of the result (`value_column`), are named in
// another order; a product over columns does not know the difference.
#pragma once

#include <jax_deepgemm/attention/work.cuh>
#include <jax_deepgemm/ptx/convert.cuh>
#include <jax_deepgemm/ptx/copy.cuh>
#include <jax_deepgemm/ptx/mma.cuh>

namespace jdg {

// Of K (D columns) or V (DV).
template <class Config, int COLUMNS>
struct TileShape {
  static constexpr int ELEMENT = Config::FP8 ? 1 : 2;
  static constexpr int ROW_BYTES = COLUMNS * ELEMENT, PIECES = ROW_BYTES / 16;
  static constexpr int PITCH = ROW_BYTES <= 64 ? 64 : align_up(ROW_BYTES, 128);
  static constexpr int BYTES = Config::KEYS * PITCH;
  static_assert(ROW_BYTES % 16 == 0, "rows are copied in 16 bytes");

  // Of piece `piece` of row `key`.
  __device__ __forceinline__ static u32 place(int key, int piece) {
    const int swap = PITCH == 64 ? key >> 1 & 3 : key & 7;
    return key * PITCH + (piece ^ swap) * 16;
  }
};

// The pages of a warp's next tiles, a page for every 16 keys, of 32 lanes one each; read long before they are
// needed.
template <class Config>
struct Pages {
  static constexpr int GROUPS = Config::KEYS / 16, TILES = 32 / GROUPS;

  const int* table;  // of the sequence
  int pages, first_key, end_key;
  int now, next, tile = 0;

  // Tile t of the warp has KEYS keys from first_key + t * WARPS * KEYS on.
  __device__ __forceinline__ Pages(const int* table, int pages, int first_key, int end_key)
      : table(table), pages(pages), first_key(first_key), end_key(end_key) {
    now = read(0);
    next = read(TILES);
  }
  __device__ __forceinline__ int read(int from_tile) const {
    const int lane = threadIdx.x % 32;
    const int key =
        first_key + (from_tile + lane / GROUPS) * (Config::WARPS * Config::KEYS) + lane % GROUPS * 16;
    if (lane >= TILES * GROUPS || key >= end_key) return -1;
    const int page = table[key / Config::PAGE];
    return page < pages ? page : -1;
  }
  // Negative: nobody sees these keys.
  __device__ __forceinline__ int of(int group) const {
    return __shfl_sync(0xFFFFFFFF, now, tile * GROUPS + group);
  }
  __device__ __forceinline__ void advance() {
    if (++tile < TILES) return;
    tile = 0;
    now = next;
    first_key += TILES * (Config::WARPS * Config::KEYS);
    next = read(TILES);
  }
};

// Starts copies of one tile. `heads` begins with the first page of the layer's head; pages are `stride` bytes
// apart.
template <class Config, int COLUMNS>
__device__ __forceinline__ void copy_tile(u32 to, const char* head, i64 stride,
                                          const int (&page)[Config::KEYS / 16], int first_key, int end_key) {
  using Shape = TileShape<Config, COLUMNS>;
  constexpr int ALL = Config::KEYS * Shape::PIECES;
  const int lane = threadIdx.x % 32;
  const char* group[Config::KEYS / 16];
#pragma unroll
  for (int g = 0; g < Config::KEYS / 16; ++g) {
    const int offset = (first_key + g * 16) % Config::PAGE;
    group[g] = head + max(page[g], 0) * stride + offset * Shape::ROW_BYTES;
  }
#pragma unroll
  for (int i = 0; i < ceil_div(ALL, 32); ++i) {
    const int at = i * 32 + lane, key = at / Shape::PIECES, piece = at % Shape::PIECES;
    if (ALL % 32 != 0 && at >= ALL) break;
    bool seen = first_key + key < end_key;
    const char* from = group[0];
#pragma unroll
    for (int g = 0; g < Config::KEYS / 16; ++g) {
      if (key / 16 == g) from = group[g], seen = seen && page[g] >= 0;
    }
    ptx::copy_async(to + Shape::place(key, piece), from + key % 16 * Shape::ROW_BYTES + piece * 16,
                    seen ? 16 : 0);
  }
}

// The column of Q that is number `half` (0, 1) of the pair that a lane holds for columns 2 c and 2 c + 1,
// then 8 + 2 c and 9 + 2 c (`upper`), of 16 columns.
template <class Config>
__device__ __forceinline__ int query_column(int c, bool upper) {
  return Config::FP8 ? 4 * c + 2 * upper : 2 * c + 8 * upper;
}

// The column of result tile `tile` (eight columns) that its column `n` is.
template <class Config>
__device__ __forceinline__ constexpr int value_column(int tile, int n) {
  return Config::FP8 ? tile / 2 * 16 + 2 * n + tile % 2 : tile * 8 + n;
}

template <class Config>
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if constexpr (Config::F16) {
    ptx::mma_f16(d, a, b);
  } else {
    ptx::mma_bf16(d, a, b);
  }
}

// scores[t] += Q K^T for the tile's keys 8 t ..
template <class Config>
__device__ __forceinline__ void score_tile(float (&scores)[Config::KEYS / 8][4],
                                           const u32 (&q)[Config::D / 16][4], u32 tile) {
  using Shape = TileShape<Config, Config::D>;
  const int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
  if constexpr (Config::FP8) {
    // A matrix is 8 keys x 16 columns: (first keys, piece), (next keys, piece), and those of the next piece.
#pragma unroll
    for (int g = 0; g < Config::KEYS / 16; ++g) {
#pragma unroll
      for (int piece = 0; piece < Config::D / 16; piece += 2) {
        const int own = smaller(piece + matrix / 2, Config::D / 16 - 1);
        u32 bytes[4];
        ptx::load_matrix_x4(bytes, tile + Shape::place(g * 16 + matrix % 2 * 8 + row, own));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          if (piece + m / 2 >= Config::D / 16) break;
          const u32 b[2] = {ptx::e4m3_bytes<Config::F16, 0, 1>(bytes[m]),
                            ptx::e4m3_bytes<Config::F16, 2, 3>(bytes[m])};
          multiply<Config>(scores[g * 2 + m % 2], q[piece + m / 2], b);
        }
      }
    }
  } else {
#pragma unroll
    for (int g = 0; g < Config::KEYS / 16; ++g) {
#pragma unroll
      for (int step = 0; step < Config::D / 16; ++step) {
        u32 b[4];
        ptx::load_matrix_x4(b, tile + Shape::place(g * 16 + matrix / 2 * 8 + row, step * 2 + matrix % 2));
        multiply<Config>(scores[g * 2], q[step], {b[0], b[1]});
        multiply<Config>(scores[g * 2 + 1], q[step], {b[2], b[3]});
      }
    }
  }
}

// sums += P V; weights[g]: of keys 16 g .. as the first operand of mma.
template <class Config>
__device__ __forceinline__ void add_values(float (&sums)[Config::DV / 8][4],
                                           const u32 (&weights)[Config::KEYS / 16][4], u32 tile) {
  using Shape = TileShape<Config, Config::DV>;
  const int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
#pragma unroll
  for (int g = 0; g < Config::KEYS / 16; ++g) {
    const int key = g * 16 + matrix % 2 * 8 + row;
    if constexpr (Config::FP8) {
#pragma unroll
      for (int piece = 0; piece < Config::DV / 16; piece += 2) {
        const int own = smaller(piece + matrix / 2, Config::DV / 16 - 1);
        u32 bytes[4];
        ptx::load_matrix_x4_transposed(bytes, tile + Shape::place(key, own));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (piece + half >= Config::DV / 16) break;
          const u32 low = bytes[half * 2], high = bytes[half * 2 + 1];
          multiply<Config>(
              sums[(piece + half) * 2], weights[g],
              {ptx::e4m3_bytes<Config::F16, 0, 2>(low), ptx::e4m3_bytes<Config::F16, 0, 2>(high)});
          multiply<Config>(
              sums[(piece + half) * 2 + 1], weights[g],
              {ptx::e4m3_bytes<Config::F16, 1, 3>(low), ptx::e4m3_bytes<Config::F16, 1, 3>(high)});
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < Config::DV / 16; ++step) {
        u32 b[4];
        ptx::load_matrix_x4_transposed(b, tile + Shape::place(key, step * 2 + matrix / 2));
        multiply<Config>(sums[step * 2], weights[g], {b[0], b[1]});
        multiply<Config>(sums[step * 2 + 1], weights[g], {b[2], b[3]});
      }
    }
  }
}

}  // namespace jdg
