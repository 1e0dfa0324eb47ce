// The k largest numbers of every row, exactly: of equal ones those in the lower columns.
//
//   x [rows, n]  ->  indices [rows, k], values [rows, k]
//
// clang-format off
//   sample   some thousand numbers of the row; from them a number that a few more than k of the row are not
//            below. A row that fits the list needs none: the lowest number there is
//   gather   the row once, 16 bytes a thread at a time: numbers that are not below it become candidates
//   meet     blocks of a cluster have a piece of the row each; candidates go to the first one's list
//   select   a radix select among the candidates, 11 bits at a time, from the highest: the k-th of them
//   again    where too few or too many were gathered (a sample says nothing sure), the same select reads the
//            row itself: five times, by one block
//   sort     those that are not below the k-th, in a bitonic network
// clang-format on
//
// A candidate is one integer, of the order of the result: 32 bits of the number, then 20 of how far its
// column is from the last that can be. So no two are equal, and ties need no care. NaN and -infinity are no
// candidates; both zeros are one number.
//
// shared memory:  list[capacity] (first: the sample) | chosen[sorted] | bins[2048] | Found
//
// Hazards: other blocks write to the first one's list and add to its count, so each says when its sample has
// been read (arrive), and none pushes before all have said so (wait). Every loop around a vote or a shuffle
// has the same number of turns for all lanes.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/cluster.cuh>
#include <jax_deepgemm/ptx/grid.cuh>

