// ptx/copy.cuh for CPU threads: copies are made when their arrival comes, and reads beside what is readable
// end the program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <jax_deepgemm/ptx/memory.cuh>
#include <vector>

namespace jdg::ptx {

struct Range {
  const char *begin, *end;
  bool has(const void* at, int bytes) const {
    return at >= begin && static_cast<const char*>(at) + bytes <= end;
  }
};
inline std::vector<Range> readable;  // what threads may read by themselves

inline void must_be_readable(const void* at, int bytes) {
  for (const Range& range : readable)
    if (range.has(at, bytes)) return;
  std::fputs("read beside the operands\n", stderr);
  std::_Exit(1);
}

struct Copy {
  u32 to;
  const void* from;
  bool exists;
};
inline thread_local std::vector<Copy> copies;

inline void copy_async(u32 to, const void* from, u32 bytes) {
  if (to % 16 != 0 || reinterpret_cast<unsigned long>(from) % 16 != 0) {
    std::fputs("copied to or from no multiple of 16 bytes\n", stderr);
    std::_Exit(1);
  }
  copies.push_back({to, from, bytes == 16});
}
inline void copy_async_arrive(u32 bar) {
  for (const Copy& one : copies) {
    if (one.exists) must_be_readable(one.from, 16);
    if (one.exists)
      std::memcpy(shared + one.to, one.from, 16);
    else
      std::memset(shared + one.to, 0, 16);
  }
  copies.clear();
  mbarrier_arrive(bar);
}

}  // namespace jdg::ptx

inline int __ldg(const int* at) {
  jdg::ptx::must_be_readable(at, 4);
  return *at;
}
