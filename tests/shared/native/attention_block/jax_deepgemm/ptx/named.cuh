// Named barriers that some threads only arrive at.
#pragma once

#include <jax_deepgemm/ptx/barrier.cuh>

namespace jdg::ptx {

template <int ID, int THREADS>
void named_barrier_arrive() {
  named_at(ID, THREADS).arrive();
}

}  // namespace jdg::ptx
