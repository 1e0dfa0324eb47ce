// Keys and values of tokens into pages of a cache, keys turned by a rotary embedding; queries turned, too.
//
//   k [tokens, heads, D], v [tokens, heads, DV]  ->  cache [layers, pages, heads, page, D or DV] at the slots
//   q [tokens, q_heads, D]                       ->  turned [tokens, q_heads, D]
//
//   a thread   two pieces of WIDE neighbours of HELD heads of one token: those whose numbers turn together,
//              so that angles are computed once for HELD heads. All are loaded before the first is stored
//   LANES      threads of a token; a block has as many tokens as it has room for
//   grid y     HELD heads of the queries, then of the keys, then of the values
//
// Slots outside of the pages, and a layer outside of the cache, are skipped. Nothing waits for another. A
// cache that is read by another thread at the same time does not exist: slots are distinct.
#pragma once

#include <jax_deepgemm/paged_append/stored.cuh>
#include <jax_deepgemm/paged_append/turn.cuh>

namespace jdg {

// What a kernel is told at compile time; ops/paged_append/kernels.py writes it as `struct Config`.
// clang-format off
template <class C>
concept AppendConfig = requires {
  typename C::In;      // of k, v, q: bf16, f16 or float
  typename C::Stored;  // of the cache: bf16, f16 or e4m3
  C::D, C::DV;         // numbers of a key and of a value, multiples of 16
  C::PAIRS;            // of numbers of a key that turn; 0: none
  C::INTERLEAVED;      // bool: pairs are neighbours, else PAIRS apart
  C::WIDE;             // neighbours that are loaded at once, up to 8: divides PAIRS, or 2 PAIRS if INTERLEAVED
  C::QUERIES;          // bool: whether there are some
};
// clang-format on

constexpr int kHeldHeads = 4, kValuesWide = 8;

template <AppendConfig C>
constexpr int kKeyLanes = C::D / (2 * C::WIDE);
template <AppendConfig C>
constexpr int kAppendLanes =
    kKeyLanes<C> > C::DV / (2 * kValuesWide) ? kKeyLanes<C> : C::DV / (2 * kValuesWide);

template <AppendConfig C>
struct Tokens {
  const typename C::In *k, *v, *q;
  const int *slots, *positions;
  const float* inv_freq;
  typename C::In* turned;
  int count, heads, q_heads;
};

template <AppendConfig C>
struct Pages {
  typename C::Stored *k, *v;
  const float *k_scale, *v_scale;
  const int* layer;
  int layers, pages, page;
};

// What a thread has of a head: its two pieces, in numbers from the head's begin, and how their numbers turn.
template <AppendConfig C>
struct KeyPart {
  static constexpr bool kTurns = C::PAIRS > 0;
  int first, second;
  bool first_turns, second_turns;
  float cos[C::WIDE], sin[C::WIDE];

  __device__ __forceinline__ explicit KeyPart(int lane) {
    constexpr int kTurning = C::INTERLEAVED ? 0 : C::PAIRS / C::WIDE;  // lanes whose pieces are a pair
    const bool paired = lane < kTurning;
    first = (paired ? lane : lane + kTurning) * C::WIDE;
    second = first + (paired ? C::PAIRS : C::D / 2 - kTurning * C::WIDE);
    first_turns = C::INTERLEAVED ? first < 2 * C::PAIRS : paired;
    second_turns = C::INTERLEAVED ? second < 2 * C::PAIRS : paired;
  }

  __device__ __forceinline__ void angles(int position, const float* inv_freq) {
    const float at = static_cast<float>(position);
#pragma unroll
    for (int i = 0; i < C::WIDE; ++i) {
      const bool later = i >= C::WIDE / 2;  // of interleaved pairs, half are the second piece's
      const bool turns = C::INTERLEAVED && later ? second_turns : first_turns;
      const int pair = !C::INTERLEAVED ? first + i : later ? second / 2 + i - C::WIDE / 2 : first / 2 + i;
      const Turn turn = turn_by(turns ? __fmul_rn(at, inv_freq[pair]) : 0.0f);
      cos[i] = turn.cos, sin[i] = turn.sin;
    }
  }

  __device__ __forceinline__ void turn(float (&a)[C::WIDE], float (&b)[C::WIDE]) const {
    if constexpr (!C::INTERLEAVED) {
      if (!first_turns) return;
#pragma unroll
      for (int i = 0; i < C::WIDE; ++i) {
        const float x = a[i], y = b[i];
        a[i] = x * cos[i] - y * sin[i], b[i] = x * sin[i] + y * cos[i];
      }
    } else {
      if (first_turns) turn_neighbours(a, 0);
      if (second_turns) turn_neighbours(b, C::WIDE / 2);
    }
  }

 private:
  __device__ __forceinline__ void turn_neighbours(float (&v)[C::WIDE], int angle) const {
#pragma unroll
    for (int i = 0; i < C::WIDE / 2; ++i) {
      const float x = v[2 * i], y = v[2 * i + 1], c = cos[angle + i], s = sin[angle + i];
      v[2 * i] = x * c - y * s, v[2 * i + 1] = x * s + y * c;
    }
  }
};

template <AppendConfig C>
struct ValuePart {
  static constexpr bool kTurns = false;
  int first, second;
  __device__ __forceinline__ explicit ValuePart(int lane)
      : first(lane * kValuesWide), second(first + C::DV / 2) {}
  __device__ __forceinline__ void turn(float (&)[kValuesWide], float (&)[kValuesWide]) const {}
};

template <class Out, int COUNT>
__device__ __forceinline__ Neighbours<Out, COUNT> narrowed(const float (&v)[COUNT], const float* scale) {
  Neighbours<Out, COUNT> all;
  const float by = is_same<Out, e4m3> ? *scale : 1.0f;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) narrow(is_same<Out, e4m3> ? ptx::div_rn(v[i], by) : v[i], all.v[i]);
  return all;
}

