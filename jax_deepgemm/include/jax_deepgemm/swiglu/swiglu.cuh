// SwiGLU, or another activation, and its gradient, quantised as they are computed. h [rows, 2 i] = gate | up.
//
// clang-format off
//   act  = silu(gate) * up * weight[row]                              float32, then quantize_tile.cuh; for
//                                                                     other activations see activation.cuh
//   dh   = dact * weight[row] * [up * silu'(gate) | silu(gate)]       as [rows, 2 i]
//   dweight[row] = sum over i of dact * silu(gate) * up               the tiles' partial sums, added in order
//
// swiglu       one tile of act per block of 256 threads
// swiglu_grad  one tile of dh per block of 256 threads, for any i and any type
// swiglu_grad_pairs (16 bits, gate | up apart, i a multiple of 128)  the tile of dgate and that of dup of the same features
//              together, so that inputs are read and silu is computed once; 512 threads, one block per SM
//              walks over the tiles, and cp.async brings the next tile's inputs while this one is stored.
//              A thread copies what it will read itself: no barrier between.
//
//   shared memory of swiglu_grad_pairs:  gate, up, dact [4 rows][512 threads] of 16 bytes | TileShared
// clang-format on
#pragma once

#include <jax_deepgemm/swiglu/activation.cuh>

namespace jdg {

// What is read: h, the weights (or null), and for the gradient dact [rows, i].
template <class In, int HALVES>
struct SwigluInputs {
  const In* h;
  const float* weight;
  const In* dact;
  int batched_h, batched_weight, batched_dact;
  int width;  // i

