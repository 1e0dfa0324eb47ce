// Loads of boxes into shared memory, done at once: elements outside are zeros, and rows of 32, 64 or 128
// bytes may be swizzled. What the hardware refuses ends the program.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

// What lies in a TensorMap's bytes: sizes innermost first, strides in bytes.
struct Box {
  const char* from;
  int element, rank, swizzle;  // 0, 32, 64 or 128 bytes
  long long dims[3], strides[3];
  int box[3];
};

inline TensorMap make_map(const Box& box) {
  TensorMap map;
  static_assert(sizeof(Box) <= sizeof(TensorMap));
  std::memcpy(&map, &box, sizeof box);
  return map;
}

inline void load_box(u32 smem, const TensorMap& map, u32 bar, const int (&at)[3]) {
  Box m;
  std::memcpy(&m, &map, sizeof m);
  const int row = m.box[0] * m.element;
  if (at[0] * m.element % 16 || smem % (m.swizzle ? 8 * m.swizzle : 128)) std::abort();
  if (m.swizzle && row != m.swizzle) std::abort();
  u32 to = smem;
  for (int z = 0; z < m.box[2]; ++z)
    for (int y = 0; y < m.box[1]; ++y)
      for (int x = 0; x < m.box[0]; ++x, to += m.element) {
        const long long where[3] = {at[0] + x, at[1] + y, at[2] + z};
        bool inside = true;
        for (int i = 0; i < 3; ++i) inside &= where[i] >= 0 && where[i] < m.dims[i];
        const char* from = m.from;
        for (int i = 0; i < 3; ++i) from += where[i] * m.strides[i];
        char* const place = shared + (m.swizzle ? to ^ (to / 128 % (m.swizzle / 16) * 16) : to);
        if (place + m.element > shared + sizeof shared) std::abort();
        inside ? std::memcpy(place, from, m.element) : std::memset(place, 0, m.element);
      }
  barriers.at(bar).count(0, -static_cast<int>(to - smem));
}
inline void tma_load(u32 smem, const TensorMap& map, u32 bar, int x, int y = 0, int z = 0) {
  load_box(smem, map, bar, {x, y, z});
}

inline void tma_load_once(u32 smem, const TensorMap& map, u32 bar, int x, int y, int z) {
  load_box(smem, map, bar, {x, y, z});
}

}  // namespace jdg::ptx
