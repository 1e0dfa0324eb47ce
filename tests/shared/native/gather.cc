// The producer of grouped products whose rows an index names, by CPU threads: all 128 of its warpgroup, and a
// thread for each consumer warp. Every slot, with its scales, is compared with what the index says, and
// filled with garbage before it is handed back. Exits with 1 at the first wrong byte, and at reads beside an
// operand.

#include <jax_deepgemm/gemm/producer.cuh>
#include <thread>
#include <vector>

using namespace jdg;

constexpr int kSources = 50, kPlaces = 420, kColumns = 300;

template <bool FP8, int HEIGHT, int WIDTH, int SLOTS, bool INNER = false, bool NAMED_COLS = false>
struct Config {
  static constexpr bool ROWS_K_MAJOR = !INNER, COLS_K_MAJOR = !INNER, GATED = false, RUNS = false;
  static constexpr bool ROWS_BY_INDEX = !NAMED_COLS, COLS_BY_INDEX = NAMED_COLS, PING_PONG = false;
  static constexpr bool ROWS_ONCE = false, COLS_ONCE = false, HALVES = false;
  static constexpr Scale ROW_SCALES = FP8 ? Scale::kVector : Scale::kNone;
  static constexpr Scale COL_SCALES = FP8 ? Scale::kBlock : Scale::kNone;
  static constexpr int ROWS = HEIGHT, COLS = WIDTH, BLOCK_K = FP8 ? 128 : 64, STAGES = SLOTS, WARPGROUPS = 2;
  static constexpr int ACROSS = HEIGHT == 64 ? 2 : 1, SCALE_SLOTS = ceil_div(STAGES, 4) + 1;
  static constexpr int STAGING_BYTES = 0, TABLE_BYTES = 0, SHARED_BYTES = 1 << 18;
};

// K-major: k columns of bytes, of which the last 16 make no whole slot. MN-major: kColumns of bf16.
template <class C>
struct Problem {
  static constexpr bool kInner = !C::ROWS_K_MAJOR;
  static constexpr int kBlocks = 7, kBytes = kInner ? kColumns * 2 / 16 * 16 : (kBlocks - 1) * 128 + 16;
  static constexpr int kScalesOfRow = 8;
  std::vector<char> values, cols;
  std::vector<float> scales, col_scales;
  std::vector<int> index;

  Problem()
      : values(kSources * kBytes), cols(1 << 20), scales(kSources * kScalesOfRow), col_scales(64, 1.0f) {
    unsigned state = 1;
    const auto draw = [&] { return static_cast<int>((state = state * 1664525 + 1013904223) >> 16); };
    for (char& v : values) v = static_cast<char>(1 + draw() % 100);
    for (float& v : scales) v = static_cast<float>(1 + draw() % 100);
    for (int i = 0; i < kPlaces; ++i) index.push_back(draw() % (kSources + 6) - 3);
    index[1] = 0x7FFFFFFF, index[2] = -0x7FFFFFFF - 1;
  }
  Indexed indexed() const {
    return {values.data(), scales.data(), index.data(), kSources, kBytes, kScalesOfRow};
  }
  int source(int place, int end) const {
    const int found = place < end ? index[place] : -1;
    return found >= 0 && found < kSources ? found : -1;
  }
  char byte(int place, int end, int at) const {
    const int row = source(place, end);
    return row < 0 || at >= kBytes ? 0 : values[row * kBytes + at];
  }
};

// Tiles that begin anywhere, some of them behind all places that count.
template <class C>
std::vector<Tile> tiles() {
  std::vector<Tile> out;
  for (int first : {0, 37, 200, 413})
    for (int size : {1, 64, 131, 207}) {
      const int end = first + size < kPlaces ? first + size : kPlaces;
      Tile tile{first, 128, 0, 0, Problem<C>::kBlocks};
      if (Problem<C>::kInner)
        tile.row = tile.col = 64, tile.k_first = first, tile.k_end = ceil_div(end - first, 64);
      if (size == 64) tile.k_end = 0;
      tile.index_end = end;
      out.push_back(tile);
    }
  return out;
}

template <class C>
void produce(const Problem<C>& p, const std::vector<Tile>& all) {
  const TensorMap other = ptx::Matrix{p.cols.data(), 1, 1024, 1024, 128, C::COLS}.map();
  const TensorMap slab = ptx::Matrix{p.cols.data(), 2, 512, 1024, 64, 64}.map();
  constexpr int kBlockScales = Layout<C>::kBlocks;
  const TensorMap scales =
      ptx::Matrix{reinterpret_cast<const char*>(p.col_scales.data()), 4, 16, 4, 4, kBlockScales}.map();
  const TensorMap* loaded = Problem<C>::kInner ? &slab : &other;
  const Operands in{loaded, loaded, nullptr, &scales, Problem<C>::kBlocks, 0, 0, 0, 0, 0, p.indexed()};
  Ring<C> ring(0);
  for (int i = 0; i < static_cast<int>(all.size()); ++i)
    if (all[i].k_end == 0)
      publish_empty_tile<C>(ring, i, 0, false);
    else if constexpr (C::ROWS_K_MAJOR)
      load_blocks<C>(ring, in, IndexedTile<C>(all[i], in.indexed), i, 0, all[i].k_end);
    else
      load_blocks<C>(ring, in, all[i], i, 0, all[i].k_end);
  publish_end<C>(ring);
}

