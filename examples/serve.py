"""Serves many requests at a time with a paged cache: continuous batching, over mixture-of-experts models in FP8.

    python examples/serve.py                                 # tiny, random weights, on a CPU: half a minute
    python examples/serve.py --config qwen3-moe              # layers of Qwen3-30B-A3B, for one H200
    python examples/serve.py --config deepseek               # layers of DeepSeek-V3's sizes
    python examples/serve.py --weights Qwen3-30B-A3B-FP8     # a folder of safetensors

A step is one program: it takes the next token of each request that decodes, and parts of prompts of others, in
one call of `ragged_paged_attention` a layer. There are two: one for steps that only decode, one for mixed ones.
The host keeps a list of free pages, admits requests as they arrive, and where pages run out takes those of the
youngest request, which is computed again later. It plans a step while the device is still at the one before.

--check computes every request again, alone, without cache or pages, and compares each token.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from serve_model import CONFIGS, Config, Tree, draw_weights, forward, load_weights, logits_of, weight_bytes

from jax_deepgemm.attention import PagedKVCache, paged_append, ragged_paged_attention
from jax_deepgemm.cli.arguments import Parser, input_folder, whole
from jax_deepgemm.tools.bench.timing import profiler

READ_RATE = 4.5e12  # bytes a second that an H200 reads
MARGIN = 0.05  # of the standard deviation of logits: closer ones may change places


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static of serving.

    Attributes:
      slots: requests at a time.
      chunk: tokens of prompts in a step, at most.
      longest: tokens of a request, prompt and answer.
      pages, page_size: of the cache; page_size tokens each.
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


# The step, on the device ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The new tokens of all slots behind each other, int32. Slots without any have no rows.

    Attributes:
      tokens: [rows]; -1: the token that the step before made in this slot.
      tables: [slots, pages]: which pages a slot has.
      starts: [slots + 1], where rows of each slot begin.
      lens: [slots], tokens of each slot, the new ones among them.
    """

    tokens: Any
    tables: Any
    starts: Any
    lens: Any


