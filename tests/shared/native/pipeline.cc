// pipeline.cuh itself, run by CPU threads: a producer, its TMA unit, and two warpgroups of consumers, which
// see every block of data in order, or take pieces of them in turn. Exits with 1 at the first wrong number; a
// race between a slot's reader and its next writer is the thread sanitizer's to find.

#include <cstdio>
#include <cstdlib>
#include <jax_deepgemm/pipeline.cuh>
#include <thread>
#include <vector>

constexpr int kStages = 3, kBlocks = 150, kWords = 16, kWarps = 8;
constexpr jdg::u32 kData = 1024, kTurns = jdg::Pipeline<kStages, 0>::kEnd;
using Pipe = jdg::Pipeline<kStages, 0>;

bool empty(int block) { return block % 7 == 3; }
int length(int piece) { return piece % 5 + 1; }  // blocks

void check(int got, int want, const char* what) {
  if (got == want) return;
  std::fprintf(stderr, "%s is %d, not %d\n", what, got, want);
  std::_Exit(1);
}

int* slot(int stage) { return reinterpret_cast<int*>(jdg::ptx::shared + kData) + stage * kWords; }

// Half of a slot's bytes at a time, as two loads that count on one barrier.
void load(int stage, int half, int value, jdg::u32 bar) {
  for (int i = 0; i < kWords / 2; ++i) slot(stage)[half * kWords / 2 + i] = value + i;
  jdg::ptx::barriers.at(bar).count(0, -kWords * 2);
}

void produce() {
  Pipe pipe(0);
  std::vector<std::thread> loads;
  for (int block = 0; block < kBlocks; ++block) {
    pipe.wait_empty();
    pipe.publish(block, 2 * block, -block, empty(block));
    if (empty(block)) {
      pipe.fill_with_nothing();
    } else {
      pipe.expect(kWords * 4);
      for (int half = 0; half < 2; ++half) loads.emplace_back(load, pipe.stage, half, block, pipe.full());
    }
    pipe.advance();
  }
  for (std::thread& one : loads) one.join();
}

// One block. Its slot is released by the caller, who may keep it for a while.
void consume(const Pipe& pipe, int block) {
  const jdg::Record record = pipe.receive();
  check(record.x, block, "record.x"), check(record.y, 2 * block, "record.y"),
      check(record.z, -block, "record.z");
  check(record.flag, empty(block), "record.flag");
  for (int i = 0; !record.flag && i < kWords; ++i)
    check(slot(pipe.stage)[i], block + i % (kWords / 2), "data");
}

// All blocks, each released when the next one has been read.
void every_block(int) {
  Pipe pipe(0);
  jdg::u32 previous = 0;
  for (int block = 0; block < kBlocks; ++block) {
    consume(pipe, block);
    if (block > 0) pipe.release(previous);
    previous = pipe.empty();
    pipe.advance();
  }
  pipe.release(previous);
}

// Pieces in turn: even ones for warpgroup 0, odd ones for warpgroup 1.
void in_turn(int warp) {
  Pipe pipe(0);
  jdg::Turns<kTurns> turns;
  const int warpgroup = warp / 4;
  int block = 0;
  for (int piece = 0; block < kBlocks; block += length(piece++)) {
    if (piece % 2 != warpgroup) continue;
    if (piece > 0) turns.await(pipe, warpgroup);
    for (int i = block; i < block + length(piece) && i < kBlocks; ++i) {
      if (empty(i)) {
        pipe.pass();
      } else {
        consume(pipe, i);
        pipe.release(pipe.empty());
      }
      pipe.advance();
    }
    turns.pass(pipe, warpgroup);
  }
}

void run(void (*consumer)(int), int releases) {
  jdg::ptx::barriers.clear();
  Pipe(0).init(releases);
  jdg::Turns<kTurns>::init(0);
  std::vector<std::thread> threads;
  for (int warp = 0; warp < kWarps; ++warp)
    threads.emplace_back([=] {
      threadIdx.x = warp * 32;
      consumer(warp);
    });
  produce();
  for (std::thread& one : threads) one.join();
}

int main() {
  run(every_block, kWarps);
  run(in_turn, kWarps / 2);
  std::puts("every block in order");
}
