// What routing kernels take from CUDA and from the other headers in this directory's place, for warps of 32
// threads of a CPU, one warp after the other: shuffles and votes that all lanes reach, shared memory as
// static variables.
#pragma once

#include <barrier>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

inline thread_local struct {
  unsigned x;
} threadIdx, blockIdx;

inline std::barrier<> lanes(32);
inline unsigned long long exchanged[32];

inline void __syncwarp() { lanes.arrive_and_wait(); }

template <class To, class From>
To bits(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
  return to;
}

template <class T>
T from_lane(T value, unsigned lane) {
  exchanged[threadIdx.x % 32] = bits<unsigned long long>(value);
  lanes.arrive_and_wait();
  const T found = bits<T>(exchanged[lane % 32]);
  lanes.arrive_and_wait();
  return found;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned step) {
  return from_lane(value, threadIdx.x ^ step);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane, unsigned width = 32) {
  return from_lane(value, (threadIdx.x & ~(width - 1)) | lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  return from_lane(value, threadIdx.x % 32 >= step ? threadIdx.x - step : threadIdx.x);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  exchanged[threadIdx.x % 32] = mine;
  lanes.arrive_and_wait();
  unsigned all = 0;
  for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(exchanged[i]) << i;
  lanes.arrive_and_wait();
  return all;
}
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline float __uint_as_float(unsigned v) { return bits<float>(v); }
inline unsigned __float_as_uint(float v) { return bits<unsigned>(v); }

namespace jdg {

using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using i64 = long long;
struct bf16 {
  u16 bits;
};
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int min(int a, int b) { return a < b ? a : b; }

namespace ptx {
inline u32 reduce_max(u32 v) {
  exchanged[threadIdx.x % 32] = v;
  lanes.arrive_and_wait();
  u32 most = 0;
  for (int i = 0; i < 32; ++i) most = exchanged[i] > most ? static_cast<u32>(exchanged[i]) : most;
  lanes.arrive_and_wait();
  return most;
}
inline float rcp_approx(float v) { return 1.0f / v; }
inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits<float>(static_cast<u32>(v.bits) << 16); }
inline bf16 to_bf16(float v) {  // NaN stays one
  const u32 all = bits<u32>(v);
  return {static_cast<u16>(v != v ? 0x7FFF : (all + 0x7FFF + (all >> 16 & 1)) >> 16)};
}
}  // namespace ptx

}  // namespace jdg

// Runs a kernel's warps, of blocks of so many threads, one after the other.
template <class Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
  for (unsigned block = 0; block < blocks; ++block)
    for (unsigned warp = 0; warp < threads; warp += 32) {
      std::vector<std::thread> all;
      for (unsigned lane = 0; lane < 32; ++lane)
        all.emplace_back([=] {
          blockIdx.x = block, threadIdx.x = warp + lane;
          kernel();
        });
      for (std::thread& one : all) one.join();
    }
}

// A file of numbers, of its size exactly, so that no access beyond it goes unseen.
template <class T>
struct Numbers {
  std::string path;
  std::vector<T> all;
  explicit Numbers(const std::string& from) : path(from) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    all.resize(bytes.size() / sizeof(T));
    std::memcpy(all.data(), bytes.data(), all.size() * sizeof(T));
  }
  T* data() { return all.data(); }
  void save() const {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(all.data()), all.size() * sizeof(T));
  }
};
