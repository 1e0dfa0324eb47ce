"""What the host does: who is served when, and which pages are whose. numpy alone, no model."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from serving.programs import Batch

Program: TypeAlias = Callable[[Any, Any, Batch], tuple[Any, Any, Any]]
"""(cache, made, batch) -> cache, and of each slot the next token and its logit; the cache is donated."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static.

    Attributes:
      slots: requests at a time.
      chunk: tokens of prompts in a step, at most.
      longest: tokens of a request, prompt and answer.
      pages, page_size: of the cache, page_size tokens each.
    """

    slots: int
    chunk: int
    longest: int
    pages: int
    page_size: int

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def rows(self, decode: bool) -> int:
        return self.slots if decode else self.slots + self.chunk


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and what became of it.

    Attributes:
      arrival: number of the step before which it is not there.
      limit: tokens to make, at most.
      tokens: the prompt, and what was made and read.
      logits: of those that were made.
      flying: tokens that a step makes which is not read yet: 0 or 1.
      cached: tokens whose keys are in the cache, or will be when the last step has ended.
    """

    arrival: int
    prompt: np.ndarray
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logits: list[float] = dataclasses.field(default_factory=list)
    flying: int = 0
    cached: int = 0
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    done: bool = False

    @property
    def ahead(self) -> int:
        """Tokens that have no keys yet: one while it decodes, none where the last one is being made."""
        total = len(self.tokens) + self.flying
        return total - self.cached if total < len(self.prompt) + self.limit else 0


class Chosen(NamedTuple):
    """The next count tokens of a request; `last`: all that it has, so that the step makes one more."""

    request: Request
    slot: int
    count: int
    last: bool


