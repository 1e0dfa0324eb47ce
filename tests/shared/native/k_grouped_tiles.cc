// The producer and the main loop of K-grouped products with scales of 1x128 and 128x128, by CPU threads: a
// producer, and a thread for each consumer warp, which stands for one of its lanes. Tiles of many lengths in
// a row; what a group has behind its last instruction along k is garbage. Exits with 1 at the first wrong
// sum.

#include <cmath>
#include <jax_deepgemm/gemm/fp8_loop.cuh>
#include <thread>
#include <vector>

using namespace jdg;

struct Mma {
  template <int COUNT>
  static void issue(float (&d)[COUNT], u64 a, u64 b, bool accumulate) {
    ptx::multiply(d, a, b, accumulate);
  }
};

template <int HEIGHT, int WIDTH, int SLOTS>
struct Config {
  using Mma = ::Mma;
  using Out = float;
  static constexpr bool ROWS_K_MAJOR = true, COLS_K_MAJOR = true, SWAP_AB = false, GATED = false;
  static constexpr bool MASK_K = false, WHOLE_BLOCKS = true, HALVES = false, PING_PONG = false;
  static constexpr bool ROWS_ONCE = false, COLS_ONCE = false, RUNS = false;
  static constexpr bool ROWS_BY_INDEX = false, COLS_BY_INDEX = false;
  static constexpr Scale ROW_SCALES = Scale::kSlices, COL_SCALES = Scale::kBlockSlices;
  static constexpr int ROWS = HEIGHT, COLS = WIDTH, BLOCK_K = 128, STAGES = SLOTS, SPLITS = 1;
  static constexpr int ACROSS = HEIGHT == 64 ? 2 : 1, PASSES = WIDTH / ACROSS == 256 ? 2 : 1;
  static constexpr int WARPGROUPS = HEIGHT == 256 ? 2 : HEIGHT / 64 * ACROSS;
  static constexpr int REGISTERS = WARPGROUPS == 3 ? 160 : 232, PRODUCER_REGISTERS = 40;
  static constexpr int SCALE_SLOTS = ceil_div(STAGES, 4) + 1, SLABS = 0, STAGING_BYTES = 0, TABLE_BYTES = 0;
  static constexpr int SHARED_BYTES = 1 << 18;
};

constexpr int kM = 300, kN = 1100, kBlockCols = 12;  // scales of columns, padded to whole 16 bytes
constexpr int kSizes[] = {130, 0, 1, 33, 512, 640, 97, 129, 900, 64, 0, 385, 1153, 256, 31};

struct Group {
  int first, size;  // block of k, rows
};

struct Problem {
  std::vector<Group> groups;
  int k_blocks = 0;
  std::vector<signed char> a, b;          // [rows, k]
  std::vector<float> row_scales, scales;  // [k_blocks, m], [k_blocks, kBlockCols]

  Problem() {
    for (int size : kSizes) groups.push_back({k_blocks, size}), k_blocks += ceil_div(size, 128);
    unsigned state = 1;
    const auto draw = [&](int count) {
      return static_cast<int>((state = state * 1664525 + 1013904223) >> 16) % count;
    };
    a.assign(static_cast<size_t>(kM) * k_blocks * 128, 0),
        b.assign(static_cast<size_t>(kN) * k_blocks * 128, 0);
    for (auto* x : {&a, &b})
      for (size_t row = 0; row < x->size() / (k_blocks * 128); ++row)
        for (const Group& g : groups)
          for (int k = 0; k < ceil_div(g.size, 128) * 128; ++k)
            (*x)[row * k_blocks * 128 + g.first * 128 + k] = k < g.size                      ? draw(7) - 3
                                                             : k < ceil_div(g.size, 32) * 32 ? 0
                                                                                             : 100;
    for (int i = 0; i < k_blocks * kM; ++i) row_scales.push_back(std::ldexp(1.0f, draw(5)));
    for (int i = 0; i < k_blocks * kBlockCols; ++i) scales.push_back(std::ldexp(1.0f, draw(5)));
  }

  double sum(const Group& g, int row, int col) const {
    double out = 0;
    if (row >= kM || col >= kN) return 0;
    for (int k = 0; k < g.size; ++k) {
      const int kb = g.first + k / 128;
      const size_t at = static_cast<size_t>(g.first) * 128 + k, line = static_cast<size_t>(k_blocks) * 128;
      out += double(a[row * line + at]) * b[col * line + at] * row_scales[kb * kM + row] *
             scales[kb * kBlockCols + col / 128];
    }
    return out;
  }
};

