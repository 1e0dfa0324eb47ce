// What a product becomes before it is stored (gemm/finish.cuh): the device code itself, one warp after the
// other, with a CPU thread for each lane.
//
// Reads cases from standard input, seven integers each:
//   kind, columns of the product n, first column of the tile, batch, rows of D, first row of the tile,
//   batches
// then, of kinds 0 to 2 and 4 (a function of each number, pairs, alpha and bias alone, halves), alpha and
// bias of every batch and the tile [64][COLS], and writes the tile of D [64][COLS or COLS / 2]; of kind 3,
// nothing, and writes D as bytes, of which holes that belong to the tile are zeros and all others 0xAA.

#include <cuda.h>

#include <cstdio>
#include <jax_deepgemm/gemm/finish.cuh>
#include <thread>
#include <vector>

struct Config {
  using Out = jdg::bf16;
  static constexpr int COLS = 128;
  static constexpr bool EVEN_N = false, GATED = true;
  static constexpr int PASSES = 1;
};

template <jdg::Function KIND>
struct Act {
  static constexpr jdg::Function FUNCTION = KIND;
  static constexpr float LIMIT = jdg::kInfinity, ALPHA = 1.0f, SHIFT = 0.0f;
  static constexpr bool INTERLEAVED = true;
};

template <jdg::Form OF, jdg::Function KIND, bool HEADS = false>
struct Plan {
  using Act = ::Act<KIND>;
  static constexpr jdg::Form FORM = OF;
  static constexpr bool ALPHA = true, BIAS = true, FILL = HEADS, QUANTIZED = false;
  static constexpr int LEFT = 128, MID = HEADS ? 64 : 0, RIGHT = 64;
};
using Each = jdg::Finish<Plan<jdg::Form::kEach, jdg::Function::kReluSquared>>;
using Pairs = jdg::Finish<Plan<jdg::Form::kInPairs, jdg::Function::kSilu>>;
using Halves = jdg::Finish<Plan<jdg::Form::kInHalves, jdg::Function::kSilu>>;
using Plain = jdg::Finish<Plan<jdg::Form::kNone, jdg::Function::kSilu>>;
using Heads = jdg::Finish<Plan<jdg::Form::kNone, jdg::Function::kSilu, true>>;

struct Case {
  int kind, n, col, batch, rows, row, batches;
};

template <class Lane>
void warps(Lane lane) {
  for (unsigned warp = 0; warp < 4; ++warp) {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 32; ++i)
      threads.emplace_back([=] {
        threadIdx.x = warp * 32 + i;
        lane(warp * 16 + i / 4, i % 4 * 2);
      });
    for (std::thread& one : threads) one.join();
  }
}

template <class F>
void apply(const Case& at, const float* alpha, const float* bias, const float* tile, std::vector<float>& d) {
  constexpr int kCols = Config::COLS, kStored = F::kGated ? kCols / 2 : kCols;
  const F finish{alpha, bias, 1, 1, nullptr, nullptr};
  d.assign(64 * kStored, 0.0f);
  warps([&](unsigned row, unsigned col) {
    float acc[kCols / 2];
    for (unsigned i = 0; i < kCols / 2; ++i)
      acc[i] = tile[(row + i / 2 % 2 * 8) * kCols + i / 4 * 8 + col + i % 2];
    const jdg::Extents p{at.rows, at.n};
    finish.of(at.batch, p).template apply<Config>(acc, p, jdg::Tile{at.row, at.col, at.batch});
    for (unsigned i = 0; i < kStored / 2; ++i)
      d[(row + i / 2 % 2 * 8) * kStored + i / 4 * 8 + col + i % 2] = acc[i];
  });
}

void fill(const Case& at) {
  const jdg::Extents p{at.rows, at.n}, out = Heads::stored(p);
  const std::size_t size = static_cast<std::size_t>(at.rows) * out.n * 2;
  std::vector<uint4> d(size / 16);
  std::memset(d.data(), 0xAA, size);
  warps([&](unsigned, unsigned) {
    Heads::fill_holes<Config>(reinterpret_cast<jdg::bf16*>(d.data()), out, at.n, jdg::Tile{at.row, at.col, 0},
                              at.row);
  });
  std::fwrite(d.data(), 1, size, stdout);
}

std::vector<float> read(std::size_t count) {
  std::vector<float> found(count);
  if (std::fread(found.data(), 4, count, stdin) != count) std::abort();
  return found;
}

int main() {
  Case at;
  while (std::fread(&at, sizeof at, 1, stdin) == 1) {
    if (at.kind == 3) {
      fill(at);
      continue;
    }
    const auto alpha = read(at.batches), bias = read(static_cast<std::size_t>(at.batches) * at.n);
    const auto tile = read(64 * Config::COLS);
    std::vector<float> d;
    const auto run = at.kind == 0   ? apply<Each>
                     : at.kind == 1 ? apply<Pairs>
                     : at.kind == 4 ? apply<Halves>
                                    : apply<Plain>;
    run(at, alpha.data(), bias.data(), tile.data(), d);
    std::fwrite(d.data(), 4, d.size(), stdout);
  }
}
