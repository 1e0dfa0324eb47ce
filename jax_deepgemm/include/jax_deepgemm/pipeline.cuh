// A pipeline through shared memory: one producer thread fills slots through TMA, consumer warps read them,
// and each runs as far ahead as the slots allow. It knows nothing of what is in a slot.
//
// clang-format off
//   producer thread                            every consumer warp
//
//   wait_empty()      all warps released it    wait_full()       its bytes have arrived
//   expect(bytes)     ... on full()            read slot `stage`
//   TMA load(s) that count on full()           release(empty())  by one lane
//   advance()         to the next slot         advance()
//
//   full[s]    1 arrival and the bytes expected     producer -> consumers (or an arrival of each of several)
//   empty[s]   1 arrival of each consumer warp      consumers -> producer
//
//   shared memory from AT on:   full[STAGES] | empty[STAGES] | record[STAGES]
//                               8 bytes each | 8 bytes each  | 16 bytes each
// clang-format on
//
// Each side has its own Pipeline object and counts for itself: `stage` is the slot it stands at, and `phase`
// changes with every round over the slots. An mbarrier completes one phase after the other, and a wait names
// a phase by its parity only. The consumers' first wait on a slot is for parity 0, its first filling. The
// producer's first wait is for parity 1, which counts as completed on a fresh barrier, so all slots begin
// empty.
//
// Hazard: because of the parity a side must not look at a slot that is more than one phase away from it. Each
// side takes all slots in order, so it never does. In turns (below) a warpgroup leaves slots out.
//
// Hazard: a load from shared memory may still be under way when its warp arrives at an mbarrier behind it.
// Only an instruction that uses the loaded value proves it done. wgmma_wait proves it for what wgmma reads.
//
// tests/shared/native/pipeline.cc runs this file on the CPU, with a thread for each warp.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg {

// The index of this thread's warpgroup or warp. The shuffle tells the compiler that it is the same for a
// whole warp, so that what depends on it is computed in uniform registers.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0); }
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0); }
struct Record {
  int x, y, z;
  bool flag;
};

template <int STAGES, u32 AT>
struct Pipeline {
  static constexpr u32 kRecords = AT + 2 * STAGES * 8;  // 16-byte aligned
  static constexpr u32 kEnd = kRecords + STAGES * 16;
  static_assert(AT % 16 == 0, "records are 16 bytes");

  u32 smem;  // where the block's shared memory begins
  int stage = 0;
  u32 phase = 0;

  __device__ __forceinline__ explicit Pipeline(u32 smem) : smem(smem) {}

  // Barriers of this slot and, for consumers, of the one that is `ahead` further on in the same round.
  __device__ __forceinline__ u32 full(int ahead = 0) const { return smem + AT + stage * 8 + ahead * 8; }
  __device__ __forceinline__ u32 empty(int ahead = 0) const { return full() + STAGES * 8 + ahead * 8; }

  // By one thread of the block, once; then fence_mbarrier_init and a barrier of the block.
  __device__ __forceinline__ void init(int consumer_warps, int producers = 1) const {
    Pipeline at(smem);
    for (at.stage = 0; at.stage < STAGES; ++at.stage) {
      ptx::mbarrier_init(at.full(), producers);
      ptx::mbarrier_init(at.empty(), consumer_warps);
    }
  }

