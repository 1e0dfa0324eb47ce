// Candidates of topk.cuh, counted in bins and put in order: what a block of threads does with numbers that it
// holds, wherever they come from.
//
// clang-format off
//   order    counts what is held in bins of equal width between a bound and the largest: the bins above a
//            candidate's say nearly where in the result it is, those in its own bin, mostly few, say the rest.
//            Crowded bins are cut finer, at most twice; if they stay so, a bitonic network sorts
// clang-format on
//
// A candidate is one integer, of the order of the result: the number's rank among all numbers of its dtype,
// then how far its column is from the last that can be, in as many bits as columns need, so that equal
// numbers are spread over bins as others are. No two are equal, and ties need no care. NaN and -infinity are
// no candidates; both zeros are one number.
//
// shared memory:  list[CAPACITY] | bins[BINS] | Found
//
// Hazards: bins and Found are read behind a barrier, and there is one more before they are written anew.
// Every loop around a vote or a shuffle has the same number of turns for all lanes.
#pragma once

#include <jax_deepgemm/ptx/cluster.cuh>
#include <jax_deepgemm/ptx/grid.cuh>
#include <jax_deepgemm/ptx/warp.cuh>

namespace jdg {

enum class Number { kFloat32, kBfloat16, kFloat16 };

// What a kernel is told at compile time; ops/topk/sm90.py writes it as `struct Config`.
// clang-format off
template <class C>
concept TopkConfig = requires {
  C::NUMBER;    // Number: dtype of the rows
  C::THREADS;   // of a block, a power of two from 32 on
  C::HELD;      // candidates that a thread holds, a power of two; THREADS * HELD is at least k
  C::PIECES;    // blocks of a row, which are a cluster
  C::WINDOWS;   // bool: whether rows have a first and a last column of their own
  C::VALUES;    // bool: whether values are written too
  C::BY_INDEX;  // bool: the result is in the order of columns, not of numbers
};
// clang-format on

struct TopkSizes {
  int n, k;
  int sample;  // numbers of a long row's sample
};

constexpr u32 kWarp = 0xFFFFFFFF;
constexpr int kHighest = 32;   // so many of the highest may share the last bin, when bins are cut finer
constexpr int kCompared = 64;  // pairs in equal bins for each thread, from which on bins are crowded
constexpr int kLooks = 3;      // at bins, before the network sorts
constexpr float kLowest = -0x1.fffffep+127f;

// Numbers -----------------------------------------------------------------------------------------------

template <Number N>
struct NumberOf {
  using Bits = u16;
  static constexpr int PER_WORD = 2;
  static constexpr int UNUSED = N == Number::kBfloat16 ? 16 : 13;  // bits of float32 that these lack
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
  static constexpr int UNUSED = 0;
  static constexpr u32 kMinusInfinity = 0xFF800000u;
  __device__ __forceinline__ static float of(u32 bits) { return __uint_as_float(bits); }
  __device__ __forceinline__ static float in(u32 word, int) { return __uint_as_float(word); }
};

// An integer of the order of a dtype's numbers; -0 is 0.
template <class N>
__device__ __forceinline__ u32 rank_of(float number) {
  const u32 bits = __float_as_uint(number + 0.0f);
  return (bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u)) >> N::UNUSED;
}
// The lowest float that has this rank.
template <class N>
__device__ __forceinline__ float number_of(u32 rank) {
  const u32 whole = rank << N::UNUSED;
  return __uint_as_float(whole ^ (static_cast<int>(whole) < 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// The block ---------------------------------------------------------------------------------------------

// What threads of a block tell each other.
struct Found {
  u32 count;     // of candidates, also of those that the list has no place for
  u32 sampled;   // highest rank of the sample
  u32 most;      // highest rank of what is held
  u32 bin;       // the bin that the wanted one is in; 0 if there are not so many
  u32 through;   // how many are in it and in the bins above
  u32 high_bin;  // the bin that the kHighest-th is in, if there are so many
  u32 total;     // in all bins
  u32 pairs;     // that have to be compared
  u32 sums[32];  // of each warp's bins
};

template <class C>
struct Block {
  using N = NumberOf<C::NUMBER>;
  using Bits = typename N::Bits;
  static constexpr int THREADS = C::THREADS, WARPS = THREADS / 32;
  static constexpr int CAPACITY = THREADS * C::HELD;
  static constexpr int EACH = 4, BINS = EACH * THREADS;
  static constexpr int PER_VECTOR = 4 * N::PER_WORD;
  static constexpr u32 LOWEST = 0x00800000u >> N::UNUSED, HIGHEST = 0xFF800000u >> N::UNUSED;  // ranks

  const TopkSizes& size;
  const Bits* row;
  u64* list;
  u32* bins;
  Found* found;
  int thread, lane, warp;
  int column_bits;  // at most 20
  u32 last_column;

  __device__ __forceinline__ Block(const TopkSizes& s, const Bits* r)
      : size(s),
        row(r),
        thread(static_cast<int>(threadIdx.x)),
        lane(thread % 32),
        warp(thread / 32),
        column_bits(32 - __clz(s.n - 1)),
        last_column((1u << column_bits) - 1) {
    list = reinterpret_cast<u64*>(ptx::shared_words());
    bins = reinterpret_cast<u32*>(list + CAPACITY);
    found = reinterpret_cast<Found*>(bins + BINS);
  }
  __device__ __forceinline__ u32* sample() const { return reinterpret_cast<u32*>(list); }
  __device__ __forceinline__ float number(int column) const {
    return N::of(ptx::load_constant(row + column));
  }

  // Candidates; 0 is none.
  __device__ __forceinline__ u64 candidate(float number, int column) const {
    return number >= kLowest ? first_of(rank_of<N>(number)) | (last_column - column) : 0;
  }
  __device__ __forceinline__ u64 first_of(u32 rank) const { return static_cast<u64>(rank) << column_bits; }
  __device__ __forceinline__ u64 last_of(u32 rank) const { return first_of(rank) | last_column; }
  __device__ __forceinline__ u32 rank(u64 c) const { return static_cast<u32>(c >> column_bits); }
  __device__ __forceinline__ int column(u64 c) const {
    return static_cast<int>(last_column - (static_cast<u32>(c) & last_column));
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

  // The highest of all threads' ranks into *at, once they have met.
  __device__ __forceinline__ void raise(u32* at, u32 rank) const {
    rank = ptx::reduce_max(rank);
    if (lane == 0) atomicMax(at, rank);
  }
};

// Bins --------------------------------------------------------------------------------------------------

// Equal widths of candidates, or of ranks, from `low` on; the last has all that are above, too.
template <class C, class Key>
struct Bins {
  static constexpr u32 COUNT = Block<C>::BINS;
  Key low;
  int shift;

  __device__ __forceinline__ Bins(Key least, Key most) : low(least) {
    const int spare = __clzll(static_cast<i64>(most > least ? most - least : 0)) - __clzll(COUNT - 1);
    shift = spare < 0 ? -spare : 0;
  }
  __device__ __forceinline__ u32 of(Key c) const {
    const Key bin = (c - low) >> shift;
    return c < low ? COUNT : bin < COUNT ? static_cast<u32>(bin) : COUNT - 1;
  }
  __device__ __forceinline__ Key lowest(u32 bin) const { return low + (static_cast<Key>(bin) << shift); }
  // Of what a bin can have, if nothing is above `most`; the next bin can be beyond all integers.
  __device__ __forceinline__ Key highest(u32 bin, Key most) const {
    const bool whole = bin < COUNT - 1 && (most - lowest(bin)) >> shift > 0;
    return whole ? lowest(bin + 1) - 1 : most;
  }
};

template <class C>
__device__ __forceinline__ void clear(const Block<C>& b) {
  reinterpret_cast<uint4*>(b.bins)[b.thread] = {0, 0, 0, 0};
  if (b.thread == 0) b.found->pairs = 0;
}

// Finds the bin that the wanted-th is in, from the highest, and what else Found says of bins. A block's own
// bins then say how many are above each; those of all blocks of a row together stay as they are.
template <bool TOGETHER, class C>
__device__ __forceinline__ void look(const Block<C>& b, u32 wanted) {
  constexpr int kEach = Block<C>::EACH;
  const int last = Block<C>::BINS - 1 - b.thread * kEach;
  uint4& four = *reinterpret_cast<uint4*>(b.bins + last + 1 - kEach);
  u32 inside[kEach] = {four.w, four.z, four.y, four.x};
  if constexpr (TOGETHER && C::PIECES > 1) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      inside[i] = 0;
      for (u32 p = 0; p < C::PIECES; ++p) inside[i] += ptx::load_from_block(b.bins + last - i, p);
    }
  }
  const u32 own = inside[0] + inside[1] + inside[2] + inside[3];
  u32 through = b.scan(own);
  if (b.lane == 31) b.found->sums[b.warp] = through;
  __syncthreads();
  const u32 warps = b.scan(b.lane < Block<C>::WARPS ? b.found->sums[b.lane] : 0);
  const u32 before = __shfl_sync(kWarp, warps, b.warp == 0 ? 0 : b.warp - 1);
  through += b.warp == 0 ? 0 : before;
  u32 above = through - own, pairs = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const u32 with = above + inside[i];
    if (above < wanted && wanted <= with) b.found->bin = last - i, b.found->through = with;
    if (above < kHighest && kHighest <= with) b.found->high_bin = last - i;
    if (above < wanted) pairs += inside[i] * inside[i];
    inside[i] = above;
    above = with;
  }
  if constexpr (!TOGETHER) four = {inside[3], inside[2], inside[1], inside[0]};
  if (b.thread == C::THREADS - 1) {
    b.found->total = above;
    if (above < wanted) b.found->bin = 0, b.found->through = above;
  }
  pairs = __reduce_add_sync(kWarp, pairs);
  if (b.lane == 0) atomicAdd(&b.found->pairs, pairs);
  __syncthreads();
}

// Result ------------------------------------------------------------------------------------------------

// The largest first, in a network. `size` is a power of two; strides within a warp's 64 neighbours need no
// other warp.
template <class C>
__device__ __forceinline__ void sort(const Block<C>& b, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = b.thread; i < size / 2; i += C::THREADS) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const u64 one = b.list[low], other = b.list[high];
        if ((one < other) == ((low & run) == 0)) b.list[low] = other, b.list[high] = one;
      }
      if (stride > 32 || (stride == 1 && run >= 64))
        __syncthreads();
      else
        __syncwarp();
    }
  }
  __syncthreads();
}