namespace jdg {

enum class Number { kFloat32, kBfloat16, kFloat16 };

// What a kernel is told at compile time; ops/topk/sm90.py writes it as `struct Config`.
// clang-format off
template <class C>
concept TopkConfig = requires {
  C::NUMBER;    // Number: dtype of the rows
  C::THREADS;   // of a block, a power of two from 128 on
  C::PIECES;    // blocks of a row, which are a cluster; a power of two
  C::WINDOWS;   // bool: whether rows have a first and a last column of their own
  C::VALUES;    // bool: whether values are written too
  C::BY_INDEX;  // bool: the result is in the order of columns, not of numbers
};
// clang-format on

// How many a block has of what: all powers of two, but n and k.
struct TopkSizes {
  int n, k;
  int capacity;  // of the list
  int sorted;    // of `chosen`, at least k
  int sample;    // numbers of a long row's sample
};

constexpr u32 kWarp = 0xFFFFFFFF;
constexpr int kColumnBits = 20;
constexpr u32 kLastColumn = (1u << kColumnBits) - 1;
constexpr int kDigit = 11, kBins = 1 << kDigit;
constexpr int kCandidateBits = 32 + kColumnBits;
constexpr int kSampleDigits = 2, kAllDigits = (kCandidateBits + kDigit - 1) / kDigit;
constexpr int kPrefetched = 1 << 16;  // bytes of each block's piece
constexpr int kVectors = 4;           // that a thread asks for at once
constexpr float kLowest = -0x1.fffffep+127f;

// Numbers -----------------------------------------------------------------------------------------------

template <Number N>
struct NumberOf {
  using Bits = u16;
  static constexpr int PER_WORD = 2;
  static constexpr u16 kMinusInfinity = N == Number::kBfloat16 ? 0xFF80 : 0xFC00;
  __device__ __forceinline__ static float of(u16 bits) {
    if constexpr (N == Number::kBfloat16) return __uint_as_float(static_cast<u32>(bits) << 16);
    return ptx::half_to_float(bits);
  }
  // The i-th of a word.
  __device__ __forceinline__ static float in(u32 word, int i) {
    if constexpr (N == Number::kBfloat16) return __uint_as_float(i == 0 ? word << 16 : word & 0xFFFF0000u);
    return ptx::half_to_float(static_cast<u16>(i == 0 ? word : word >> 16));
  }
};
template <>
struct NumberOf<Number::kFloat32> {
  using Bits = u32;
  static constexpr int PER_WORD = 1;
  static constexpr u32 kMinusInfinity = 0xFF800000u;
  __device__ __forceinline__ static float of(u32 bits) { return __uint_as_float(bits); }
  __device__ __forceinline__ static float in(u32 word, int) { return __uint_as_float(word); }
};

// An integer of the order of floats; -0 is 0.
__device__ __forceinline__ u32 rank_of(float number) {
  const u32 bits = __float_as_uint(number + 0.0f);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float number_of(u32 rank) {
  return __uint_as_float(rank ^ (static_cast<int>(rank) < 0 ? 0x80000000u : 0xFFFFFFFFu));
}
// 0: none.
__device__ __forceinline__ u64 candidate(float number, int column) {
  return number >= kLowest ? static_cast<u64>(rank_of(number)) << kColumnBits | (kLastColumn - column) : 0;
}

// The block ---------------------------------------------------------------------------------------------

// What threads of a block tell each other.
struct Found {
  u32 count;               // of candidates, also of those that the list has no place for
  u32 chosen;              // of those in `chosen`
  u32 base;                // where this block's candidates go in the first one's list
  u32 bin, above, inside;  // the bin that the wanted one is in; how many are in the bins above it, and in it
  u32 total;               // in all bins
  u32 sums[32];            // of each warp's bins
};

template <class C>
struct Block {
  using N = NumberOf<C::NUMBER>;
  using Bits = typename N::Bits;
  static constexpr int THREADS = C::THREADS, WARPS = THREADS / 32;
  static constexpr int PER_VECTOR = 4 * N::PER_WORD;

  const TopkSizes& size;
  const Bits* row;
  u64 *list, *chosen;
  u32* bins;
  Found* found;
  int thread, lane, warp;

  __device__ __forceinline__ Block(const TopkSizes& s, const Bits* r)
      : size(s), row(r), thread(static_cast<int>(threadIdx.x)), lane(thread % 32), warp(thread / 32) {
    list = reinterpret_cast<u64*>(ptx::shared_words());
    chosen = list + s.capacity;
    bins = reinterpret_cast<u32*>(chosen + s.sorted);
    found = reinterpret_cast<Found*>(bins + kBins);
  }
  __device__ __forceinline__ u32* sample() const { return reinterpret_cast<u32*>(list); }
  __device__ __forceinline__ float number(int column) const {
    return N::of(ptx::load_constant(row + column));
  }

  // Of all lanes up to this one.
  __device__ __forceinline__ u32 scan(u32 own) const {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u32 before = __shfl_up_sync(kWarp, own, step);
      if (lane >= step) own += before;
    }
    return own;
  }

  // Places for `own` things of each lane, by all lanes together; `count` counts what was given away.
  __device__ __forceinline__ u32 places(u32* count, u32 own) const {
    const u32 through = scan(own), total = __shfl_sync(kWarp, through, 31);
    u32 first = 0;
    if (lane == 0) first = atomicAdd(count, total);
    return __shfl_sync(kWarp, first, 0) + through - own;
  }
};

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

// Gather ------------------------------------------------------------------------------------------------

// Appends the numbers that `mask` has bits for; column(j) is that of bit j. By all lanes together.
template <class C, class Column>
__device__ __forceinline__ void append(const Block<C>& b, u32 mask, const Column& column) {
  if (!__any_sync(kWarp, mask != 0)) return;
  u32 to = b.places(&b.found->count, __popc(mask));
  for (; mask != 0; mask &= mask - 1, ++to) {
    const int at = column(__ffs(mask) - 1);
    if (to < static_cast<u32>(b.size.capacity)) b.list[to] = candidate(b.number(at), at);
  }
}

// Numbers of columns [from, to) that are not below `least` (a number, so NaN is below).
template <class C>
__device__ __forceinline__ void gather(const Block<C>& b, int from, int to, float least) {
  constexpr int kWide = Block<C>::PER_VECTOR;
  const Span<C> span(b, from, to);
  for (int first = 0; first < span.vectors; first += C::THREADS * kVectors) {
    uint4 held[kVectors];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int v = first + u * C::THREADS + b.thread;
      const bool wanted = v < span.vectors;
      held[u] = ptx::load_or_ones(wanted, b.row + span.column(wanted ? v : 0));  // all ones are NaN
    }
    u32 mask = 0;
#pragma unroll
    for (int j = 0; j < kVectors * kWide; ++j)
      mask |= (in_vector<C>(held[j / kWide], j % kWide) >= least ? 1u : 0u) << j;
    append(b, mask,
           [&](int j) { return span.column(first + j / kWide * C::THREADS + b.thread) + j % kWide; });
  }
  const int edge = b.thread < span.head ? from + b.thread : span.column(span.vectors) + b.thread - span.head;
  const bool is_edge = b.thread < span.head + span.tail;
  const float number = is_edge ? b.number(edge) : 0.0f;
  append(b, is_edge && number >= least ? 1u : 0u, [&](int) { return edge; });
}