  __device__ __forceinline__ SwigluInputs of_batch(int batch, int rows) const {
    const i64 before = static_cast<i64>(batch) * rows;
    SwigluInputs own = *this;
    own.h += before * batched_h * width * HALVES;
    own.dact += before * batched_dact * width;
    own.weight += before * batched_weight;
    return own;
  }
};

// weight[row]; 0 where the row does not count, as 0 * NaN is NaN.
template <class C>
__device__ __forceinline__ float weight_of(const float* weight, int row, int rows) {
  if constexpr (!C::WEIGHTED) return 1.0f;
  return row < rows ? weight[row] : 0.0f;
}

template <QuantizeConfig C, Activation A>
__device__ __forceinline__ void swiglu(const SwigluInputs<typename C::In, kHalves<A>>& in,
                                       const CountedRows& counted, const Quantized& all) {
  __shared__ TileShared<C> shared;
  using In = typename C::In;
  const Place tile = Place::of<C>(blockIdx.x, all.rows, all.cols);
  const Quantized to = all.of_batch<C>(tile.batch, scales_per_matrix<C>(all.rows, all.cols));
  const SwigluInputs<In, kHalves<A>> own = in.of_batch(tile.batch, all.rows);
  const Place at = with_rows<C>(tile, counted, all.rows);
  if (C::BLOCKED && at.empty()) return;
  const int rows = at.counted, left = in.width - at.col;

  const In* line =
      own.h + static_cast<i64>(at.row) * in.width * kHalves<A> + (A::INTERLEAVED ? 2 * at.col : at.col);
  Features<In, A> h[C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) h[j].template load<C::ALIGNED>(line, in.width, at.row + j < rows, left);
  Chunk<float> act[1][C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) {
    const float weight = weight_of<C>(own.weight, at.row + j, rows);
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      act[0][j].v[i] = Activated<A>(h[j].gate(i)).value * Activated<A>::factor(h[j].up(i)) * weight;
    act[0][j].forget();  // keeps the rows in order, and with them the registers few
  }
  quantize_tiles<C>(act, shared, to, at, 0);
}

// Sums of the thread's rows over the tile's columns, into parts [tile of columns, rows].
template <class C>
__device__ __forceinline__ void store_parts(float (&sums)[C::ROWS], float* parts, int tile, const Place& at,
                                            int rows) {
  const float sum = combine_lanes(sums, [](float a, float b) { return a + b; });
  const int lane = threadIdx.x % 16, row = at.row + lane;
  if (lane < C::ROWS && row < at.end) parts[static_cast<i64>(tile) * rows + row] = sum;
}

// Tiles that give parts: those of the gate's columns, or where gate and up take turns all.
template <Activation A>
__device__ __forceinline__ int summed_columns(int width) {
  return A::INTERLEAVED ? 2 * width : width;
}

template <Activation A>
__device__ __forceinline__ float* parts_of(float* parts, int batch, int width, int rows) {
  return parts + static_cast<i64>(batch) * ceil_div(summed_columns<A>(width), kTile) * rows;
}

template <QuantizeConfig C, Activation A>
__device__ __forceinline__ void swiglu_grad(const SwigluInputs<typename C::In, kHalves<A>>& in,
                                            const CountedRows& counted, const Quantized& all, float* parts) {
  __shared__ TileShared<C> shared;
  using In = typename C::In;
  const Place tile = Place::of<C>(blockIdx.x, all.rows, all.cols);
  const Quantized to = all.of_batch<C>(tile.batch, scales_per_matrix<C>(all.rows, all.cols));
  const SwigluInputs<In, kHalves<A>> own = in.of_batch(tile.batch, all.rows);
  const Place at = with_rows<C>(tile, counted, all.rows);
  if (C::BLOCKED && at.empty()) return;
  const int rows = at.counted, width = in.width;

  Chunk<float> dh[1][C::ROWS];
  float sums[C::ROWS];
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) {
    const int row = at.row + j;
    const float weight = weight_of<C>(own.weight, row, rows);
    const i64 line = static_cast<i64>(row) * width;
    GradientInputs<In, A> from;
    from.clear();
    const auto load = [&](int i, auto take) {  // of column at.col + i, which is one of feature f
      const int col = at.col + i, f = col < width ? col : col - width;
      if (row < rows && col < 2 * width) take(own.h + 2 * line + f, own.dact + line + f);
    };
    if constexpr (!kApart<A>) {
      from.template load<C::ALIGNED>(own.h + kHalves<A> * line, own.dact + line, width, at.col, row < rows);
    } else if constexpr (C::ALIGNED) {
      load(0, [&](const In* h, const In* d) {
        from.first.load(h), from.second.load(h + width), from.given.load(d);
      });
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        load(i, [&](const In* h, const In* d) {
          from.first.set(i, h[0]), from.second.set(i, h[width]), from.given.set(i, d[0]);
        });
    }
    sums[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const Activated<A> f(from.gate(i));
      const bool of_gate = from.of_gate(i, at.col, width);
      dh[0][j].v[i] =
          from.dact(i) * weight * (of_gate ? f.factor(from.up(i)) * f.slope() : f.by_up(from.up(i)));
      if (of_gate) sums[j] += from.dact(i) * f.value * f.factor(from.up(i));
    }
    if constexpr (!kApart<A> || Activated<A>::kClips) dh[0][j].forget();  // as above
  }
  if (C::WEIGHTED && at.tile_col < summed_columns<A>(width))
    store_parts<C>(sums, parts_of<A>(parts, at.batch, width, all.rows), at.tile_col / kTile, at, all.rows);
  quantize_tiles<C>(dh, shared, to, at, 0);
}

template <class C>
struct PairsShared {
  static constexpr int kThreads = kTile / C::ROWS * 16;
  uint4 slots[3][C::ROWS][kThreads];
  TileShared<C> tile;
};

template <class C, Activation A>
__device__ __forceinline__ void request_inputs(const SwigluInputs<typename C::In, kHalves<A>>& in,
                                               PairsShared<C>& shared, const Place& at, int all_rows) {
  const SwigluInputs<typename C::In, kHalves<A>> own = in.of_batch(at.batch, all_rows);
  const int rows = at.counted;
#pragma unroll
  for (int j = 0; j < C::ROWS; ++j) {
    const int row = at.row + j < rows ? at.row + j : 0, bytes = at.row + j < rows ? 16 : 0;
    const i64 line = static_cast<i64>(row) * in.width;
    ptx::copy_async(smem_address(&shared.slots[0][j][threadIdx.x]), own.h + 2 * line + at.col, bytes);
    ptx::copy_async(smem_address(&shared.slots[1][j][threadIdx.x]), own.h + 2 * line + in.width + at.col,
                    bytes);
    ptx::copy_async(smem_address(&shared.slots[2][j][threadIdx.x]), own.dact + line + at.col, bytes);
  }
  ptx::copy_async_commit();
}