// What threads hold, and where in the result it goes.
template <class C>
struct Held {
  u64 candidate[C::HELD];  // 0: none
  u32 place[C::HELD];
};

// Finds places for what is held, in [low, high], of which the k largest count; what is not among them is
// given away. Bins are clear, and all have met. Returns how many are held then, also in places from k on.
template <class C>
__device__ __forceinline__ u32 order(const Block<C>& b, Held<C>& h, u64 low, u64 high) {
  const u32 wanted = b.size.k;
  Bins<C, u64> bins(low, high);
  bool crowded;
  for (int looks = 1;; ++looks) {
#pragma unroll
    for (int j = 0; j < C::HELD; ++j) {
      const u32 bin = bins.of(h.candidate[j]);
      h.place[j] = bin < bins.COUNT ? atomicAdd(b.bins + bin, 1u) : 0;
    }
    __syncthreads();
    look<false>(b, wanted);
    crowded = b.found->pairs > u32{kCompared} * C::THREADS;
    if (!crowded || looks == kLooks) break;
    high = bins.highest(b.found->high_bin, high);
    bins = Bins<C, u64>(bins.lowest(b.found->bin), high);
    __syncthreads();
    clear(b);
    __syncthreads();
  }
  const u32 through = b.found->through;
#pragma unroll
  for (int j = 0; j < C::HELD; ++j) {
    const u32 bin = bins.of(h.candidate[j]), above = bin < bins.COUNT ? b.bins[bin] : wanted;
    if (above < wanted) b.list[above + h.place[j]] = h.candidate[j];
  }
  __syncthreads();
  if (crowded) {
    int sorted = 1;
    while (sorted < static_cast<int>(through)) sorted *= 2;
    for (int i = static_cast<int>(through) + b.thread; i < sorted; i += C::THREADS) b.list[i] = 0;
    __syncthreads();
    sort(b, sorted);
  }
#pragma unroll
  for (int j = 0; j < C::HELD; ++j) {
    u32 at = j * C::THREADS + b.thread;
    const u64 c = at < through ? b.list[at] : 0;
    if (c != 0 && !crowded) {
      const u32 bin = bins.of(c), end = bin == 0 ? b.found->total : b.bins[bin - 1];
      at = b.bins[bin];
      // Not unrolled: cold instructions cost more here than the loop.
#pragma unroll 1
      for (u32 other = at; other < end; ++other) at += b.list[other] > c ? 1 : 0;
    }
    h.candidate[j] = c, h.place[j] = at;
  }
  return through;
}

