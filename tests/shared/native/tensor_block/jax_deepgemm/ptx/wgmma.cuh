// Products of FP8 or BF16 operands in swizzled shared memory. They are made when they are waited for, and not
// before, so that an operand that was overwritten too early is seen.
#pragma once

#include <deque>
#include <functional>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

struct Descriptor {
  u32 low;
  u64 plus(int bytes) const { return low + bytes; }
};
inline Descriptor k_major_descriptor(u32 smem) {
  if (smem % 1024) std::abort();
  return {smem};
}

inline Each<std::vector<std::function<void()>>> issued;
inline Each<std::deque<std::vector<std::function<void()>>>> committed;

inline void wgmma_fence() {}
inline void wgmma_commit() { committed->push_back(std::move(*issued)), issued->clear(); }
template <int PENDING>
void wgmma_wait() {
  for (; committed->size() > PENDING; committed->pop_front())
    for (const auto& product : committed->front()) product();
  __syncwarp();  // .sync: none of a warp is behind it before all are
}
template <int COUNT>
void pin(float (&)[COUNT]) {}

inline float e4m3(u32 bits) {
  const u32 e = bits >> 3 & 15, m = bits & 7;
  const float v = (bits & 127) == 127 ? NAN
                  : e == 0            ? std::ldexp(m, -9)
                                      : std::ldexp(8 + m, static_cast<int>(e) - 10);
  return bits & 128 ? -v : v;
}
template <bool FP8>
float element(u32 row, u32 k) {
  const u32 at = row + k * (FP8 ? 1 : 2), place = at ^ (at / 128 % 8 * 16);
  if (FP8) return e4m3(static_cast<unsigned char>(shared[place]));
  u16 bits;
  std::memcpy(&bits, shared + place, 2);
  return __uint_as_float(static_cast<u32>(bits) << 16);
}

// m64nNk32 or k16 of this thread: PTX ISA 9.7.15.5.
template <bool FP8, int COUNT>
void issue_product(float (&d)[COUNT], u64 a, u64 b, bool accumulate) {
  issued->push_back([&d, a, b, accumulate] {
    for (int i = 0; i < COUNT; ++i) {
      const u32 row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
      const u32 col = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      float sum = accumulate ? d[i] : 0.0f;
      for (u32 k = 0; k < (FP8 ? 32 : 16); ++k)
        sum += element<FP8>(a + row * 128, k) * element<FP8>(b + col * 128, k);
      d[i] = sum;
    }
  });
}

// m64nNk8 in TF32, A in registers: what these hold when the product is waited for.
template <int COUNT>
void issue_tf32(float (&d)[COUNT], const u32 (&a)[4], u64 b) {
  issued->push_back([&d, &a, b] {
    const auto tf32 = [](u32 bits) { return __uint_as_float(bits & 0xFFFFE000u); };
    float rows[2][8];
    for (int i = 0; i < 4; ++i)
      exchange(a[i], [&](unsigned lane, u32 bits) {
        if (lane / 4 == threadIdx.x % 32 / 4) rows[i % 2][lane % 4 + i / 2 * 4] = tf32(bits);
      });
    for (int i = 0; i < COUNT; ++i) {
      const u32 row = b + (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * 128;
      for (u32 k = 0; k < 8; ++k) {
        u32 bits;
        std::memcpy(&bits, shared + ((row + 4 * k) ^ (row / 128 % 8 * 16)), 4);
        d[i] += rows[i / 2 % 2][k] * tf32(bits);
      }
    }
  });
}

}  // namespace jdg::ptx