class Engine:
    """Continuous batching, greedy. `run` serves requests.

    A request that has arrived gets a slot, and pages for its prompt, when both are there, and a page more
    whenever it needs one. Where there is none the youngest request gives up all of its own, and waits for
    another turn, in which all its tokens are a prompt. The oldest one always goes on, so all end.

    The host waits for no step before the next one is on its way: a token is read while the step after it
    runs, which has it from the device. That a token ends its request is known one step late.

    Args:
      programs: of steps that only decode (True), of `slots` rows, and of mixed ones (False), `slots + chunk`.
      cache, made: what the programs take first: an empty cache, and zeros for tokens, [slots].
      eos: the token that ends an answer.
    """

    def __init__(
        self, programs: Mapping[bool, Program], cache: Any, made: Any, sizes: Sizes, eos: int
    ) -> None:
        self.programs, self.cache, self.made, self.sizes, self.eos = programs, cache, made, sizes, eos
        self.free = list(range(sizes.pages))
        self.idle = list(range(sizes.slots))
        self.tables = np.full((sizes.slots, sizes.pages_of(sizes.longest)), -1, np.int32)
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # the oldest first
        self.unread: tuple[list[Chosen], Any, Any] | None = None
        self.now, self.turns, self.preempted = 0, 0, 0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}  # of each step, as `programs`
        self.fullest = empty(sizes, True)  # of the batches that only decode

    def run(self, requests: Sequence[Request]) -> None:
        """Serves until all are done."""
        for request in requests:
            prompt, most = len(request.prompt), len(request.prompt) + request.limit
            room = min(self.sizes.longest, self.sizes.pages * self.sizes.page_size)
            if not 0 < prompt < most <= room:
                raise ValueError(
                    f"a request of {prompt} to {most} tokens, need 1, then more, and at most {room}"
                )
            request.tokens = request.prompt.tolist()
        self.waiting.extend(sorted(requests, key=lambda request: request.arrival))
        begin = said = time.perf_counter()
        while self.waiting or self.running:
            start = time.perf_counter()
            self.admit()
            chosen = self.plan()
            if chosen:
                decode = self.launch(chosen)
                self.seconds[decode].append(time.perf_counter() - start)
            else:
                self.settle()
            self.now += 1
            if time.perf_counter() - said > 2:
                said = time.perf_counter()
                print(
                    f"  {said - begin:.0f} s, step {self.now}: {len(self.running)} requests run", flush=True
                )

    def admit(self) -> None:
        """In order of arrival."""
        while self.waiting and self.idle and self.waiting[0].arrival <= self.now:
            request = self.waiting[0]
            tokens = len(request.tokens) + 1
            if self.sizes.pages_of(tokens) > len(self.free):
                return
            request.slot = self.idle.pop()
            self.running.append(self.waiting.popleft())
            self.turns += 1
            self.grow(request, tokens)

    def plan(self) -> list[Chosen]:
        """All that decode, and prompts as far as there is room, oldest first."""
        if len(self.free) < len(self.running):
            self.settle()  # each may want a page, and who is sent away must have been read
        chosen, room = [], self.sizes.chunk
        for request in tuple(self.running):
            while request in self.running and not self.grow(request, request.cached + min(request.ahead, 1)):
                self.preempt(self.running[-1])
            if request not in self.running:
                break
            count = request.ahead if request.ahead < 2 else min(request.ahead, room)
            if count:
                room -= count if request.ahead > 1 else 0
                chosen.append(Chosen(request, request.slot, count, count == request.ahead))
        return chosen

    def grow(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens, as far as there are free ones."""
        while len(request.pages) < self.sizes.pages_of(tokens):
            if not self.free:
                return False
            request.pages.append(self.free.pop())
            self.tables[request.slot, len(request.pages) - 1] = request.pages[-1]
        return True

    def preempt(self, request: Request) -> None:
        self.release(request)
        request.cached = 0
        self.waiting.appendleft(request)
        self.preempted += 1

    def release(self, request: Request) -> None:
        self.running.remove(request)
        self.free += request.pages
        self.idle.append(request.slot)
        self.tables[request.slot] = -1
        request.pages = []

    def launch(self, chosen: list[Chosen]) -> bool:
        """Starts a step, and reads the one before; returns whether all decode."""
        decode = all(one.count == 1 for one in chosen)
        batch = self.batch(chosen, decode)
        self.cache, made, logits = self.programs[decode](self.cache, self.made, batch)
        self.settle()
        for request, _, count, last in chosen:
            request.cached += count
            request.flying = int(last)
        self.made, self.unread = made, (chosen, made, logits)
        if decode and batch.lens.sum() > self.fullest.lens.sum():
            self.fullest = batch
        return decode

    def batch(self, chosen: Sequence[Chosen], decode: bool) -> Batch:
        batch = empty(self.sizes, decode)
        for request, slot, count, _ in chosen:
            batch.starts[slot + 1], batch.lens[slot] = count, request.cached + count
        np.cumsum(batch.starts, out=batch.starts)
        for request, slot, count, _ in chosen:
            known = request.tokens[request.cached :][:count]
            batch.tokens[batch.starts[slot] :][: len(known)] = known
        batch.tables[:] = self.tables  # a copy: the device may read it when the tables have changed
        return batch

    def settle(self) -> None:
        """Waits for the step before, and takes what it made. Requests end here."""
        if self.unread is None:
            return
        (chosen, *arrays), self.unread = self.unread, None
        made, logits = map(np.asarray, arrays)
        for request, slot, _, last in chosen:
            if request.done or not last:
                continue
            request.tokens.append(int(made[slot]))
            request.logits.append(float(logits[slot]))
            request.flying = 0
            if len(request.logits) == request.limit or request.tokens[-1] == self.eos:
                request.done = True
                self.release(request)


def empty(sizes: Sizes, decode: bool) -> Batch:
    """A batch without rows."""
    tables = np.full((sizes.slots, sizes.pages_of(sizes.longest)), -1, np.int32)
    starts, lens = np.zeros(sizes.slots + 1, np.int32), np.zeros(sizes.slots, np.int32)
    return Batch(np.full(sizes.rows(decode), -1, np.int32), tables, starts, lens)