const Problem problem;

template <class C>
std::vector<Tile> tiles() {
  std::vector<Tile> out;
  int number = 0;
  for (const Group& g : problem.groups)
    for (int row = 0; row < kM; row += C::ROWS)
      for (int col = 0; col < kN; col += C::COLS) {
        if (++number % 4 != 1) continue;  // some of them
        Tile tile{row, col, 0, 0, ceil_div(g.size, 128)};
        tile.k_first = g.first * 128;
        tile.k_stop = g.size - (tile.k_end - 1) * 128;
        out.push_back(tile);
      }
  return out;
}

template <class C>
void produce(const std::vector<Tile>& all) {
  const auto bytes = [](const auto& x) { return reinterpret_cast<const char*>(x.data()); };
  const int k = problem.k_blocks * 128;
  const TensorMap rows = ptx::Matrix{bytes(problem.a), 1, k, kM, 128, C::ROWS}.map();
  const TensorMap cols = ptx::Matrix{bytes(problem.b), 1, k, kN, 128, C::COLS}.map();
  const TensorMap row_scales =
      ptx::Matrix{bytes(problem.row_scales), 4, kM, problem.k_blocks, C::ROWS, 4}.map();
  const TensorMap scales = ptx::Matrix{bytes(problem.scales), 4, kBlockCols, problem.k_blocks, 4, 4}.map();
  const Operands in{&rows, &cols, &row_scales, &scales, problem.k_blocks, 0, 0, 0, 0};
  Ring<C> ring(0);
  for (int i = 0; i < static_cast<int>(all.size()); ++i)
    if (all[i].k_end > 0)
      load_blocks<C>(ring, in, all[i], i, 0, all[i].k_end);
    else
      publish_empty_tile<C>(ring, i, 0, false);
  publish_end<C>(ring);
}

template <class C>
void check(Fp8Loop<C>& loop, const Tile& tile) {
  const Group group{tile.k_first / 128, tile.k_end > 0 ? (tile.k_end - 1) * 128 + tile.k_stop : 0};
  for (int part = 0; part < kParts<C>; ++part)
    for (int i = 0; i < kCols<C> / 2; ++i) {
      const int row = tile.row + (first_part<C>(loop.warpgroup) + part) * 64 + loop.mine.row + i / 2 % 2 * 8;
      const int col = tile.col + i / 4 * 8 + loop.mine.col + i % 2;
      const double want = problem.sum(group, row, col);
      if (row >= kM || col >= kN || loop.acc[part][i] == want) continue;
      std::fprintf(stderr, "%d x %d, %d slots, tile at %d, %d, k %d to %d: [%d, %d] is %g, not %g\n", C::ROWS,
                   C::COLS, C::STAGES, tile.row, tile.col, tile.k_first, group.size, row, col,
                   loop.acc[part][i], want);
      std::_Exit(1);
    }
}

template <class C>
void consume(const std::vector<Tile>& all, int warpgroup) {
  Ring<C> ring(0);
  Accumulator<C> acc;
  Fp8Loop<C> loop(acc, ring, warpgroup);
  const auto receive = [&] {
    const int number = ring.template receive<false>().x;
    if (number == kNoTile) return number;
    loop.begin(all[number]);
    return number;
  };
  for (int number = receive(); number != kNoTile;) {
    for (auto& part : acc) clear(part);
    Tile tile = all[number];
    tile.col += first_col<C>(warpgroup);
    if (tile.k_end > 0)
      loop.finish(tile);
    else
      loop.skip();
    number = receive();
    check(loop, tile);
  }
}

template <class C>
void run(int lane) {
  const std::vector<Tile> all = tiles<C>();
  ptx::barriers.clear();
  Ring<C>(0).init(4 * kSharers<C>);
  std::vector<std::thread> threads;
  for (int warp = 0; warp < 4 * C::WARPGROUPS; ++warp)
    threads.emplace_back([&, warp] {
      threadIdx.x = warp * 32, ptx::lane = lane;
      consume<C>(all, warp / 4);
    });
  produce<C>(all);
  for (std::thread& one : threads) one.join();
}

int main() {
  for (int lane : {0, 13, 31}) {
    run<Config<128, 256, 4>>(lane), run<Config<128, 256, 3>>(lane), run<Config<256, 128, 4>>(lane);
    run<Config<192, 128, 4>>(lane), run<Config<128, 128, 5>>(lane), run<Config<64, 128, 8>>(lane);
    run<Config<64, 256, 4>>(lane);
  }
  std::puts("every tile");
}