// Pieces of some heads from `from` to `to`, heads `from_step` and `to_step` numbers apart. `scale`: of each
// head of an FP8 cache, what numbers are divided by.
template <int WIDE, class In, class Out, class Part>
__device__ __forceinline__ void move_heads(const In* from, Out* to, i64 from_step, i64 to_step, int heads,
                                           const Part& part, const float* scale) {
  Neighbours<In, WIDE> held[kHeldHeads][2];
#pragma unroll
  for (int h = 0; h < kHeldHeads; ++h) {
    if (h >= heads) continue;
    held[h][0] = *at<Neighbours<In, WIDE>>(from + h * from_step + part.first);
    held[h][1] = *at<Neighbours<In, WIDE>>(from + h * from_step + part.second);
  }
#pragma unroll
  for (int h = 0; h < kHeldHeads; ++h) {
    if (h >= heads) continue;
    auto *x = at<Neighbours<Out, WIDE>>(to + h * to_step + part.first),
         *y = at<Neighbours<Out, WIDE>>(to + h * to_step + part.second);
    if constexpr (is_same<In, Out> && !Part::kTurns) {
      *x = held[h][0], *y = held[h][1];
    } else {
      float a[WIDE], b[WIDE];
#pragma unroll
      for (int i = 0; i < WIDE; ++i) a[i] = wide(held[h][0].v[i]), b[i] = wide(held[h][1].v[i]);
      part.turn(a, b);
      *x = narrowed<Out>(a, scale + h), *y = narrowed<Out>(b, scale + h);
    }
  }
}

// The same into the pages, heads from `head` on.
template <AppendConfig C, int DEPTH, int WIDE, class Part>
__device__ __forceinline__ void append_heads(const Tokens<C>& tokens, const Pages<C>& cache,
                                             const typename C::In* from, typename C::Stored* to,
                                             const float* scale, int token, int head, const Part& part) {
  const int layer = *cache.layer, slot = tokens.slots[token];
  const int page = slot / cache.page;
  const i64 row = (static_cast<i64>(layer) * cache.pages + page) * tokens.heads + head;
  move_heads<WIDE>(from + (static_cast<i64>(token) * tokens.heads + head) * DEPTH,
                   to + (row * cache.page + slot - page * cache.page) * DEPTH, DEPTH,
                   static_cast<i64>(cache.page) * DEPTH, tokens.heads - head, part,
                   scale + static_cast<i64>(layer) * tokens.heads + head);
}

template <AppendConfig C>
__device__ __forceinline__ bool is_stored(const Tokens<C>& tokens, const Pages<C>& cache, int token) {
  const i64 slots = static_cast<i64>(cache.pages) * cache.page;
  const int slot = tokens.slots[token];
  return static_cast<u32>(*cache.layer) < static_cast<u32>(cache.layers) && slot >= 0 && slot < slots;
}

template <AppendConfig C>
__device__ __forceinline__ void append(const Tokens<C>& tokens, const Pages<C>& cache) {
  const int of_block = static_cast<int>(blockDim.x) / kAppendLanes<C>;
  const int own = static_cast<int>(threadIdx.x) / kAppendLanes<C>;
  const int lane = static_cast<int>(threadIdx.x) % kAppendLanes<C>;
  const int token = static_cast<int>(blockIdx.x) * of_block + own;
  if (own >= of_block || token >= tokens.count) return;
  const int queries = C::QUERIES ? (tokens.q_heads + kHeldHeads - 1) / kHeldHeads : 0;
  const int keys = (tokens.heads + kHeldHeads - 1) / kHeldHeads;
  const int group = static_cast<int>(blockIdx.y);
  const bool stored = group < queries || is_stored(tokens, cache, token);
  if (!stored) return;
  if (group >= queries + keys) {
    if (lane >= C::DV / (2 * kValuesWide)) return;
    append_heads<C, C::DV, kValuesWide>(tokens, cache, tokens.v, cache.v, cache.v_scale, token,
                                        (group - queries - keys) * kHeldHeads, ValuePart<C>(lane));
    return;
  }
  if (lane >= kKeyLanes<C>) return;
  KeyPart<C> part(lane);
  if constexpr (C::PAIRS > 0) part.angles(tokens.positions[token], tokens.inv_freq);
  if constexpr (C::QUERIES) {
    if (group < queries) {
      const int head = group * kHeldHeads;
      const i64 at = (static_cast<i64>(token) * tokens.q_heads + head) * C::D;
      move_heads<C::WIDE>(tokens.q + at, tokens.turned + at, C::D, C::D, tokens.q_heads - head, part,
                          nullptr);
      return;
    }
  }
  append_heads<C, C::D, C::WIDE>(tokens, cache, tokens.k, cache.k, cache.k_scale, token,
                                 (group - queries) * kHeldHeads, part);
}

}  // namespace jdg
