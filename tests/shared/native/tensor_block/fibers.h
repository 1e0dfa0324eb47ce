// Threads of a block on one thread of a CPU: each runs until it waits for others, and then one does that need
// not wait. So a thread that should have waited runs ahead of all others, as far as it gets, and its
// mistake is seen; a block whose threads all wait ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

class Fibers {
 public:
  // Of the thread that runs.
  unsigned thread() const { return all[current].thread; }

  void run(unsigned count, const std::function<void()>& body) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    while (all.size() < count) all.emplace_back();
    running = body, alive = count;
    for (unsigned i = 0; i < all.size(); ++i) {
      Fiber& one = all[i];
      one.done = i >= count, one.ready = nullptr;
      if (one.done) continue;
      one.thread = order[i];
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.get(), one.context.uc_stack.ss_size = kStack;
      one.context.uc_link = nullptr;
      makecontext(&one.context, begin, 0);
    }
    current = 0;
    swapcontext(&outside, &all[0].context);
  }

  template <class Ready>
  void wait(const Ready& ready) {
    if (ready()) return;
    const std::function<bool()> again = std::cref(ready);
    all[current].ready = &again;
    go_on();
    all[current].ready = nullptr;
  }

 private:
  static constexpr std::size_t kStack = 128 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    const std::function<bool()>* ready;  // what it waits for, if it does
    unsigned thread;
    bool done;
  };

  static void begin();

  void end() {
    all[current].done = true;
    if (--alive == 0) setcontext(&outside);
    go_on();
  }
  // Another one runs, or this one, if what it waits for has come.
  void go_on() {
    const unsigned from = current;
    for (unsigned step = 1; step <= all.size(); ++step) {
      const unsigned next = (from + step) % all.size();
      if (all[next].done || (all[next].ready && !(*all[next].ready)())) continue;
      current = next;
      if (next != from) swapcontext(&all[from].context, &all[next].context);
      return;
    }
    std::fprintf(stderr, "All threads of the block wait.\n");
    std::abort();
  }

  std::deque<Fiber> all;
  ucontext_t outside;
  std::function<void()> running;
  std::mt19937 random;
  unsigned current = 0, alive = 0;
};
inline Fibers fibers;

inline void Fibers::begin() {
  fibers.running();
  fibers.end();
}

// Of as many threads as there are.
class Barrier {
 public:
  explicit Barrier(int count) : count(count), pending(count) {}
  void arrive() {
    if (--pending == 0) pending = count, ++phase;
  }
  void arrive_and_wait() {
    const unsigned before = phase;
    arrive();
    fibers.wait([&] { return phase != before; });
  }
  void arrive_and_drop() { --count, arrive(); }

 private:
  int count, pending;
  unsigned phase = 0;
};

// A T of each thread's own.
template <class T>
class Each {
 public:
  T& operator*() {
    while (all.size() <= fibers.thread()) all.emplace_back();
    return all[fibers.thread()];
  }
  T* operator->() { return &**this; }

 private:
  std::deque<T> all;
};
