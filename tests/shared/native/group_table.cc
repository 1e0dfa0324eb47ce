// The table of groups that grouped kernels make, made by one warp of CPU threads: the device code itself.
//
// Reads cases from standard input, nine integers and the group sizes each:
//   grouping (0 rows, 1 masked rows, 2 inner, 3 inner of whole blocks) segmented offset total here shared
//   extent m n   sizes...
// and prints the number of segments, of tiles, and for each segment and the end: start, end, first tile,
// group.

#include <cstdio>
#include <jax_deepgemm/grouped/group_table.cuh>
#include <thread>
#include <vector>

template <jdg::Grouping G, bool S, bool BLOCKS, int CAPACITY>
struct Config {
  static constexpr jdg::Grouping GROUPING = G;
  static constexpr bool SEGMENTED = S, ZERO_ROWS = false, WHOLE_BLOCKS = BLOCKS, CHAINED = false;
  static constexpr int ROWS = 64, COLS = 64, TABLE_BYTES = (CAPACITY + 3) * 16;
};

template <class C>
void show(const jdg::Groups& groups, const jdg::Extents& problem) {
  const auto lane = [&](unsigned index) {
    threadIdx.x = index;
    const jdg::GroupTable<C> table = jdg::make_table<C>(groups, problem, 0);
    if (index != 0) return;
    std::printf("%d %d", table.segments, table.tiles);
    for (int i = 0; i <= table.segments; ++i) {
      const jdg::Segment s = table[i];
      std::printf(" %d %d %d %d", s.start, s.end, s.first_tile, s.group);
    }
    std::printf("\n");
  };
  std::vector<std::thread> warp;
  for (unsigned i = 0; i < 32; ++i) warp.emplace_back(lane, i);
  for (std::thread& one : warp) one.join();
}

template <jdg::Grouping G, bool S, bool BLOCKS = false>
void show_in(const jdg::Groups& groups, const jdg::Extents& problem) {
  if (groups.total <= 32 && groups.here <= 32)
    show<Config<G, S, BLOCKS, 32>>(groups, problem);
  else
    show<Config<G, S, BLOCKS, 2048>>(groups, problem);
}

int main() {
  using jdg::Grouping;
  int grouping, segmented, offset, total, here, shared, extent, m, n;
  while (std::scanf("%d %d %d %d %d %d %d %d %d", &grouping, &segmented, &offset, &total, &here, &shared,
                    &extent, &m, &n) == 9) {
    std::vector<int> sizes(segmented ? 3 * total : total);
    for (int& size : sizes)
      if (std::scanf("%d", &size) != 1) return 1;
    const jdg::Groups groups{sizes.data(), &offset, total, here, shared, extent};
    const jdg::Extents problem{m, n, 1, 0, 1};
    if (grouping == 0)
      segmented ? show_in<Grouping::kRows, true>(groups, problem)
                : show_in<Grouping::kRows, false>(groups, problem);
    else if (grouping == 1)
      show_in<Grouping::kMaskedRows, false>(groups, problem);
    else if (grouping == 3)
      show_in<Grouping::kInner, false, true>(groups, problem);
    else
      segmented ? show_in<Grouping::kInner, true>(groups, problem)
                : show_in<Grouping::kInner, false>(groups, problem);
  }
}
