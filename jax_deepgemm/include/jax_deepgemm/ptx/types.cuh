// Names for the few types that kernels need; no CUDA header is included anywhere in this directory.
#pragma once

namespace jdg {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// A CUtensorMap passed by value as a kernel parameter.
struct alignas(128) TensorMap {
  char opaque[128];
};

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int align_up(int a, int b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }
__host__ __device__ constexpr int min(int a, int b) { return a < b ? a : b; }

// Address in the shared window, as PTX wants it.
__device__ __forceinline__ u32 smem_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

}  // namespace jdg