// Select ------------------------------------------------------------------------------------------------

// What is selected from: visit(candidate) by all lanes together, 0 where a lane has none.
template <class C>
struct InList {
  const Block<C>& b;
  int count;
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for (int first = 0; first < count; first += C::THREADS)
      visit(first + b.thread < count ? b.list[first + b.thread] : u64{0});
  }
};
template <class C>
struct InSample {
  const Block<C>& b;
  int count;
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for (int first = 0; first < count; first += C::THREADS)
      visit(first + b.thread < count ? static_cast<u64>(b.sample()[first + b.thread]) << kColumnBits
                                     : u64{0});
  }
};
template <class C>
struct InRow {
  const Block<C>& b;
  int from, to;
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for (int first = from; first < to; first += C::THREADS) {
      const int column = first + b.thread;
      visit(column < to ? candidate(b.number(column), column) : u64{0});
    }
  }
};

// One more in a bin; none: kBins. By all lanes together, as many equal bins would make a queue.
__device__ __forceinline__ void count_bin(u32* bins, u32 bin, int lane) {
  const bool alike = __all_sync(kWarp, bin == __shfl_sync(kWarp, bin, 0));
  if (bin < kBins && (!alike || lane == 0)) atomicAdd(bins + bin, alike ? 32u : 1u);
}

// Finds the bin, from the highest, in which the wanted-th is; `inside` stays 0 if there are not so many.
template <class C>
__device__ __forceinline__ void find_bin(const Block<C>& b, u32 wanted) {
  constexpr int kEach = kBins / C::THREADS;
  const int last = kBins - 1 - b.thread * kEach;
  u32 own = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) own += b.bins[last - i];
  u32 through = b.scan(own);
  if (b.lane == 31) b.found->sums[b.warp] = through;
  __syncthreads();
  const u32 warps = b.scan(b.lane < C::THREADS / 32 ? b.found->sums[b.lane] : 0);
  const u32 before = __shfl_sync(kWarp, warps, b.warp == 0 ? 0 : b.warp - 1);
  through += b.warp == 0 ? 0 : before;
  u32 above = through - own;
  if (above < wanted && wanted <= through) {
    int bin = last;
    while (above + b.bins[bin] < wanted) above += b.bins[bin--];
    b.found->bin = bin, b.found->above = above, b.found->inside = b.bins[bin];
  }
  if (b.thread == C::THREADS - 1) b.found->total = through;
  __syncthreads();
}

