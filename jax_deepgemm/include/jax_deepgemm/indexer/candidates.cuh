// What a kernel of logits writes instead of all of them: those that are not below a bound of their token, and
// their keys.
//
// clang-format off
//   numbers, keys [tokens][warps][places]   each consumer warp has a segment of a token's row for itself, and
//                                           counts in registers: no atomics, and always the same bytes
//   counts        [tokens][3 pieces][warps] how many there are; zero before
// clang-format on
//
// The tiles of a token may be divided among blocks of threads. The piece with the first of them fills
// segments from the front, the one with the last of them, if that is another, from the back. Pieces in
// between have no place, and only count: who reads a count of a middle piece, or counts of front and back
// that are together more than there are places, knows that the segment is not whole.
#pragma once

#include <jax_deepgemm/indexer/config.cuh>

namespace jdg {

// Which logits are written, and where.
enum class Sink {
  kRows,        // all columns of the result
  kWindows,     // those in tiles; what lies between them stays as it is
  kCandidates,  // those that are not below their token's bound
};
template <class C>
constexpr Sink kSink = [] {
  if constexpr (requires { C::SINK; }) return C::SINK;
  return Sink::kRows;
}();
template <class C>
constexpr bool kHasCandidates = kSink<C> == Sink::kCandidates;

struct Candidates {
  const float* bounds;  // token i's at (i + 1) * pitch - 1
  float* numbers;
  int* keys;
  int* counts;
  int pitch, places;
};

enum Piece : int { kFirstPiece, kLastPiece, kMiddlePiece };
constexpr int kPieces = 3;
constexpr float kLeastNumber = -0x1.fffffep+127f;

// Where a piece's logits of one token go, as a thread knows it, of which every other lane has the same.
struct Segment {
  float bound;
  int first, count;
};

// A token's row of candidates stands in place of its address, the piece behind it.
struct CandidateToken {
  int row, piece;
  bool exists;
};

template <class C>
struct Emitter {
  static constexpr int kSegments = 4 * C::CONSUMERS;
  const Candidates* to;
  int step = 0, places = 0;  // of this piece

  __device__ __forceinline__ Segment begin(const CandidateToken& token) {
    const bool back = token.piece == kLastPiece;
    step = back ? -1 : 1, places = token.piece == kMiddlePiece ? 0 : to->places;
    const int segment = token.row * kSegments + static_cast<int>(threadIdx.x / 32);
    const float bound = to->bounds[static_cast<i64>(token.row + 1) * to->pitch - 1];
    return {bound > kLeastNumber ? bound : kLeastNumber, segment * to->places + (back ? to->places - 1 : 0),
            0};
  }

  // By all lanes together. Lanes of equal parity have the same token.
  __device__ __forceinline__ void put(Segment& s, bool wanted, float logit, int key) const {
    const u32 lane = threadIdx.x % 32, hits = __ballot_sync(0xFFFFFFFF, wanted);
    if (hits == 0) return;
    const u32 own = hits & 0x55555555u << (lane & 1);
    const int at = s.count + __popc(own & ((1u << lane) - 1));
    if (wanted && at < places) {
      ptx::store_global(to->numbers + s.first + step * at, logit);
      ptx::store_global(to->keys + s.first + step * at, key);
    }
    s.count += __popc(own);
  }

  // By one lane.
  __device__ __forceinline__ void end(const Segment& s, const CandidateToken& token) const {
    if (!token.exists || s.count == 0) return;  // zero is there; of pieces in the middle any other one counts
    const int piece = token.row * kPieces + token.piece;
    to->counts[piece * kSegments + threadIdx.x / 32] = s.count;
  }
};

}  // namespace jdg
