// Operands of a kernel in files.
#pragma once

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

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
  operator T*() const {
    return static_cast<T*>(all);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(all);
  }
  void write() const { std::ofstream(path, std::ios::binary).write(static_cast<char*>(all), size); }
};