// The largest number that `wanted` of the source's candidates are not below, exact to so many digits; 1 if
// there are not so many. Waits for what threads have written before.
template <int DIGITS, class C, class Source>
__device__ __forceinline__ u64 threshold(const Block<C>& b, const Source& source, u32 wanted) {
  u64 prefix = 0;
  int below = kCandidateBits;  // bits that are not known yet
#pragma unroll 1
  for (int digit = 0; digit < DIGITS; ++digit) {
    const int bits = min(kDigit, below), shift = below - bits;
    for (int i = b.thread; i < kBins; i += C::THREADS) b.bins[i] = 0;
    __syncthreads();
    source.for_each([&](u64 c) {
      const bool counts = c != 0 && c >> below == prefix;
      count_bin(b.bins, counts ? static_cast<u32>(c >> shift) & ((1u << bits) - 1) : u32{kBins}, b.lane);
    });
    __syncthreads();
    find_bin(b, wanted);
    if (b.found->total < wanted) return 1;
    wanted -= b.found->above;
    prefix = prefix << bits | b.found->bin;
    below = shift;
    const bool done = b.found->inside == wanted;
    __syncthreads();  // `found` is written anew
    if (done) break;
  }
  return prefix << below;
}

// The sample: vectors from all over the row.
template <class C>
__device__ __forceinline__ void read_sample(const Block<C>& b, int from, int to) {
  constexpr int kWide = Block<C>::PER_VECTOR;
  const Span<C> span(b, from, to);
  const int vectors = b.size.sample / kWide;
  for (int i = b.thread; i < vectors; i += C::THREADS) {
    const int v = static_cast<int>(static_cast<u64>(i) * span.vectors / static_cast<u32>(vectors));
    const uint4 held = ptx::load_or_ones(true, b.row + span.column(v));
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const float number = in_vector<C>(held, j);
      b.sample()[j * vectors + i] = number >= kLowest ? rank_of(number) : 0;
    }
  }
}

// Asks for what will be gathered first, while the sample is selected from.
template <class C>
__device__ __forceinline__ void prefetch(const Block<C>& b, int from, int to) {
  const Span<C> span(b, from, to);
  const int bytes = min(span.vectors * 16, kPrefetched);
  if (b.thread == 0 && bytes > 0) ptx::prefetch_bulk(b.row + span.column(0), static_cast<u32>(bytes));
}

// A number that a few more than k of so many are not below, by their sample; the lowest, if all are.
template <class C>
__device__ __forceinline__ float guess(const Block<C>& b, int length) {
  const float share = static_cast<float>(b.size.sample) / static_cast<float>(length);
  const float hits = share * static_cast<float>(b.size.k), most = 0.6f * share * b.size.capacity;
  const u32 wanted = static_cast<u32>(fmaxf(fminf(1.5f * hits + 4.0f * sqrtf(hits) + 4.0f, most), 1.0f));
  const u64 least = threshold<kSampleDigits>(b, InSample<C>{b, b.size.sample}, wanted);
  __syncthreads();  // the list is written anew
  return fmaxf(number_of(static_cast<u32>(least >> kColumnBits)), kLowest);
}

// Result ------------------------------------------------------------------------------------------------

// The source's candidates from `least` on, as they are sorted.
template <class C, class Source>
__device__ __forceinline__ void choose(const Block<C>& b, const Source& source, u64 least) {
  source.for_each([&](u64 c) {
    const bool taken = c >= least;
    if (!__any_sync(kWarp, taken)) return;
    const u32 to = b.places(&b.found->chosen, taken ? 1 : 0);
    if (!taken || to >= static_cast<u32>(b.size.sorted)) return;
    b.chosen[to] = C::BY_INDEX ? (c & kLastColumn) << 32 | c >> kColumnBits : c;
  });
}

// The largest first. `size` is a power of two; strides within a warp's 64 neighbours need no other warp.
template <class C>
__device__ __forceinline__ void sort(const Block<C>& b, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = b.thread; i < size / 2; i += C::THREADS) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const u64 one = b.chosen[low], other = b.chosen[high];
        if ((one < other) == ((low & run) == 0)) b.chosen[low] = other, b.chosen[high] = one;
      }
      if (stride > 32 || (stride == 1 && run >= 64))
        __syncthreads();
      else
        __syncwarp();
    }
  }
  __syncthreads();
}

