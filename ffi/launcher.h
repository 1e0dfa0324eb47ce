// One custom call at run time.
//
// clang-format off
//   instantiate   attributes -> LaunchState: decodes the plan, keeps carried cubins. No driver call: it also
//                 runs where XLA compiles for a GPU that is not there.
//   prepare,      loads the kernels into the current context, sets their attributes, fixes the grids that
//   initialize    depend on the device: before any capture, and in prepare before collectives may start
//                 (loading can wait for a kernel that waits for this device).
//   execute       checks addresses, encodes tensor maps, launches. The same launches every time, so XLA may
//                 capture them in a command buffer. No allocation, no synchronisation, no Python.
// clang-format on

#ifndef JAX_DEEPGEMM_FFI_LAUNCHER_H_
#define JAX_DEEPGEMM_FFI_LAUNCHER_H_

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "library.h"
#include "plan.h"
#include "tensor_map.h"

namespace jdg {

struct BufferView {
  void* data = nullptr;
  uint64_t size = 0;
};

// The call's buffers; `results` are the op's own, then the plan's scratch.
struct BufferViews {
  std::array<BufferView, kMaxBuffers> operands;
  std::array<BufferView, kMaxBuffers> results;
  size_t num_operands = 0;
  size_t num_results = 0;
};

class LaunchState {
 public:
  explicit LaunchState(LaunchPlan plan);

  const LaunchPlan& plan() const { return plan_; }

  // Loads every kernel in the current context. False: no context is current.
  bool Load();

  void Execute(CUstream stream, const BufferViews& buffers);

  // Throws what Execute would of these buffers: missing, too small, or at an address that TMA or a memset of
  // 4 bytes cannot use.
  void CheckBuffers(const BufferViews& buffers) const;

 private:
  struct Loaded {
    unsigned long long context_id;
    std::vector<LoadedKernel> kernels;  // per step, empty for those that are no launch
  };

  const Loaded* LoadIn(const Driver& driver);
  void Run(const Driver& driver, const Launch& launch, const LoadedKernel& kernel, CUstream stream,
           const BufferViews& buffers, size_t first_cache);
  void Set(const Driver& driver, const Memset& memset, CUstream stream, const BufferViews& buffers) const;
  void CheckScratch(const BufferViews& buffers) const;
  uintptr_t Address(const BufferViews& buffers, const BufferRef& buffer) const;
  uintptr_t MemsetAddress(const BufferViews& buffers, const Memset& memset) const;
  uintptr_t TensorMapAddress(const BufferViews& buffers, const Launch& launch, size_t param) const;

  LaunchPlan plan_;
  std::vector<size_t> first_cache_;  // per step: its first entry of caches_
  std::deque<TensorMapCache> caches_;
  std::mutex mutex_;  // guards loaded_, whose elements stay where they are
  std::deque<Loaded> loaded_;
};

// Executions of the handler in this process (captures count, replays of a captured graph do not reach it).
struct ExecuteCounters {
  uint64_t count;
  uint64_t nanoseconds;  // host time spent in it
};
ExecuteCounters GetExecuteCounters();
void ResetExecuteCounters();
void CountExecute(uint64_t nanoseconds);

}  // namespace jdg

#endif  // JAX_DEEPGEMM_FFI_LAUNCHER_H_