[[noreturn]] void wrong(const char* what, const Tile& tile, int kb, int row, int at) {
  std::fprintf(stderr, "%s of the tile at %d, block %d, row %d, byte %d\n", what, tile.row, kb, row, at);
  std::_Exit(1);
}

// A warp's share of a slot's rows.
template <class C>
void check(const Ring<C>& ring, const Problem<C>& p, const Tile& tile, int kb, int warp) {
  constexpr int kWarps = 4 * C::WARPGROUPS, kExtent = C::ROWS_BY_INDEX ? C::ROWS : C::COLS;
  const u32 slot = C::ROWS_BY_INDEX ? ring.rows() : ring.cols();
  const int first = C::ROWS_BY_INDEX ? tile.row : tile.col,
            slabs = Problem<C>::kInner ? ceil_div(kExtent, 64) : 1;
  for (int row = warp; row < (Problem<C>::kInner ? C::BLOCK_K : kExtent); row += kWarps)
    for (int slab = 0; slab < slabs; ++slab)
      for (int at = 0; at < 128; ++at) {
        char& found = ptx::shared[slot + slab * 8192 + row * 128 + (at / 16 * 16 ^ row % 8 * 16) + at % 16];
        const int place = Problem<C>::kInner ? tile.k_first + kb * 64 + row : first + row;
        const int column = Problem<C>::kInner ? (first + slab * 64) * 2 + at : kb * 128 + at;
        if (found != p.byte(place, tile.index_end, column)) wrong("values", tile, kb, row, slab * 128 + at);
        found = static_cast<char>(0xAA);
      }
}

template <class C>
void check_scales(const Ring<C>& ring, const Problem<C>& p, const Tile& tile, int kb, int warp) {
  for (int row = warp; row < C::ROWS; row += 4 * C::WARPGROUPS)
    for (int j = 0; j < 4; ++j) {
      const int source = p.source(tile.row + row, tile.index_end);
      const float want = source < 0 ? 0.0f : p.scales[source * Problem<C>::kScalesOfRow + kb + j];
      if (ptx::load_shared(ring.row_scales() + (row * 4 + j) * 4) != want) wrong("scales", tile, kb, row, j);
    }
}

template <class C>
void take(Ring<C>& ring, const Problem<C>& p, const Tile& tile, int kb, int warp, bool scales) {
  ring.wait_full();
  check<C>(ring, p, tile, kb, warp);
  if (scales) check_scales<C>(ring, p, tile, kb, warp);
  if (scales) ring.advance_scales();
  for (int lane = 0; lane < Ring<C>::kReleases; ++lane) ring.release(ring.empty());
  ring.advance();
}

template <class C>
void consume(const Problem<C>& p, const std::vector<Tile>& all, int warp) {
  Ring<C> ring(0);
  const auto pass = [&](int slots) {
    for (int i = 0; i < slots; ++i) {
      ring.pass();
      for (int lane = 1; lane < Ring<C>::kReleases; ++lane) ring.release(ring.empty());
      ring.advance();
    }
  };
  for (int number; (number = ring.template receive<false>().x) != kNoTile;) {
    const Tile& tile = all[number];
    const int partial = Layout<C>::kFp8 ? tile.k_end % 4 : 0, whole = tile.k_end - partial;
    if (tile.k_end == 0) pass(kEmptySlots<C>);
    for (int kb = whole; kb < tile.k_end; ++kb) take<C>(ring, p, tile, kb, warp, kb == whole);
    if (partial > 0) pass(4 - partial);
    for (int kb = 0; kb < whole; ++kb) take<C>(ring, p, tile, kb, warp, Layout<C>::kFp8 && kb % 4 == 0);
  }
}

template <class C>
void run() {
  const Problem<C> p;
  const std::vector<Tile> all = tiles<C>();
  const auto range = [](const auto& x) {
    const char* begin = reinterpret_cast<const char*>(x.data());
    return ptx::Range{begin, begin + x.size() * sizeof(x[0])};
  };
  ptx::readable = {range(p.values), range(p.scales), range(p.index)};
  ptx::barriers.clear();
  init_barriers<C>(0);
  std::vector<std::thread> threads;
  for (int warp = 0; warp < 4 * C::WARPGROUPS; ++warp)
    threads.emplace_back([&, warp] { threadIdx.x = warp * 32, consume<C>(p, all, warp); });
  for (int i = 0; i < kGatherers; ++i)
    threads.emplace_back([&, i] { threadIdx.x = 128 * C::WARPGROUPS + i, produce<C>(p, all); });
  for (std::thread& one : threads) one.join();
}

int main() {
  run<Config<true, 128, 128, 5>>(), run<Config<true, 64, 256, 3>>();
  run<Config<false, 128, 256, 4>>(), run<Config<false, 64, 128, 8>>();
  run<Config<false, 128, 192, 4, true>>(), run<Config<false, 128, 176, 4, true, true>>();
  std::puts("every slot");
}
