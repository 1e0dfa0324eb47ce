// The main loop of every Hopper GEMM kernel here: what a consumer warpgroup does with the slots of the ring
// (ring.cuh). There are four: bf16_loop.cuh, fp8_loop.cuh (scales in quads), fp8_slices_loop.cuh (scales
// stored by block of k) and fp8_fine_loop.cuh (scales of 32 of k). A kernel drives them alike, tile by tile:
//
// clang-format off
//   begin(tile)    when the first slot of the tile is full. FP8 issues its product, so that the tensor
//                  core is busy during the epilogue of the tile before, which comes between begin and finish
//   finish(tile)   acc += rows tile * cols tile over the tile's range of k, scales applied; frees its slots
//   skip()         instead of finish(), for a tile without any k
//   drop()         instead of finish(), where there is no tile
// clang-format on
//
// Hazard: the FP8 tensor core accumulates with about 14 bits, hence the promotion to float32 after every
// 128 of k, or of 32 where these have scales of their own.
#pragma once

#include <jax_deepgemm/gemm/bf16_loop.cuh>
#include <jax_deepgemm/gemm/fp8_fine_loop.cuh>
#include <jax_deepgemm/gemm/fp8_loop.cuh>
#include <jax_deepgemm/gemm/fp8_slices_loop.cuh>

namespace jdg {

template <class C, Scale COL_SCALES = C::COL_SCALES>
struct LoopOf {
  using Type = Fp8Loop<C>;
};
template <class C>
struct LoopOf<C, Scale::kSlices> {
  using Type = SlicedLoop<C>;
};
template <class C>
struct LoopOf<C, Scale::kVector32> {
  using Type = FineLoop<C>;
};
template <class C>
struct LoopOf<C, Scale::kBlock32> {
  using Type = FineLoop<C>;
};
template <class C>
struct LoopOf<C, Scale::kNone> {
  using Type = Bf16Loop<C>;
};
template <class C>
using MainLoop = typename LoopOf<C>::Type;

}  // namespace jdg