// The k largest of what is held, in the order of the result, into its row; value(rank, column) is what is
// written of a number. `found->most` is zero.
template <class C, class Value>
__device__ __forceinline__ void finish(const Block<C>& b, Held<C>& h, u64 low, int from, int to, int* indices,
                                       typename Block<C>::Bits* values, const Value& value) {
  u32 most = 0;
#pragma unroll
  for (int j = 0; j < C::HELD; ++j) {
    const u32 rank = b.rank(h.candidate[j]);
    most = rank > most ? rank : most;
  }
  b.raise(&b.found->most, most);
  clear(b);
  __syncthreads();
  const u32 k = b.size.k, chosen = order(b, h, low, b.last_of(b.found->most)),
            filled = chosen < k ? chosen : k;
  if constexpr (C::BY_INDEX) {
    // The column first, and then the rank.
    __syncthreads();
    clear(b);
#pragma unroll
    for (int j = 0; j < C::HELD; ++j) {
      const u64 c = h.place[j] < k ? h.candidate[j] : 0;
      h.candidate[j] = (c & b.last_column) << 32 | b.rank(c);
    }
    __syncthreads();
    order(b, h, (u64{b.last_column} - (to - 1)) << 32 | 1, (u64{b.last_column} - from) << 32 | 0xFFFFFFFFu);
  }
#pragma unroll
  for (int j = 0; j < C::HELD; ++j) {
    const u64 c = h.candidate[j];
    if (c == 0 || h.place[j] >= k) continue;
    const int column = b.column(C::BY_INDEX ? c >> 32 : c);
    indices[h.place[j]] = column;
    if constexpr (C::VALUES)
      values[h.place[j]] = value(C::BY_INDEX ? static_cast<u32>(c) : b.rank(c), column);
  }
  for (u32 i = filled + b.thread; i < k; i += C::THREADS) {
    indices[i] = -1;
    if constexpr (C::VALUES) values[i] = Block<C>::N::kMinusInfinity;
  }
}

}  // namespace jdg
