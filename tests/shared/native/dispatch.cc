// dispatch.cuh itself, run by CPU threads, one for each thread of each block. Reads cases from standard
// input: meeting (0 alone, 1 cluster, 2 grid, 3 alone and with the rows' tokens and weights) blocks capacity
// experts copies ids.., and prints sizes, source and position of each. What the device finds in scratch and
// in results is rubbish here too.

#include <cstdio>
#include <jax_deepgemm/dispatch/dispatch.cuh>

template <jdg::Meeting M, bool L, int W, int X, bool R>
struct Config {
  static constexpr int WARPS = W, WIDTH = X;
  static constexpr jdg::Meeting MEETING = M;
  static constexpr bool CAPACITY = L, OF_ROWS = R;
};

constexpr int kRubbish = 1234567, kSlots = 3;

template <class C>
void run(int blocks, int capacity, int experts, const std::vector<int>& ids) {
  const int copies = static_cast<int>(ids.size()), rows = C::CAPACITY ? experts * capacity : copies;
  std::vector<int> sizes(experts, kRubbish), source(rows, kRubbish), position(copies, kRubbish);
  std::vector<int> counts(experts * blocks, kRubbish);
  jdg::u32 arrived = 0;
  std::vector<int> token(rows, kRubbish);  // weights tell which copy a row holds
  std::vector<float> row_weights(rows, kRubbish), weights(copies);
  for (int i = 0; i < copies; ++i) weights[i] = i + 1;
  const jdg::Dispatch d{ids.data(),         sizes.data(),   source.data(), position.data(), counts.data(),
                        &arrived,           copies,         experts,       capacity,        token.data(),
                        row_weights.data(), weights.data(), kSlots};
  std::barrier<> all(blocks * C::WARPS * 32);
  std::vector<std::unique_ptr<Block>> each;
  std::vector<std::thread> threads;
  for (int b = 0; b < blocks; ++b)
    each.push_back(std::make_unique<Block>(C::WARPS, experts * (C::WARPS + 2) + C::WARPS));
  for (int i = 0; i < blocks * C::WARPS * 32; ++i) {
    threads.emplace_back([&, i] {
      const int b = i / (C::WARPS * 32);
      threadIdx = {static_cast<unsigned>(i % (C::WARPS * 32))};
      blockIdx = {static_cast<unsigned>(b)}, gridDim = {static_cast<unsigned>(blocks)};
      block = each[b].get(), cluster = &all;
      jdg::dispatch<C>(d);
    });
  }
  for (std::thread& one : threads) one.join();
  for (int row = 0; C::OF_ROWS && row < rows; ++row) {
    source[row] = row_weights[row] == 0.0f ? copies : static_cast<int>(row_weights[row]) - 1;
    if (token[row] != source[row] / kSlots) source[row] = kRubbish;
  }
  for (const auto* found : {&sizes, &source, &position})
    for (int value : *found) std::printf("%d ", value);
  std::printf("\n");
}

template <jdg::Meeting M, int W, int X = 1, bool R = false>
void either(int blocks, int capacity, int experts, const std::vector<int>& ids) {
  capacity ? run<Config<M, true, W, X, R>>(blocks, capacity, experts, ids)
           : run<Config<M, false, W, X, R>>(blocks, capacity, experts, ids);
}

int main() {
  using jdg::Meeting;
  int meeting, blocks, capacity, experts, copies;
  while (std::scanf("%d %d %d %d %d", &meeting, &blocks, &capacity, &experts, &copies) == 5) {
    std::vector<int> ids(copies);
    for (int& id : ids)
      if (std::scanf("%d", &id) != 1) return 1;
    if (meeting == 0)
      either<Meeting::kAlone, 3>(blocks, capacity, experts, ids);
    else if (meeting == 3)
      either<Meeting::kAlone, 3, 1, true>(blocks, capacity, experts, ids);
    else if (meeting == 1)
      either<Meeting::kCluster, 2>(blocks, capacity, experts, ids);
    else if (blocks <= 32)
      either<Meeting::kGrid, 2>(blocks, capacity, experts, ids);
    else
      either<Meeting::kGrid, 1, 2>(blocks, capacity, experts, ids);
  }
}
