// indexer_topk/rows.cuh itself, run by CPU threads, one for each thread of a block, a block at a time. Reads
// integers: tokens pitch places keys wanted listed(tokens of a round) k, then the bits of bounds and numbers,
// and keys and counts; prints ends, numbers and keys in order, how many tokens are listed, and then, of the
// columns 0 to k, their keys, and what rounds of gathering and scattering leave of a row.

#include <cstdio>
#include <fstream>
#include <iterator>
#include <jax_deepgemm/ptx/barrier.cuh>

inline unsigned atomicOr(unsigned* at, unsigned bits) {
  return __atomic_fetch_or(at, bits, __ATOMIC_RELAXED);
}

#include <jax_deepgemm/indexer_topk/rows.cuh>

template <class Kernel>
void launch(int blocks, int words, const Kernel& kernel) {
  for (int i = 0; i < blocks; ++i) {
    Block shared(jdg::kRowThreads / 32, words);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < jdg::kRowThreads; ++t)
      threads.emplace_back([&, t] {
        threadIdx = {t}, blockIdx = {static_cast<unsigned>(i)}, block = &shared;
        kernel();
      });
    for (std::thread& one : threads) one.join();
  }
}

template <class T>
void print(const std::vector<T>& all) {
  for (T one : all) std::printf("%d ", static_cast<int>(one));
  std::printf("\n");
}

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<int> all(bytes.size() / sizeof(int));
  std::memcpy(all.data(), bytes.data(), bytes.size());
  const int tokens = all[0], pitch = all[1], places = all[2], num_keys = all[3], wanted = all[4];
  const int round = all[5], k = all[6], most = jdg::kRowSegments * places;
  int* at = all.data() + 7;
  const float* bounds = reinterpret_cast<float*>(at);
  float* numbers = reinterpret_cast<float*>(at += tokens * pitch);
  int* keys = at += tokens * most;
  const int* counts = at += tokens * most;
  std::vector<int> ends(tokens, -7), list(tokens, -7), count(1, 0);
  const int words = 2 * most + jdg::ceil_div(num_keys, 32) + jdg::ceil_div(num_keys, 256) + 32;
  const jdg::Listed listed{list.data(), count.data()};
  launch(tokens, words, [&] {
    jdg::in_order({bounds, numbers, keys, counts, pitch, places}, num_keys, wanted, ends.data(), listed);
  });
  print(ends);
  print(std::vector<int>(reinterpret_cast<int*>(numbers), reinterpret_cast<int*>(numbers) + tokens * most));
  print(std::vector<int>(keys, keys + tokens * most));
  print(count);

  std::vector<int> chosen(tokens * k);
  for (int i = 0; i < tokens * k; ++i) chosen[i] = i % k - 1;
  launch(tokens, 1, [&] { jdg::keys_of(keys, most, chosen.data(), k); });
  print(chosen);

  // Queries of two pieces that say whose they are, weights of one, and windows.
  std::vector<uint4> q(2 * tokens), w(tokens), to_q(2 * round), to_w(round);
  std::vector<int> starts(tokens), ends_of(tokens), to_starts(round), to_ends(round);
  for (unsigned i = 0; i < q.size(); ++i) q[i] = {i, i, i, i};
  for (int i = 0; i < tokens; ++i)
    w[i] = {static_cast<unsigned>(i)}, starts[i] = 100 + i, ends_of[i] = 200 + i;
  std::vector<float> scores(tokens * k, -1), some(round * k);
  std::vector<int> found(tokens * k, -1), some_keys(round * k);
  for (int first = 0; first < tokens; first += round) {
    launch(round, 1, [&] {
      jdg::gathered({q.data(), w.data(), starts.data(), ends_of.data()},
                    {to_q.data(), to_w.data(), to_starts.data(), to_ends.data()}, 2, 1, listed, first);
    });
    for (int i = 0; i < round; ++i) {
      const bool right = to_q[2 * i].x == 2 * to_w[i].x && to_q[2 * i + 1].w == 2 * to_w[i].x + 1 &&
                         to_starts[i] == 100 + static_cast<int>(to_w[i].x) &&
                         to_ends[i] == to_starts[i] + 100;
      if (to_ends[i] != 0 && !right) return 1;
      if ((to_ends[i] == 0) != (first + i >= count[0])) return 2;
      for (int j = 0; j < k; ++j) some[i * k + j] = to_w[i].x, some_keys[i * k + j] = j;
    }
    launch(round, 1, [&] {
      jdg::scattered(some.data(), some_keys.data(), scores.data(), found.data(), k, listed, first);
    });
  }
  print(scores);
  print(found);
}
