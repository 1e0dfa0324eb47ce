// What pipeline.cuh takes from ptx/barrier.cuh, for CPU threads: one for each warp, its lane 0. An mbarrier
// counts arrivals and bytes, and its phases have a parity, as in PTX ISA 9.7.13.15.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>

#define __device__
#define __forceinline__ inline

inline thread_local struct {
  unsigned x;
} threadIdx;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

template <class T>
T __shfl_sync(unsigned, T value, int) {
  return value;
}
inline void __syncwarp() {}
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }
inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }

namespace jdg {

using u32 = unsigned;

namespace ptx {

struct Mbarrier {
  int arrivals = 0, pending = 0, bytes = 0;
  u32 parity = 0;  // of the phase under way
  std::mutex mutex;
  std::condition_variable completed;

  void count(int arrived, int expected) {
    const std::lock_guard lock(mutex);
    pending -= arrived, bytes += expected;
    if (pending > 0 || bytes > 0) return;
    pending = arrivals, parity ^= 1;
    completed.notify_all();
  }
};
inline std::map<u32, Mbarrier> barriers;  // complete once they are initialised

inline void mbarrier_init(u32 bar, int arrivals) {
  barriers[bar].arrivals = barriers[bar].pending = arrivals;
}
inline void mbarrier_arrive(u32 bar) { barriers.at(bar).count(1, 0); }
inline void mbarrier_expect_bytes(u32 bar, int bytes) { barriers.at(bar).count(1, bytes); }
inline void mbarrier_wait(u32 bar, u32 parity) {
  Mbarrier& at = barriers.at(bar);
  std::unique_lock lock(at.mutex);
  at.completed.wait(lock, [&] { return at.parity != parity; });
}

inline bool mbarrier_test(u32 bar, u32 parity) {
  Mbarrier& at = barriers.at(bar);
  const std::lock_guard lock(at.mutex);
  return at.parity != parity;
}

inline void wait_for_previous_kernel() {}  // there is none, and no next one
inline void let_next_kernel_start() {}

}  // namespace ptx
}  // namespace jdg