  template <int SLOTS = 1>  // a divisor of STAGES
  __device__ __forceinline__ void advance() {
    stage += SLOTS;
    if (stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }

  // --- producer ---
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ void expect(u32 bytes) const { ptx::mbarrier_expect_bytes(full(), bytes); }
  __device__ __forceinline__ void fill_with_nothing() const { ptx::mbarrier_arrive(full()); }

  // A record travels with a slot: three integers and a flag of the producer's choice, such as which tile
  // begins here, so that consumers need no arithmetic for it. It may be overwritten when its slot may.
  __device__ __forceinline__ void publish(int x, int y, int z, bool flag = false) const {
    ptx::store_shared_4(smem + kRecords + stage * 16, x, y, z, flag);
  }

  // --- consumers ---
  __device__ __forceinline__ void wait_full(int ahead = 0) const { ptx::mbarrier_wait(full(ahead), phase); }

  __device__ __forceinline__ bool is_full() const { return ptx::mbarrier_test(full(), phase); }

  // By one lane of each warp. The slot is named by its empty barrier, because a consumer has often moved on
  // before it may release it.
  __device__ __forceinline__ static void release(u32 empty) { ptx::mbarrier_arrive(empty); }

  // Waits for a slot, whose record this is. Lane 0 reads it, because lane 0 is the one that later releases
  // the slot. FLAG: whether the flag is wanted.
  template <bool FLAG = true>
  __device__ __forceinline__ Record receive() const {
    wait_full();
    float4 record = {0.0f, 0.0f, 0.0f, 0.0f};
    if (threadIdx.x % 32 == 0) record = ptx::load_shared_4(smem + kRecords + stage * 16);
    const auto shared = [](float v) { return __float_as_int(__shfl_sync(0xFFFFFFFF, v, 0)); };
    Record out = {shared(record.x), shared(record.y), shared(record.z), false};
    if constexpr (FLAG) out.flag = shared(record.w) != 0;
    return out;
  }

  // Takes and hands back a slot that holds nothing.
  //
  // Hazard: all lanes must have left the wait. Once lane 0 has released the slot, the producer, which has
  // nothing to load either, can complete the barrier's next phase before a lane that lags behind looks at
  // this one, and that lane would wait for ever. Between wait and release of other slots stands wgmma, which
  // all lanes execute together.
  __device__ __forceinline__ void pass(int ahead = 0) const {
    wait_full(ahead);
    __syncwarp();
    if (threadIdx.x % 32 == 0) release(empty(ahead));
  }
};

// Two consumer warpgroups that take pieces of work in turn (ping-pong): whoever finds the end of its piece
// hands the pipeline over to the other. Behind the barrier of each stands the slot where its piece begins.
//
// Hazard: a warpgroup must not look at slots further on, because it tells one phase from the next only. It
// comes to its piece when all slots before it were full. Each warpgroup has a place of its own to read from,
// which is written again when all of its warps have handed over.
template <u32 AT>
struct Turns {
  static constexpr u32 kBytes = 2 * 16;

  u32 phase = 0;

  __device__ __forceinline__ static u32 barrier(u32 smem, int warpgroup) {
    return smem + AT + warpgroup * 16;
  }

  __device__ __forceinline__ static void init(u32 smem) {
    ptx::mbarrier_init(barrier(smem, 0), 4);
    ptx::mbarrier_init(barrier(smem, 1), 4);
  }

  // From `warpgroup` to the other, whose piece begins where `pipeline` stands.
  template <class P>
  __device__ __forceinline__ static void pass(const P& pipeline, int warpgroup) {
    const u32 turn = barrier(pipeline.smem, 1 - warpgroup);
    if (threadIdx.x % 128 == 0)
      ptx::store_shared_2(turn + 8, __int_as_float(pipeline.stage), __uint_as_float(pipeline.phase));
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(turn);
  }

  // Lane 0 reads, as in Pipeline::receive.
  template <class P>
  __device__ __forceinline__ void await(P& pipeline, int warpgroup) {
    const u32 turn = barrier(pipeline.smem, warpgroup);
    ptx::mbarrier_wait(turn, phase);
    phase ^= 1;
    float2 passed = {0.0f, 0.0f};
    if (threadIdx.x % 32 == 0) passed = ptx::load_shared_2(turn + 8);
    pipeline.stage = __shfl_sync(0xFFFFFFFF, __float_as_int(passed.x), 0);
    pipeline.phase = __shfl_sync(0xFFFFFFFF, __float_as_uint(passed.y), 0);
  }
};

}  // namespace jdg
