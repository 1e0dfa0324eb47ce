// The launch of a kernel on a CPU, one block after the other. Included behind the headers of a folder beside
// this file.
#pragma once

template <class Kernel>
void launch(unsigned blocks, unsigned columns, int count, const Kernel& kernel) {
  gridDim.x = blocks;
  for (unsigned block = 0; block < blocks * columns; ++block) {
    blockIdx.x = block % blocks, blockIdx.y = block / blocks;
    std::memset(jdg::shared, 0xFF, sizeof jdg::shared);
    jdg::ptx::named.clear();
    std::vector<Warp> all_warps(count / 32);
    Barrier all_threads(count);
    warps = &all_warps, threads = &all_threads;
    fibers.run(count, [&] {
      kernel();
      threads->arrive_and_drop();
    });
  }
}