// The places that a block of threads walks over: its own, then every gridDim.x-th. The entry of a table of
// rows is read one place ahead, so that nobody waits for it.
template <class C>
struct Walk {
  const CountedRows& counted;
  int rows, width, tiles, index;
  Place place;
  RowBlock block;

  __device__ __forceinline__ Walk(const CountedRows& counted, int rows, int width, int tiles)
      : counted(counted), rows(rows), width(width), tiles(tiles), index(blockIdx.x) {
    look_ahead();
  }
  __device__ __forceinline__ void look_ahead() {
    place = Place::of<C>(index, rows, width);
    if constexpr (C::BLOCKED)
      if (index < tiles) block = place.listed<C>(counted.blocks);
  }
  // The next place; an empty one if there is none.
  __device__ __forceinline__ Place next() {
    Place at = place;
    if (index >= tiles) {
      at.end = at.tile_row;
      return at;
    }
    if constexpr (C::BLOCKED)
      at = place.within<C>(block);
    else
      at = with_rows<C>(place, counted, rows);
    index += gridDim.x;
    look_ahead();
    return at;
  }
};

template <QuantizeConfig C, Activation A>
__device__ __forceinline__ void swiglu_grad_pairs(const SwigluInputs<typename C::In, kHalves<A>>& in,
                                                  const CountedRows& counted, const Quantized& all,
                                                  float* parts, int tiles) {
  static_assert(kApart<A>);
  extern __shared__ __align__(16) char memory[];
  PairsShared<C>& shared = *reinterpret_cast<PairsShared<C>*>(memory);
  Walk<C> walk(counted, all.rows, in.width, tiles);
  Place next = walk.next();
  if (!next.empty()) request_inputs<C, A>(in, shared, next, all.rows);
  while (!next.empty()) {
    const Place at = next;
    const Quantized to = all.of_batch<C>(at.batch, scales_per_matrix<C>(all.rows, all.cols));
    const SwigluInputs<typename C::In, kHalves<A>> own = in.of_batch(at.batch, all.rows);
    const int rows = at.counted;

    Chunk<float> dh[2][C::ROWS];  // of gate, of up
    float sums[C::ROWS];
    ptx::copy_async_wait();
#pragma unroll
    for (int j = 0; j < C::ROWS; ++j) {
      Chunk<typename C::In> gate, up, dact;
      gate.take(ptx::load_shared_16(smem_address(&shared.slots[0][j][threadIdx.x])));
      up.take(ptx::load_shared_16(smem_address(&shared.slots[1][j][threadIdx.x])));
      dact.take(ptx::load_shared_16(smem_address(&shared.slots[2][j][threadIdx.x])));
      const float weight = weight_of<C>(own.weight, at.row + j, rows);
      sums[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const Activated<A> f(gate[i]);
        const float scaled = dact[i] * weight;
        dh[0][j].v[i] = scaled * (f.factor(up[i]) * f.slope());
        dh[1][j].v[i] = scaled * f.by_up(up[i]);
        sums[j] += dact[i] * f.value * f.factor(up[i]);
      }
    }
    if (C::WEIGHTED)
      store_parts<C>(sums, parts_of<A>(parts, at.batch, in.width, all.rows), at.tile_col / kTile, at,
                     all.rows);
    next = walk.next();
    if (!next.empty()) request_inputs<C, A>(in, shared, next, all.rows);
    quantize_tiles<C>(dh, shared.tile, to, at, in.width);
  }
}

// sums[batch, row] = parts[batch, 0, row] + parts[batch, 1, row] + ..: in this order, so equal bits each
// time.
__device__ __forceinline__ void add_parts(const float* parts, float* sums, int tiles, int rows, int batches) {
  const i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= static_cast<i64>(rows) * batches) return;
  const float* at = parts + index / rows * tiles * rows + index % rows;
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) sum += at[static_cast<i64>(tile) * rows];
  sums[index] = sum;
}

}  // namespace jdg
