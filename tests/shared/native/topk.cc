// topk.cuh itself, run by CPU threads, one for each thread of each block, a row at a time. Reads cases from a
// file of integers: number pieces windows values by_index rows n k sample offset, the firsts and lasts of
// rows, and the numbers' bits; prints the result of each. Rows begin `offset` numbers into an aligned buffer.
// What is found in shared memory and in results is rubbish here too.

#include <cstdio>
#include <fstream>
#include <iterator>
#include <jax_deepgemm/topk/topk.cuh>

using jdg::Number;

constexpr int kThreads = 64, kHeld = 2, kRubbish = 1234567;

template <Number T, int P, bool W, bool V, bool I>
struct Config {
  static constexpr Number NUMBER = T;
  static constexpr int THREADS = kThreads, HELD = kHeld, PIECES = P;
  static constexpr bool WINDOWS = W, VALUES = V, BY_INDEX = I;
};

struct Case {
  int number, pieces, windows, values, by_index, rows;
  jdg::TopkSizes size;
  int offset;
  const int *start, *end, *bits;
};

template <class C>
void run(const Case& c) {
  using Bits = typename jdg::NumberOf<C::NUMBER>::Bits;
  const int count = c.rows * c.size.n, words = 2 * kThreads * kHeld + 4 * kThreads + 40;
  std::vector<uint4> memory((count + c.offset) * sizeof(Bits) / 16 + 1);
  Bits* x = reinterpret_cast<Bits*>(memory.data()) + c.offset;
  for (int i = 0; i < count; ++i) x[i] = static_cast<Bits>(c.bits[i]);
  std::vector<int> indices(c.rows * c.size.k, kRubbish);
  std::vector<Bits> values(c.rows * c.size.k, 77);
  for (int row = 0; row < c.rows; ++row) {
    std::barrier<> all(C::PIECES * kThreads);
    std::vector<std::unique_ptr<Block>> each;
    Block* blocks[C::PIECES];
    for (int p = 0; p < C::PIECES; ++p) {
      each.push_back(std::make_unique<Block>(kThreads / 32, words));
      blocks[p] = each[p].get();
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < C::PIECES * kThreads; ++i) {
      threads.emplace_back([&, i] {
        const int p = i / kThreads;
        threadIdx = {static_cast<unsigned>(i % kThreads)};
        blockIdx = {static_cast<unsigned>(row * C::PIECES + p)};
        block = blocks[p], cluster = &all, of_cluster = blocks;
        jdg::topk<C>(x, c.start, c.end, indices.data(), values.data(), c.size);
      });
    }
    for (std::thread& one : threads) one.join();
  }
  for (int found : indices) std::printf("%d ", found);
  if (C::VALUES)
    for (Bits found : values) std::printf("%d ", static_cast<int>(found));
  std::printf("\n");
}

#ifdef ONE
void of_its_kind(const Case& c) {
  if (c.pieces == 1)
    run<Config<Number::kFloat32, 1, false, true, true>>(c);
  else
    run<Config<Number::kFloat32, 4, false, true, true>>(c);
}
#else
template <int P>
void with_flags(const Case& c) {
  if (c.windows && c.values)
    run<Config<Number::kFloat32, P, true, true, false>>(c);
  else if (c.windows)
    run<Config<Number::kFloat32, P, true, false, true>>(c);
  else
    run<Config<Number::kFloat32, P, false, true, true>>(c);
}

void of_its_kind(const Case& c) {
  if (c.number == 0)
    c.pieces == 1 ? with_flags<1>(c) : with_flags<4>(c);
  else if (c.number == 1)
    run<Config<Number::kBfloat16, 4, true, true, false>>(c);
  else
    run<Config<Number::kFloat16, 1, false, true, true>>(c);
}
#endif

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<int> all(bytes.size() / sizeof(int));
  std::memcpy(all.data(), bytes.data(), bytes.size());
  for (const int* at = all.data(); at < all.data() + all.size();) {
    Case c{at[0], at[1], at[2], at[3], at[4], at[5], {at[6], at[7], at[8]}, at[9], at + 10};
    c.end = c.start + c.rows;
    c.bits = c.end + c.rows;
    at = c.bits + c.rows * c.size.n;
    of_its_kind(c);
  }
}
