// Operands of a kernel in files, and its launch on a CPU: a thread for each of a block's, which run one block
// after the other. Included behind the headers of a folder beside this file.
#pragma once

#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <thread>

struct Numbers {
  std::string path;
  long size;
  void* all;  // of its size exactly
  explicit Numbers(const std::string& name, const std::string& folder) : path(folder + "/" + name) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    size = bytes.size();
    if (posix_memalign(&all, 16, size)) std::abort();
    std::memcpy(all, bytes.data(), size);
  }
  ~Numbers() { std::free(all); }
  template <class T>
  operator T*() const { return static_cast<T*>(all); }
  void write() const { std::ofstream(path, std::ios::binary).write(static_cast<char*>(all), size); }
};

// The threads of one block after the other are the same.
template <class Kernel>
void launch(unsigned blocks, unsigned columns, int count, const Kernel& kernel) {
  gridDim.x = blocks;
  std::barrier<> block_ends(count);
  std::optional<std::barrier<>> all_threads;
  std::vector<Warp> all_warps;
  const auto begin = [&](unsigned block) {
    blockIdx.x = block % blocks, blockIdx.y = block / blocks;
    std::memset(jdg::shared, 0xFF, sizeof jdg::shared);
    std::vector<Warp>(count / 32).swap(all_warps);
    all_threads.emplace(count);
    warps = &all_warps, threads = &*all_threads;
  };
  std::vector<std::thread> running;
  for (int i = 0; i < count; ++i)
    running.emplace_back([&, i] {
      threadIdx.x = i;
      for (unsigned block = 0; block < blocks * columns; ++block) {
        if (i == 0) begin(block);
        block_ends.arrive_and_wait();
        kernel();
        threads->arrive_and_drop();
        block_ends.arrive_and_wait();
      }
    });
  for (std::thread& one : running) one.join();
}
