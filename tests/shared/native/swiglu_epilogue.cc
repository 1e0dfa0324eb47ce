// The epilogue of the grouped GEMM that is fused with SwiGLU: the device code itself, one warp after the
// other, with a CPU thread for each lane.
//
// Reads cases from standard input, ten integers each:
//   rows of a matrix, matrices, features, first row of the tile, rows_end, zeros_end, feature, matrix,
//   masked, pitch of the scales (0: a row's scales are all; else in a chain, and with a bias)
// then h of the tile [64][256], the weight of every row, and the bias of every matrix, as float32; writes for
// each case all values (bytes 0xAA where nothing was stored) and all scales (-1).

#include <cuda.h>

#include <cstdio>
#include <jax_deepgemm/grouped/gemm_grouped_swiglu.cuh>
#include <thread>
#include <vector>

template <bool MASKED, bool CHAIN>
struct Config {
  static constexpr bool CHAINED = CHAIN, BIASED = CHAIN;
  static constexpr bool GATED = true, ROWS_IN_GROUPS = !MASKED;
  static constexpr int COLS = 256, PASSES = 2, ACROSS = 1, SLABS = 2;
};

struct Case {
  int rows, matrices, features, first_row, rows_end, zeros_end, feature, matrix, masked, pitch;
};

template <class C>
void run(const Case& at, const std::vector<float>& h, const jdg::SwigluResult& to) {
  for (unsigned warp = 0; warp < 4; ++warp) {
    const auto lane = [&](unsigned index) {
      threadIdx.x = warp * 32 + index;
      jdg::MainLoop<C> loop{};
      for (int i = 0; i < C::COLS / 2; ++i) {  // the accumulator of wgmma, PTX ISA 9.7.15.5
        const unsigned row = warp * 16 + index / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + index % 4 * 2 + i % 2;
        loop.acc[0][i] = h[row * C::COLS + col];
      }
      const jdg::GroupTile tile{
          {at.first_row, 2 * at.feature, at.matrix, at.matrix}, at.rows_end, at.zeros_end};
      const jdg::SwigluTiles<C> tiles{{{0}, {}, {at.rows}, nullptr, nullptr, nullptr, {}, {tile}}, to};
      tiles.store(loop, {at.first_row});
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 32; ++i) threads.emplace_back(lane, i);
    for (std::thread& one : threads) one.join();
  }
}

template <class T>
std::vector<T> read(std::size_t count) {
  std::vector<T> found(count);
  if (std::fread(found.data(), sizeof(T), count, stdin) != count) std::abort();
  return found;
}

int main() {
  Case at;
  while (std::fread(&at, sizeof at, 1, stdin) == 1) {
    const auto rows = static_cast<std::size_t>(at.rows) * at.matrices;
    const auto h = read<float>(64 * 256), weights = read<float>(rows);
    const auto bias = read<float>(static_cast<std::size_t>(at.matrices) * 2 * at.features);
    std::vector<jdg::u8> values(rows * at.features + 16, 0xAA);
    jdg::u8* aligned = values.data();
    while (reinterpret_cast<std::size_t>(aligned) % 16) ++aligned;
    const int pitch = at.pitch ? at.pitch : at.features / 128;
    std::vector<float> scales(rows * pitch, -1.0f);
    const jdg::SwigluResult to{aligned, scales.data(), weights.data(), bias.data(), at.features, pitch};
    if (at.pitch)
      at.masked ? run<Config<true, true>>(at, h, to) : run<Config<false, true>>(at, h, to);
    else
      at.masked ? run<Config<true, false>>(at, h, to) : run<Config<false, false>>(at, h, to);
    std::fwrite(aligned, 1, rows * at.features, stdout);
    std::fwrite(scales.data(), 4, scales.size(), stdout);
  }
}
