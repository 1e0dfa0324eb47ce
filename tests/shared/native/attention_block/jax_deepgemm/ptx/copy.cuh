// Copies that a thread makes by itself, made when they are waited for.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

struct Copy {
  u32 to;
  const void* from;
  u32 bytes;
};
inline Each<std::vector<Copy>> copies;

inline void copy_async(u32 to, const void* from, u32 bytes) {
  if (to % 16 || reinterpret_cast<u64>(from) % 16) std::abort();
  copies->push_back({to, from, bytes});
}
inline void copy_async_commit() {}
inline void copy_async_wait() {
  for (const Copy& one : *copies) {
    std::memset(shared + one.to, 0, 16);
    std::memcpy(shared + one.to, one.from, one.bytes);
  }
  copies->clear();
}

}  // namespace jdg::ptx
