// The k largest numbers of every row, exactly: of equal ones those in the lower columns.
//
//   x [rows, n]  ->  indices [rows, k], values [rows, k]
//
// clang-format off
//   a row that fits the registers of its block:                     hold -> order -> write
//   a longer one, whose pieces are read by the blocks of a cluster:
//     sample   some numbers from all over the row; from them a bound that a few more than k of the row are not
//              below
//     gather   the row once, 16 bytes a thread at a time: numbers that are not below it become candidates in
//              the list of the block
//     narrow   where too few or too many were gathered (a sample says nothing sure): all of the row is counted
//              in bins, again and again, until a bound is exact enough; then the row is gathered again
//     push     to the list of the first block, which goes on alone: hold -> order -> write
// clang-format on
//
// What candidates and bins are, how they are put in order, and what lies where: topk/order.cuh. The sample is
// where the list will be.
//
// Hazards: blocks of a cluster read each other's count and bins, so all meet before they read, and once more
// before these are written anew; what they decide is made of the same counts, so that all decide alike.
#pragma once

#include <jax_deepgemm/topk/order.cuh>

namespace jdg {

constexpr int kNumbers = 8;  // that a thread loads at once when a row is read again
// Bytes of a piece that are asked for before they are loaded; with one block for each SM there is more room.
template <class C>
constexpr int kAhead = C::PIECES > 1 ? 1 << 17 : 1 << 16;

// All threads of the block, or of all blocks of the row.
template <class C, bool TOGETHER = true>
__device__ __forceinline__ void meet() {
  if constexpr (TOGETHER && C::PIECES > 1) {
    __syncwarp();  // the barrier's instruction is for all lanes together
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}

// Reading a row -----------------------------------------------------------------------------------------

// Vectors of 16 bytes between two columns, and the columns in front of and behind them.
template <class C>
struct Span {
  static constexpr int WIDE = Block<C>::PER_VECTOR;
  int begin, head, vectors, tail;

  __device__ __forceinline__ Span(const Block<C>& b, int from, int to) : begin(from) {
    const int length = to > from ? to - from : 0;
    const u32 off = static_cast<u32>(reinterpret_cast<u64>(b.row + from) / sizeof(*b.row)) % WIDE;
    head = min(static_cast<int>((WIDE - off) % WIDE), length);
    vectors = (length - head) / WIDE;
    tail = length - head - vectors * WIDE;
  }
  __device__ __forceinline__ int column(int vector) const { return begin + head + vector * WIDE; }
};

// The i-th number of a vector.
template <class C>
__device__ __forceinline__ float in_vector(const uint4& v, int i) {
  using N = NumberOf<C::NUMBER>;
  const int w = i / N::PER_WORD;
  return N::in(w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w, i % N::PER_WORD);
}

// Asks for vectors from `first` on, which are gathered next but one.
template <class C>
__device__ __forceinline__ void prefetch(const Block<C>& b, const Span<C>& span, int first, int vectors) {
  const int count = min(vectors, span.vectors - first);
  if (b.thread == 0 && count > 0)
    ptx::prefetch_bulk(b.row + span.column(first), static_cast<u32>(count) * 16);
}

// Numbers of this thread that `mask` has bits for, into the list; column(j) is that of bit j. By all lanes
// together.
template <class C, class Column>
__device__ __forceinline__ void append(const Block<C>& b, u32 mask, const Column& column) {
  if (!__any_sync(kWarp, mask != 0)) return;
  u32 to = b.places(&b.found->count, __popc(mask));
  for (; mask != 0 && to < Block<C>::CAPACITY; mask &= mask - 1, ++to) {
    const int at = column(__ffs(mask) - 1);
    b.list[to] = b.candidate(b.number(at), at);
  }
}

// Numbers of columns [from, to) that are not below `least`, into the list.
template <class C>
__device__ __forceinline__ void gather(const Block<C>& b, int from, int to, float least) {
  constexpr int kWide = Block<C>::PER_VECTOR, kVectors = 32 / kWide, kTurn = C::THREADS * kVectors;
  const Span<C> span(b, from, to);
  for (int first = 0; first < span.vectors; first += kTurn) {
    uint4 held[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int v = first + u * C::THREADS + b.thread;
      const bool wanted = v < span.vectors;
      held[u] = ptx::load_or_ones(wanted, b.row + span.column(wanted ? v : 0));  // all ones are NaN
    }
    prefetch(b, span, first + kAhead<C> / 16, kTurn);
    u32 mask = 0;
#pragma unroll
    for (int j = 0; j < kVectors * kWide; ++j)
      mask |= (in_vector<C>(held[j / kWide], j % kWide) >= least ? 1u : 0u) << j;
    append(b, mask,
           [&](int j) { return span.column(first + j / kWide * C::THREADS + b.thread) + j % kWide; });
  }
  const int edge = b.thread < span.head ? from + b.thread : span.column(span.vectors) + b.thread - span.head;
  const bool is_edge = b.thread < span.head + span.tail;
  append(b, is_edge && b.number(edge) >= least ? 1u : 0u, [&](int) { return edge; });
}

// What a row is when it is read again: visit(numbers, column) takes kNumbers of a thread, all lanes together;
// NaN where there is none.
template <class C, class Visit>
__device__ __forceinline__ void read_again(const Block<C>& b, int from, int to, const Visit& visit) {
  for (int first = from + b.thread; first - b.thread < to; first += C::THREADS * kNumbers) {
    float number[kNumbers];
#pragma unroll
    for (int j = 0; j < kNumbers; ++j) {
      const int column = first + j * C::THREADS;
      number[j] = column < to ? b.number(column) : __uint_as_float(~0u);
    }
    visit(number, [&](int j) { return first + j * C::THREADS; });
  }
}

// Numbers of columns [from, to) whose candidates are not below `least`, into the list.
template <class C>
__device__ __forceinline__ void gather_again(const Block<C>& b, int from, int to, u64 least) {
  using N = typename Block<C>::N;
  const u32 rank = b.rank(least);
  const float low = number_of<N>(rank), above = number_of<N>(rank + 1);  // NaN above infinity
  const int last = b.column(least);                                      // in which `low` is enough
  read_again(b, from, to, [&](const float* number, const auto& column) {
    u32 mask = 0;
#pragma unroll
    for (int j = 0; j < kNumbers; ++j)
      mask |= (number[j] >= (column(j) <= last ? low : above) ? 1u : 0u) << j;
    append(b, mask, column);
  });
}

// What bins are filled with: count(bins) does it, all lanes together.
template <class C>
struct InSample {
  using Key = u32;  // a rank
  static constexpr bool TOGETHER = false;
  const Block<C>& b;
  __device__ __forceinline__ Key highest() const { return Block<C>::HIGHEST; }
  __device__ __forceinline__ void count(const Bins<C, Key>& bins) const {
    for (int i = b.thread; i < b.size.sample; i += C::THREADS) {
      const u32 bin = bins.of(b.sample()[i]);
      if (bin < bins.COUNT) atomicAdd(b.bins + bin, 1u);
    }
  }
};
template <class C>
struct InPiece {
  using Key = u64;  // a candidate
  static constexpr bool TOGETHER = true;
  const Block<C>& b;
  int from, to;
  __device__ __forceinline__ Key highest() const { return b.last_of(Block<C>::HIGHEST); }
  __device__ __forceinline__ void count(const Bins<C, Key>& bins) const {
    using N = typename Block<C>::N;
    const float least = number_of<N>(b.rank(bins.low));
    read_again(b, from, to, [&](const float* number, const auto& column) {
#pragma unroll
      for (int j = 0; j < kNumbers; ++j)
        if (__any_sync(kWarp, number[j] >= least)) one_more(bins.of(b.candidate(number[j], column(j))));
    });
  }
  // In a bin, by all lanes together, as many equal numbers would make a queue.
  __device__ __forceinline__ void one_more(u32 bin) const {
    const bool alike = __all_sync(kWarp, bin == __shfl_sync(kWarp, bin, 0));
    if (bin < Block<C>::BINS && (!alike || b.lane == 0)) atomicAdd(b.bins + bin, alike ? 32u : 1u);
  }
};

// The highest bound between two keys that `wanted` of the source are not below, or one a little lower, which
// `enough` at most are not below, but for equal keys. The lower one, if there are not so many.
template <class C, class Source, class Key = typename Source::Key>
__device__ __forceinline__ Key narrow(const Block<C>& b, const Source& source, Key low, Key high, u32 wanted,
                                      u32 enough) {
#pragma unroll 1
  while (true) {
    const Bins<C, Key> bins(low, high);
    clear(b);
    __syncthreads();
    source.count(bins);
    meet<C, Source::TOGETHER>();
    look<Source::TOGETHER>(b, wanted);
    const u32 bin = b.found->bin, through = b.found->through;
    meet<C, Source::TOGETHER>();
    low = bins.lowest(bin);
    if (through <= enough || (bins.shift == 0 && bin < bins.COUNT - 1)) return low;
    high = bins.highest(bin, source.highest());
  }
}

// Candidates of a long row ------------------------------------------------------------------------------

// The sample: vectors from all over the row.
template <class C>
__device__ __forceinline__ void read_sample(const Block<C>& b, int from, int to) {
  constexpr int kWide = Block<C>::PER_VECTOR, kAtOnce = 2;
  const Span<C> span(b, from, to);
  const int vectors = b.size.sample / kWide;
  const float step = static_cast<float>(span.vectors) / static_cast<float>(vectors);
  u32 most = 0;
  for (int first = b.thread; first < vectors; first += C::THREADS * kAtOnce) {
    uint4 held[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + u * C::THREADS, v = static_cast<int>(static_cast<float>(i) * step);
      held[u] = ptx::load_or_ones(i < vectors, b.row + span.column(min(v, span.vectors - 1)));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + u * C::THREADS;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float number = in_vector<C>(held[u], j);
        const u32 rank = number >= kLowest ? rank_of<typename Block<C>::N>(number) : 0;
        if (i < vectors) b.sample()[j * vectors + i] = rank;
        most = rank > most ? rank : most;
      }
    }
  }
  b.raise(&b.found->sampled, most);
}

// The rank of a bound that a few more than k of so many are not below, by their sample.
template <class C>
__device__ __forceinline__ u32 guess(const Block<C>& b, int length) {
  const float share = static_cast<float>(b.size.sample) / static_cast<float>(length);
  const float hits = share * static_cast<float>(b.size.k), most = 0.7f * share * Block<C>::CAPACITY;
  const u32 wanted = static_cast<u32>(fmaxf(fminf(hits + 4.5f * sqrtf(hits) + 4.0f, most), 1.0f));
  return narrow(b, InSample<C>{b}, Block<C>::LOWEST, b.found->sampled, wanted, wanted + wanted / 32);
}

// How many the blocks of a row have gathered, and those in front of this one.
template <class C>
__device__ __forceinline__ u32 gathered(const Block<C>& b, u32 piece, u32& before) {
  if constexpr (C::PIECES == 1) return b.found->count;
  u32 total = 0;
  for (u32 p = 0; p < C::PIECES; ++p) {
    if (p == piece) before = total;
    total += ptx::load_from_block(&b.found->count, p);
  }
  return total;
}

// Fills the first block's list with k candidates at least, if there are so many. Returns how many there are,
// and the bound that none is below.
template <class C>
__device__ __forceinline__ u32 collect(const Block<C>& b, u32 piece, int from, int to, u64& low) {
  const int each = (to - from) / C::PIECES, first = from + each * static_cast<int>(piece);
  const int last = piece == C::PIECES - 1 ? to : first + each;
  prefetch(b, Span<C>(b, first, last), 0, kAhead<C> / 16);
  read_sample(b, from, to);
  __syncthreads();
  const u32 rank = guess(b, to - from);
  gather(b, first, last, number_of<typename Block<C>::N>(rank));
  meet<C>();
  u32 before = 0, total = gathered(b, piece, before);
  low = b.first_of(rank);
  const bool too_few = total < static_cast<u32>(b.size.k) && rank > Block<C>::LOWEST;
  if (too_few || total > Block<C>::CAPACITY) {
    meet<C>();  // the count is written anew
    if (b.thread == 0) b.found->count = 0;
    const u64 high = too_few ? low : b.last_of(b.found->sampled);
    low = narrow(b, InPiece<C>{b, first, last}, too_few ? b.first_of(Block<C>::LOWEST) : low, high, b.size.k,
                 Block<C>::CAPACITY);
    gather_again(b, first, last, low);
    meet<C>();
    total = gathered(b, piece, before);
  }
  if constexpr (C::PIECES > 1) {
    const u32 own = b.found->count;
    for (u32 i = b.thread; piece > 0 && i < own; i += C::THREADS)
      ptx::store_in_block(b.list + before + i, 0, b.list[i]);
    meet<C>();
  }
  return total;
}

template <TopkConfig C>
__device__ __forceinline__ void topk(const void* x, const int* start, const int* end, int* indices,
                                     void* values, const TopkSizes& size) {
  using Bits = typename Block<C>::Bits;
  const int row = static_cast<int>(blockIdx.x) / C::PIECES;
  const u32 piece = blockIdx.x % C::PIECES;
  const Block<C> b(size, static_cast<const Bits*>(x) + static_cast<i64>(row) * size.n);
  int from = 0, to = size.n;
  // Both within the row: `to - from` of what is given can overflow, and ptxas takes it before it compares.
  if constexpr (C::WINDOWS) from = min(max(start[row], 0), size.n), to = min(max(end[row], from), size.n);
  if (b.thread == 0) b.found->count = 0, b.found->sampled = 0, b.found->most = 0;
  __syncthreads();

  Held<C> h;
  u64 low = b.first_of(Block<C>::LOWEST);
  if (to - from <= Block<C>::CAPACITY) {
    if (piece > 0) return;
#pragma unroll
    for (int j = 0; j < C::HELD; ++j) {
      const int column = from + j * C::THREADS + b.thread;
      h.candidate[j] = column < to ? b.candidate(b.number(column), column) : 0;
    }
  } else {
    const u32 count = collect(b, piece, from, to, low);
    if (piece > 0) return;
#pragma unroll
    for (int j = 0; j < C::HELD; ++j) {
      const u32 at = j * C::THREADS + b.thread;
      h.candidate[j] = at < count ? b.list[at] : 0;
    }
  }
  const i64 result = static_cast<i64>(row) * size.k;
  finish(b, h, low, from, to, indices + result, C::VALUES ? static_cast<Bits*>(values) + result : nullptr,
         [&](u32, int column) { return ptx::load_constant(b.row + column); });
}

}  // namespace jdg