@functools.partial(jax.jit, static_argnames=("config", "decode"), donate_argnames="cache")
def step(
    params: Tree, cache: PagedKVCache, made: jax.Array, batch: Batch, *, config: Config, decode: bool
) -> tuple[PagedKVCache, jax.Array, jax.Array]:
    """The cache with the new tokens' keys, and of each slot the likeliest next token and its logit."""
    tables, starts, lens = batch.tables, batch.starts, batch.lens
    row = jnp.arange(batch.tokens.shape[0])
    valid = row < starts[-1]
    slot = jnp.clip(jnp.searchsorted(starts, row, side="right") - 1, 0, len(lens) - 1)
    position = jnp.where(valid, lens[slot] - starts[slot + 1] + row, 0)
    page = tables[slot, position // cache.page_size]
    where = jnp.where(valid, page * cache.page_size + position % cache.page_size, -1)
    tokens = jnp.where(batch.tokens < 0, made[slot], batch.tokens)
    rotary = position, jnp.asarray(config.inv_freq)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal cache
        cache, q = paged_append(cache, k, v, where, q=q, rotary=rotary, layer=layer)
        most = 1 if decode else None
        return ragged_paged_attention(q, cache, tables, starts, lens, max_q_len=most, layer=layer)

    x = forward(params, tokens, valid, attend, config, few=decode)
    logits = logits_of(params, x[jnp.maximum(starts[1:] - 1, 0)])
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(logits, axis=-1)


def copies_of_cache(program: Any, cache: PagedKVCache) -> int:
    """How many copies of the cache's keys or values a compiled program makes."""
    shapes = {",".join(map(str, x.shape)) for x in (cache.k, cache.v)}
    made = re.findall(r"= \(?\w+\[([\d,]+)\].*? copy(?:-start)?\(", program.as_text())
    return sum(shape in shapes for shape in made)


# The engine, on the host ------------------------------------------------------------------------------------


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

    number: int
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
        """Tokens that have no keys yet: one while it decodes; none where the last one is being made."""
        total = len(self.tokens) + self.flying
        return total - self.cached if total < len(self.prompt) + self.limit else 0


class Chosen(NamedTuple):
    """count more tokens of a request in a step; `last`: all it has, so that the step makes one."""

    request: Request
    slot: int
    count: int
    last: bool


class Engine:
    """Continuous batching. `run` serves requests; the rest says how."""

    def __init__(self, params: Tree, config: Config, sizes: Sizes, dtype: Any = jnp.bfloat16) -> None:
        self.params, self.config, self.sizes = params, config, sizes
        c, s = config, sizes
        self.cache = PagedKVCache.create(
            s.pages, s.page_size, c.kv_heads, c.head_dim, dtype, layers=c.layers, v_head_dim=c.v_head_dim
        )
        self.made = jnp.zeros(s.slots, jnp.int32)
        self.free = list(range(s.pages))
        self.idle = list(range(s.slots))
        self.tables = np.full((s.slots, s.pages_of(s.longest)), -1, np.int32)
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # the oldest first
        self.unread: tuple[list[Chosen], jax.Array, jax.Array] | None = None
        self.now, self.preempted, self.admitted = 0, 0, 0
        self.fullest = self.batch([], True)  # of the decode steps
        self.seconds: dict[bool, list[float]] = {
            True: [],
            False: [],
        }  # of steps that only decode, and mixed ones
        self.programs = {decode: self.compile(decode) for decode in (True, False)}

    def compile(self, decode: bool) -> Any:
        with progress(f"compiling the {'decode' if decode else 'mixed'} step"):
            batch = self.batch([], decode)
            lowered = step.lower(self.params, self.cache, self.made, batch, config=self.config, decode=decode)
            return lowered.compile()

    def run(self, requests: Sequence[Request]) -> None:
        """Serves until all are done."""
        for request in requests:
            total = len(request.prompt) + request.limit
            if total > self.sizes.longest or self.sizes.pages_of(total) > self.sizes.pages:
                raise ValueError(
                    f"request {request.number} may have {total} tokens, for which there is no room"
                )
            request.tokens = request.prompt.tolist()
        self.waiting.extend(sorted(requests, key=lambda request: request.arrival))
        said = begin = time.perf_counter()
        while self.waiting or self.running:
            start = time.perf_counter()
            self.admit()
            chosen = self.plan()
            if chosen:
                self.launch(chosen)
            else:
                self.settle()
            self.now += 1
            end = time.perf_counter()
            if chosen:
                self.seconds[all(one.count == 1 for one in chosen)].append(end - start)
            if end - said > 2:
                said = end
                print(f"  {end - begin:.0f} s: step {self.now}, {len(self.running)} requests run, "
                      f"{len(self.waiting)} wait or have not arrived", flush=True)  # fmt: skip

    def admit(self) -> None:
        """Gives requests that wait a slot and pages for all their tokens and one more, in order of arrival."""
        while self.waiting and self.idle and self.waiting[0].arrival <= self.now:
            request = self.waiting[0]
            if self.sizes.pages_of(len(request.tokens) + 1) > len(self.free):
                return
            request.slot, self.admitted = self.idle.pop(), self.admitted + 1
            self.running.append(self.waiting.popleft())
            self.grow(request, len(request.tokens) + 1)

    def plan(self) -> list[Chosen]:
        """What goes into the next step: all that decode, and prompts as far as there is room, oldest first."""
        if len(self.free) < len(self.running):
            self.settle()  # each may want a page; who loses its own must have been read
        chosen, room = [], self.sizes.chunk
        for request in tuple(self.running):
            while request in self.running and not self.grow(request, request.cached + min(request.ahead, 1)):
                self.preempt()
            count = min(request.ahead, 1 if request.ahead == 1 else room)
            if request in self.running and count:
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

    def preempt(self) -> None:
        """Sends the youngest back to wait; with its next turn all its tokens are a prompt."""
        request = self.running[-1]
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

    def batch(self, chosen: Sequence[Chosen], decode: bool) -> Batch:
        counts, lens = np.zeros((2, self.sizes.slots), np.int32)
        for request, slot, count, _ in chosen:
            counts[slot], lens[slot] = count, request.cached + count
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tokens = np.full(self.sizes.rows(decode), -1, np.int32)
        for request, slot, count, _ in chosen:
            known = request.tokens[request.cached :][:count]
            tokens[starts[slot] : starts[slot] + len(known)] = known
        return Batch(tokens, self.tables.copy(), starts, lens)  # a copy: JAX may read it later

    def launch(self, chosen: list[Chosen]) -> None:
        """Starts a step, and reads the one before."""
        decode = all(one.count == 1 for one in chosen)
        batch = self.batch(chosen, decode)
        self.cache, made, logits = self.programs[decode](self.params, self.cache, self.made, batch)
        if decode and batch.lens.sum() > self.fullest.lens.sum():
            self.fullest = batch
        self.settle()
        for request, _, count, last in chosen:
            request.cached += count
            request.flying = int(last and not request.done)
        self.made, self.unread = made, (chosen, made, logits)

    def settle(self) -> None:
        """Waits for the step before, and takes what it made; requests end here."""
        if self.unread is None:
            return
        (chosen, *arrays), self.unread = self.unread, None
        made, logits = map(np.asarray, arrays)
        for request, slot, _, last in chosen:
            if request.done or not last:  # ended one step ago, which was not known at the launch
                continue
            request.tokens.append(int(made[slot]))
            request.logits.append(float(logits[slot]))
            request.flying = 0
            full = len(request.logits) == request.limit
            if full or request.tokens[-1] == self.config.eos:
                request.done = True
                self.release(request)


# The check --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def recompute(params: Tree, tokens: jax.Array, count: jax.Array, *, config: Config) -> tuple[jax.Array, ...]:
    """All logits of one sequence, by attention to all of it: what a token's successor could be.

    Returns:
      of each token: the likeliest successor, its logit, the logit of the successor it has, and how far logits
      spread.
    """
    position = jnp.arange(len(tokens))
    angle = position[:, None, None] * jnp.asarray(config.inv_freq)
    past = position <= position[:, None]

    def turn(x: jax.Array) -> jax.Array:
        a, b, rest = jnp.split(x.astype(jnp.float32), [config.rotary // 2, config.rotary], axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1).astype(x.dtype)

    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.astype(jnp.float32) for x in (turn(q), turn(k), v))
        q = q.reshape(len(tokens), config.kv_heads, -1, config.head_dim)
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("qgrd,kgd->grqk", q, k, precision=highest) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
        out = jnp.einsum("grqk,kgd->qgrd", weights, v, precision=highest)
        return out.reshape(len(tokens), config.heads, -1).astype(jnp.bfloat16)

    logits = logits_of(params, forward(params, tokens, position < count, attend, config))
    follows = jnp.roll(tokens, -1)
    chosen = jnp.take_along_axis(logits, follows[:, None], axis=-1)[:, 0]
    return jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1), chosen, jnp.std(logits)


def check(engine: Engine, requests: Sequence[Request]) -> bool:
    """Whether each token is what its whole sequence, computed anew and alone, gives.

    A token's keys, quantisation and experts depend on its own sequence alone; the order of sums of a product
    may depend on how many rows it has. So tokens whose logits are as good as equal may change places.
    """
    equal, total, gap, off, spread = 0, 0, 0.0, 0.0, 1.0
    with progress("computing every request again"):
        for request in requests:
            padded = np.zeros(engine.sizes.longest, np.int32)
            padded[: len(request.tokens)] = request.tokens
            whole = recompute(engine.params, padded, len(request.tokens), config=engine.config)
            made = slice(len(request.prompt) - 1, len(request.tokens) - 1)
            best, top, chosen = (np.asarray(part)[made] for part in whole[:3])
            spread = float(whole[3])
            equal += int(np.sum(best == request.tokens[len(request.prompt) :]))
            total += len(best)
            gap = max(gap, float(np.max(top - chosen)) / spread)
            off = max(off, float(np.max(np.abs(chosen - np.array(request.logits)))) / spread)
    passed = gap <= MARGIN and off <= 4 * MARGIN and all(request.done for request in requests)
    print(
        f"{'PASS' if passed else 'FAIL'}: {equal} of {total} tokens equal those of full recomputation"
        + (f", the others are {gap:.3f} of the logits' deviation behind or less" if equal < total else "")
        + f"; logits differ by {off:.3f} of it at most"
    )
    return passed


# What it prints ---------------------------------------------------------------------------------------------


@contextmanager
def progress(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    print(f"{what} ..", end="", flush=True)
    yield
    print(f" {time.perf_counter() - begin:.1f} s", flush=True)


def replay(engine: Engine, steps: int = 10) -> float:
    """Seconds of the fullest decode step, queued so many times."""
    program, batch = engine.programs[True], jax.device_put(engine.fullest)
    for _ in range(2):
        begin = time.perf_counter()
        for _ in range(steps):
            engine.cache, engine.made, _ = program(engine.params, engine.cache, engine.made, batch)
        jax.block_until_ready(engine.made)
    return (time.perf_counter() - begin) / steps


def share_in_graphs(engine: Engine) -> str:
    """Of what runs on the GPU in decode steps, how much CUDA graphs launch, from a trace of the profiler."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory(prefix="serve_") as folder:
        with profiler(folder):
            replay(engine, steps=3)
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(file)).planes)
    events = [
        (any(str(name).startswith("cuda_graph") and value for name, value in event.stats), event.duration_ns)
        for plane in planes
        if plane.name.startswith("/device:GPU:0")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not events:
        return "no GPU in the profiler's trace, so no CUDA graphs"
    inside, everything = (sum(time for graph, time in events if graph or all_) for all_ in (False, True))
    return (
        f"CUDA graphs launch {sum(graph for graph, _ in events) / len(events):.0%} of the decode step's "
        f"{len(events) // 6} kernels, {inside / everything:.0%} of their time ({everything / 6e3:,.0f} us)"
    )


def report(engine: Engine, requests: Sequence[Request], seconds: float) -> None:
    config, cache, fullest = engine.config, engine.cache, engine.fullest
    made = sum(len(request.logits) for request in requests)
    stopped = sum(request.tokens[-1] == config.eos for request in requests)
    print(
        f"{len(requests)} requests, {made} tokens in {seconds:.2f} s: {made / seconds:,.0f} tokens/s; "
        f"{stopped} ended by eos; {engine.admitted} turns in {engine.sizes.slots} slots, "
        f"{engine.preempted} preempted"
    )
    for decode, name in ((True, "decode"), (False, "mixed")):
        times = engine.seconds[decode]
        if times:
            print(f"{name} steps: {len(times)}, median {1e6 * statistics.median(times):,.0f} us")
    rows, keys = np.count_nonzero(fullest.lens), int(fullest.lens.sum())
    weights = weight_bytes(config, engine.params, rows)
    per_token = sum(x.nbytes for x in (cache.k, cache.v)) / (cache.pages * cache.page_size)
    floor = (weights + keys * per_token) / READ_RATE
    print(
        f"fullest decode step, of {rows} requests with {keys:,} keys: {1e6 * replay(engine):,.0f} us when "
        f"repeated; floor {1e6 * floor:,.1f} us ({weights / 1e6:,.1f} MB of weights and "
        f"{keys * per_token / 1e6:,.1f} MB of keys and values at {READ_RATE / 1e12} TB/s)"
    )
    print(share_in_graphs(engine))


# The program ------------------------------------------------------------------------------------------------

SIZES = {
    True: Sizes(slots=4, chunk=32, longest=96, pages=12, page_size=16),
    False: Sizes(slots=64, chunk=1024, longest=2048, pages=768, page_size=64),
}
"""Of tiny models, and others. Pages are fewer than all slots may need."""


def draw_requests(config: Config, sizes: Sizes, count: int, seed: int) -> list[Request]:
    """Prompts and answers of all lengths; one request arrives every few steps."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.geometric(4 / sizes.slots, count)) - 1

    def one(number: int) -> Request:
        prompt = rng.integers(sizes.longest // 32, sizes.longest // 2, endpoint=True)
        limit = rng.integers(sizes.longest // 8, sizes.longest // 2)
        tokens = rng.integers(1, config.vocabulary, prompt)
        return Request(number, int(arrivals[number]), tokens, int(limit))

    return [one(number) for number in range(count)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = whole(1, 1 << 20)
    parser.add_argument("--config", choices=CONFIGS, default="tiny")
    parser.add_argument(
        "--weights", type=input_folder, help="a Qwen3-MoE checkpoint in FP8, in place of a configuration"
    )
    parser.add_argument("--layers", type=number, help="the first ones only")
    parser.add_argument("--requests", type=number, help="default: 10, or 192 of models that are not tiny")
    for name in ("slots", "chunk", "longest", "pages", "page_size"):
        sizes = f"{getattr(SIZES[True], name)}, or {getattr(SIZES[False], name)}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=number, help=f"see Sizes; default: {sizes}")
    parser.add_argument("--seed", type=whole(0, 2**20), default=0)
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="compute every request again; default: of tiny models",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    tiny = args.config.startswith("tiny") and args.weights is None
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sizes)}
    sizes = dataclasses.replace(SIZES[tiny], **{name: size for name, size in given.items() if size})
    with progress("weights"):
        if args.weights:
            config, params = load_weights(args.weights, args.layers and range(args.layers))
        else:
            config = CONFIGS[args.config]
            config = dataclasses.replace(config, layers=args.layers or config.layers)
            params = draw_weights(config, args.seed)
        jax.block_until_ready(params)
    requests = draw_requests(config, sizes, args.requests or (10 if tiny else 192), args.seed)
    engine = Engine(params, config, sizes)
    begin = time.perf_counter()
    engine.run(requests)
    report(engine, requests, time.perf_counter() - begin)
    copies = copies_of_cache(engine.programs[True], engine.cache)
    print(f"{'FAIL' if copies else 'PASS'}: the decode step makes {copies} copies of the cache")
    passed = not copies
    if tiny if args.check is None else args.check:
        passed &= check(engine, requests)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
