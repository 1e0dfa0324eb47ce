// Copies that a thread makes by itself, in groups: made when their group is waited for.
#pragma once

#include <deque>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

struct Copy {
  u32 to;
  const void* from;
  u32 bytes;
};
inline Each<std::vector<Copy>> copies;
inline Each<std::deque<std::vector<Copy>>> copy_groups;

inline void copy_async(u32 to, const void* from, u32 bytes) {
  if (to % 16 || reinterpret_cast<u64>(from) % 16) std::abort();
  copies->push_back({to, from, bytes});
}
inline void copy_async_commit() { copy_groups->push_back(std::move(*copies)), copies->clear(); }
template <int PENDING>
void copy_async_wait() {
  for (; copy_groups->size() > PENDING; copy_groups->pop_front())
    for (const Copy& one : copy_groups->front()) {
      std::memset(shared + one.to, 0, 16);
      std::memcpy(shared + one.to, one.from, one.bytes);
    }
}

}  // namespace jdg::ptx