template <class C>
__device__ __forceinline__ void write(const Block<C>& b, int count, int* indices, void* values) {
  using N = NumberOf<C::NUMBER>;
  for (int i = b.thread; i < b.size.k; i += C::THREADS) {
    int column = -1;
    if (i < count) {
      const u64 c = b.chosen[i];
      column = static_cast<int>(kLastColumn - (static_cast<u32>(C::BY_INDEX ? c >> 32 : c) & kLastColumn));
    }
    indices[i] = column;
    if constexpr (C::VALUES)
      static_cast<typename N::Bits*>(values)[i] =
          column < 0 ? N::kMinusInfinity : ptx::load_constant(b.row + column);
  }
}

// This block's candidates to the first one's list. By all threads, after all have said that they may.
template <class C>
__device__ __forceinline__ void push(const Block<C>& b) {
  const u32 own = b.found->count, capacity = static_cast<u32>(b.size.capacity);
  if (b.thread == 0) b.found->base = ptx::add_in_block(&b.found->count, 0, own);
  __syncthreads();
  const u32 base = b.found->base, kept = own < capacity ? own : capacity;
  for (u32 i = b.thread; i < kept; i += C::THREADS)
    if (base + i < capacity) ptx::store_in_block(b.list + base + i, 0, b.list[i]);
}

template <TopkConfig C>
__device__ __forceinline__ void topk(const void* x, const int* start, const int* end, int* indices,
                                     void* values, const TopkSizes& size) {
  using Bits = typename Block<C>::Bits;
  const int row = static_cast<int>(blockIdx.x) / C::PIECES, piece = static_cast<int>(blockIdx.x) % C::PIECES;
  const Block<C> b(size, static_cast<const Bits*>(x) + static_cast<i64>(row) * size.n);
  int from = 0, to = size.n;
  // Both within the row: `to - from` of what is given can overflow, and ptxas takes it before it compares.
  if constexpr (C::WINDOWS) from = min(max(start[row], 0), size.n), to = min(max(end[row], 0), size.n);
  const int length = to > from ? to - from : 0;

  const int first = from + length / C::PIECES * piece;
  const int last = piece == C::PIECES - 1 ? from + length : first + length / C::PIECES;
  float least = kLowest;
  if (length > size.capacity) {
    read_sample(b, from, to);
    prefetch(b, first, last);
    least = guess(b, length);
  }
  if (b.thread == 0) b.found->count = 0, b.found->chosen = 0;
  __syncthreads();
  if constexpr (C::PIECES > 1) {
    __syncwarp();  // the barrier's instruction is for all lanes together
    ptx::cluster_arrive();
  }
  gather(b, first, last, least);
  __syncthreads();
  if constexpr (C::PIECES > 1) {
    ptx::cluster_wait();
    if (piece > 0) push(b);
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (piece > 0) return;
  }

  const int count = static_cast<int>(b.found->count);
  if (count > size.capacity || (count < size.k && least > kLowest)) {
    const InRow<C> source{b, from, to};
    choose(b, source, threshold<kAllDigits>(b, source, size.k));
  } else {
    const InList<C> source{b, count};
    choose(b, source, count <= size.k ? 1 : threshold<kAllDigits>(b, source, size.k));
  }
  __syncthreads();
  const int chosen = static_cast<int>(b.found->chosen);
  int sorted = 1;
  while (sorted < chosen) sorted *= 2;
  for (int i = chosen + b.thread; i < sorted; i += C::THREADS) b.chosen[i] = 0;
  __syncthreads();
  sort(b, sorted);
  write(
      b, chosen, indices + static_cast<i64>(row) * size.k,
      C::VALUES ? static_cast<void*>(static_cast<Bits*>(values) + static_cast<i64>(row) * size.k) : nullptr);
}

}  // namespace jdg
