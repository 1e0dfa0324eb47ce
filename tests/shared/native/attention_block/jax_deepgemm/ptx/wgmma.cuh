// Products of 16-bit operands in swizzled shared memory or registers. They are made when they are waited for,
// and not before, so that an operand that was overwritten too early is seen.
#pragma once

#include <deque>
#include <functional>
#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg::ptx {

// Of an operand: eight rows of 128 bytes are a group (strided.cuh says how a descriptor is packed here).
struct Operand {
  u32 at, group, slab;
  explicit Operand(u64 d) : at(d & 0xFFFFF), group((d >> 20 & 0x3FFFFF) * 16), slab((d >> 42) * 16) {}
  u32 row(u32 i) const { return at + i / 8 * group + i % 8 * 128; }
};

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
template <int A, int B>
void pin(u32 (&)[A][B]) {}

template <bool HALF>
float number(u32 bits) {
  if constexpr (HALF) return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<u16>(bits)));
  return __uint_as_float(bits << 16);
}
template <bool HALF>
float element(u32 at) {
  u16 bits;
  std::memcpy(&bits, shared + (at ^ (at / 128 % 8 * 16)), 2);
  return number<HALF>(bits);
}

// m64nNk16 of this thread (PTX ISA 9.7.15.5): both operands are rows of 128 bytes of k.
template <bool HALF, int COUNT>
void issue_product(float (&d)[COUNT], u64 a, u64 b, bool accumulate) {
  issued->push_back([&d, a, b, accumulate] {
    for (int i = 0; i < COUNT; ++i) {
      const u32 row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
      const u32 col = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      float sum = accumulate ? d[i] : 0.0f;
      for (u32 k = 0; k < 16; ++k)
        sum += element<HALF>(Operand(a).row(row) + k * 2) * element<HALF>(Operand(b).row(col) + k * 2);
      d[i] = sum;
    }
  });
}

inline u32 fragments[16][32][4];  // of each lane of each warp

// A in registers: what these hold when the product is waited for. B: rows of k, 64 columns of a slab each.
template <bool HALF, int COUNT>
void issue_from_registers(float (&d)[COUNT], const u32 (&a)[4], u64 b, bool accumulate) {
  issued->push_back([&d, &a, b, accumulate] {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::memcpy(fragments[warp][lane], a, sizeof a);
    __syncwarp();
    float rows[2][16];
    for (unsigned other = 0; other < 4; ++other)
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e)
          rows[i % 2][other * 2 + i / 2 * 8 + e] =
              number<HALF>(fragments[warp][lane / 4 * 4 + other][i] >> 16 * e & 0xFFFF);
    __syncwarp();
    for (int i = 0; i < COUNT; ++i) {
      const u32 col = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const u32 at = col / 64 * Operand(b).slab + col % 64 * 2;
      float sum = accumulate ? d[i] : 0.0f;
      for (u32 k = 0; k < 16; ++k) sum += rows[i / 2 % 2][k] * element<HALF>(Operand(b).row(k) + at);
      d[i] = sum;
    }
  });
}

}  // namespace jdg::ptx
