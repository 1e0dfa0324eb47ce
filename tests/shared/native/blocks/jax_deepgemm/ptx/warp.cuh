// ptx/warp.cuh for CPU threads.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

inline u32 reduce_max(u32 v) {
  u32 most = 0;
  exchange(v, [&](unsigned, u32 other) { most = other > most ? other : most; });
  return most;
}

}  // namespace jdg::ptx
