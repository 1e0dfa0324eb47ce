// Small matrices whose rows and columns have sums of 1, nearly, after Sinkhorn and Knopp, and the gradient of
// their logits. A thread has a matrix, in registers.
//
//   forward     softmax of each row, + eps; then columns, rows, columns, .. are divided by their sums + eps,
//               `steps` times in all, beginning and ending with columns
//   gradient    the same, and what was divided by is kept, in shared memory [step][i][thread]; then the steps
//               back, each of which gives the matrix before it by a multiplication
//
// A step b_ij = a_ij / s_j with s_j = sum_i a_ij + eps has the gradient (g_ij - sum_i g_ij b_ij) / s_j.
// Threads meet nowhere: each has its own column of the shared memory.
#pragma once

#include <jax_deepgemm/ptx/memory.cuh>

namespace jdg {

template <int N>
struct SinkhornMatrix {
  float m[N][N];

  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < N * N; ++i) m[i / N][i % N] = from[i];
  }
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < N * N; ++i) to[i] = m[i / N][i % N];
  }

  // Element i of line `line`, which is a row or a column.
  __device__ __forceinline__ float& at(bool rows, int line, int i) { return rows ? m[line][i] : m[i][line]; }

  __device__ __forceinline__ void softmax() {
#pragma unroll
    for (int row = 0; row < N; ++row) {
      float most = m[row][0], sum = 0.0f;
#pragma unroll
      for (int i = 1; i < N; ++i) most = fmaxf(most, m[row][i]);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += m[row][i] = expf(m[row][i] - most);
#pragma unroll
      for (int i = 0; i < N; ++i) m[row][i] /= sum;
    }
  }

  __device__ __forceinline__ void add(float eps) {
#pragma unroll
    for (int i = 0; i < N * N; ++i) m[i / N][i % N] += eps;
  }

  // Divides lines by their sums, which it returns.
  __device__ __forceinline__ void divide(bool rows, float eps, float (&sums)[N]) {
#pragma unroll
    for (int line = 0; line < N; ++line) {
      float sum = at(rows, line, 0);
#pragma unroll
      for (int i = 1; i < N; ++i) sum += at(rows, line, i);
      sums[line] = sum + eps;
#pragma unroll
      for (int i = 0; i < N; ++i) at(rows, line, i) /= sums[line];
    }
  }

  // This is the gradient of a step's result, and `after` that result: gives those of what the step was of.
  __device__ __forceinline__ void step_back(bool rows, const float (&sums)[N], SinkhornMatrix& after) {
#pragma unroll
    for (int line = 0; line < N; ++line) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) dot = fmaf(at(rows, line, i), after.at(rows, line, i), dot);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        at(rows, line, i) = (at(rows, line, i) - dot) / sums[line];
        after.at(rows, line, i) *= sums[line];
      }
    }
  }
};

template <int N>
__device__ __forceinline__ void sinkhorn(const float* logits, float* result, int count, int steps,
                                         float eps) {
  const i64 which = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (which >= count) return;
  SinkhornMatrix<N> matrix;
  float sums[N];
  matrix.load(logits + which * N * N);
  matrix.softmax();
  matrix.add(eps);
  matrix.divide(false, eps, sums);
#pragma unroll 1
  for (int step = 1; step < steps; step += 2) {
    matrix.divide(true, eps, sums);
    matrix.divide(false, eps, sums);
  }
  matrix.store(result + which * N * N);
}

template <int N>
__device__ __forceinline__ void sinkhorn_gradient(const float* logits, const float* by, float* gradient,
                                                  int count, int steps, float eps) {
  extern __shared__ __align__(1024) char shared[];
  const i64 which = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (which >= count) return;
  const u32 mine = smem_address(shared) + threadIdx.x * 4, pitch = blockDim.x * 4;
  SinkhornMatrix<N> matrix, g;
  float sums[N];
  matrix.load(logits + which * N * N);
  matrix.softmax();
  matrix.add(eps);
  const auto forward = [&](bool rows, int step) {
    matrix.divide(rows, eps, sums);
#pragma unroll
    for (int i = 0; i < N; ++i) ptx::store_shared(mine + (step * N + i) * pitch, sums[i]);
  };
  const auto back = [&](bool rows, int step) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = ptx::load_shared(mine + (step * N + i) * pitch);
    g.step_back(rows, sums, matrix);
  };

  forward(false, 0);
#pragma unroll 1
  for (int step = 1; step < steps; step += 2) forward(true, step), forward(false, step + 1);
  g.load(by + which * N * N);
#pragma unroll 1
  for (int step = steps - 1; step > 0; step -= 2) back(false, step), back(true, step - 1);
  back(false, 0);

  matrix.load(logits + which * N * N);
  matrix.softmax();
#pragma unroll
  for (int row = 0; row < N; ++row) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) dot = fmaf(g.m[row][i], matrix.m[row][i], dot);
#pragma unroll
    for (int i = 0; i < N; ++i) g.m[row][i] = matrix.m[row][i] * (g.m[row][i] - dot);
  }
  g.store(gradient + which * N * N);
}

}  // namespace jdg
