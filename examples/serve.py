"""Serves many requests at a time from a paged cache: continuous batching of models with FP8 experts.

    python examples/serve.py                                 # tiny, random weights, on a CPU: half a minute
    python examples/serve.py --config qwen3-moe              # layers of Qwen3-30B-A3B, for one H200
    python examples/serve.py --config deepseek               # layers of DeepSeek-V3's sizes
    python examples/serve.py --weights Qwen3-30B-A3B-FP8     # a folder of safetensors

A step is one program. It takes the next token of each request that decodes, and parts of the prompts of
others, in one call of `ragged_paged_attention` a layer. There are two programs: of steps that only decode,
and of mixed ones. serving/programs.py is what the device does, serving/engine.py the host, serving/model.py
the models; here are the requests, and what is measured.

--check computes every request again, alone, without cache or pages, and compares each token; and it serves
some of them alone, to see whether company changes a bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from serving.engine import Engine, Request, Sizes, empty
from serving.model import CONFIGS, Config, Tree, draw_weights, load_weights, weight_bytes
from serving.programs import Batch, copies_of, recompute, step

from jax_deepgemm.attention import PagedKVCache
from jax_deepgemm.cli.arguments import Parser, input_folder, whole
from jax_deepgemm.tools.bench.timing import profiler

READ_RATE = 4.5e12
"""Bytes a second that an H200 reads."""
SIZES = {
    True: Sizes(slots=4, chunk=32, longest=96, pages=12, page_size=16),
    False: Sizes(slots=64, chunk=1024, longest=2048, pages=768, page_size=64),
}
"""Of tiny models, and of others. Pages are fewer than all slots may want."""
MARGIN = {True: 0.05, False: 0.5}
"""How far behind the best logit a token may be that is not the same, in standard deviations of the logits.
Products of more rows may add up in another order, and of many experts some are as good as another."""


def draw_requests(config: Config, sizes: Sizes, count: int, seed: int) -> list[Request]:
    """Prompts and answers of all lengths; one request arrives every few steps."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.geometric(min(1.0, 4 / sizes.slots), count)) - 1

    def one(arrival: int) -> Request:
        prompt = rng.integers(1, config.vocabulary, size(sizes.longest // 32))
        return Request(arrival, prompt, size(sizes.longest // 8))

    def size(least: int) -> int:
        return int(rng.integers(max(least, 1), max(sizes.longest // 2, 2)))

    return [one(int(arrival)) for arrival in arrivals]


@contextmanager
def progress(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    print(f"{what} ..", end="", flush=True)
    yield
    print(f" {time.perf_counter() - begin:.1f} s", flush=True)


def start_engine(params: Tree, config: Config, sizes: Sizes) -> tuple[Engine, int]:
    """The engine with both programs, and how many copies of the cache the one that decodes makes."""
    c, s = config, sizes
    cache = PagedKVCache.create(
        s.pages, s.page_size, c.kv_heads, c.head_dim, layers=c.layers, v_head_dim=c.v_head_dim
    )
    made, compiled = jnp.zeros(s.slots, jnp.int32), {}
    for decode in (True, False):
        with progress(f"compiling the {'decode' if decode else 'mixed'} step"):
            lowered = step.lower(params, cache, made, empty(s, decode), config=c, decode=decode)
            compiled[decode] = lowered.compile()
    programs = {decode: functools.partial(program, params) for decode, program in compiled.items()}
    return Engine(programs, cache, made, s, c.eos), copies_of(cache, compiled[True])


def check(engine: Engine, params: Tree, config: Config, requests: Sequence[Request], margin: float) -> bool:
    """Whether each token is the one that its whole sequence, computed anew and alone, gives."""
    equal: list[bool] = []
    behind, off = [], []
    again = functools.partial(computed_again, params, config, engine.sizes.longest)
    with progress("computing every request again"):
        for request in requests:
            best, most, there, spread = again(request)
            equal += (best == request.tokens[len(request.prompt) :]).tolist()
            behind += ((most - there) / spread).tolist()
            off += (np.abs(there - request.logits) / spread).tolist()
    passed = max(behind) <= margin and statistics.median(off) <= margin
    print(
        f"{'PASS' if passed else 'FAIL'}: {sum(equal)} of {len(equal)} tokens equal full recomputation's"
        f"{'' if all(equal) else f', the others {max(behind):.3f} deviations of the logits behind at most'}; "
        f"logits are {statistics.median(off):.4f} deviations off in the median, {max(off):.4f} at most"
    )
    if not passed:
        print(what_rounding_does(again, requests[:16]))
    return passed


def computed_again(
    params: Tree, config: Config, longest: int, request: Request, rounded: bool = False
) -> tuple[Any, Any, Any, float]:
    """`recompute` of a request, of the tokens that were made."""
    padded = np.zeros(longest, np.int32)
    padded[: len(request.tokens)] = request.tokens
    *found, spread = recompute(params, padded, np.int32(len(request.tokens)), config=config, rounded=rounded)
    made = slice(len(request.prompt) - 1, len(request.tokens) - 1)
    best, most, there = (np.asarray(part)[made] for part in found)
    return best, most, there, float(spread)


def what_rounding_does(again: Callable[..., Any], requests: Sequence[Request]) -> str:
    """Recomputation beside itself with rounded probabilities: what a check without any fault would find."""
    equal: list[bool] = []
    off: list[float] = []
    for request in requests:
        best, _, there, spread = again(request)
        other, _, rounded, _ = again(request, rounded=True)
        equal += (best == other).tolist()
        off += (np.abs(there - rounded) / spread).tolist()
    return (
        f"for scale, recomputation with probabilities in bfloat16: {sum(equal)} of {len(equal)} tokens "
        f"equal, logits {statistics.median(off):.4f} deviations off in the median, {max(off):.4f} at most"
    )


def same_alone(engine: Engine, requests: Sequence[Request]) -> str:
    """How many logits keep their bits where a request is served alone, by the same programs: those of each
    text up to the first token that is another one, as logits of other texts say nothing."""
    same, total, made = 0, 0, 0
    for request in requests:
        one = Request(0, request.prompt, request.limit)
        alone = Engine(engine.programs, engine.cache, engine.made, engine.sizes, engine.eos)
        alone.run([one])
        engine.cache = alone.cache
        pairs = zip(one.tokens[len(one.prompt) :], request.tokens[len(one.prompt) :], strict=False)
        texts = sum(itertools.takewhile(bool, (a == b for a, b in pairs)))
        both = list(zip(one.logits, request.logits, strict=False))[: texts + 1]
        same += sum(a == b for a, b in both)
        total, made = total + len(both), made + len(request.logits)
    return (
        f"{same} of {total} logits of {len(requests)} requests have the same bits where they are served alone"
        f"{'' if total == made else f'; {made - total} stand behind the first other token of their text'}"
    )


# What is measured -------------------------------------------------------------------------------------------


def replay(engine: Engine, batch: Batch, steps: int) -> float:
    """Seconds of a decode step, queued so many times."""
    begin = time.perf_counter()
    for _ in range(steps):
        engine.cache, engine.made, _ = engine.programs[True](engine.cache, engine.made, batch)
    jax.block_until_ready(engine.made)
    return (time.perf_counter() - begin) / steps


def share_in_graphs(engine: Engine, batch: Batch, steps: int = 4) -> str:
    """How much of what a decode step runs on the GPU is launched by CUDA graphs, from a trace."""
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory(prefix="serve_") as folder:
        with profiler(folder):
            replay(engine, batch, steps)
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in ProfileData.from_file(str(file)).planes if p.name.startswith("/device:GPU:0")]
        events = [
            (event.duration_ns, any(str(name).startswith("cuda_graph") and of for name, of in event.stats))
            for plane in planes
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not events:
        return "CUDA graphs: none, there is no GPU in the profiler's trace"
    time_of_all = sum(duration for duration, _ in events)
    inside = sum(duration for duration, graph in events if graph) / time_of_all
    count = sum(graph for _, graph in events) / len(events)
    return (
        f"CUDA graphs: {count:.0%} of the decode step's {len(events) / steps:.0f} kernels, {inside:.0%} of "
        f"their {time_of_all / steps / 1e3:,.0f} us"
    )


def report(engine: Engine, params: Tree, config: Config, requests: Sequence[Request], seconds: float) -> None:
    made = sum(len(request.logits) for request in requests)
    stopped = sum(request.tokens[-1] == config.eos for request in requests)
    print(
        f"{len(requests)} requests, {stopped} ended by eos; {engine.turns} turns in {engine.sizes.slots} "
        f"slots, {engine.preempted} preempted"
    )
    print(f"{made / seconds:,.0f} tokens/s: {made} in {seconds:.2f} s")
    for decode, name in ((True, "decode"), (False, "mixed")):
        if times := engine.seconds[decode]:
            print(f"{len(times)} {name} steps: {1e6 * statistics.median(times):,.0f} us in the median")
    batch, cache = jax.device_put(engine.fullest), engine.cache
    rows, keys = np.count_nonzero(batch.lens), int(batch.lens.sum())
    weights = weight_bytes(config, params, rows)
    kv = keys * (cache.k.nbytes + cache.v.nbytes) / (cache.pages * cache.page_size)
    replay(engine, batch, 2)
    took = replay(engine, batch, 20)
    print(
        f"the fullest decode step, {rows} requests and {keys:,} keys: {1e6 * took:,.0f} us; "
        f"floor {1e6 * (weights + kv) / READ_RATE:,.1f} us, {weights / 1e6:,.1f} MB of weights and "
        f"{kv / 1e6:,.1f} MB of keys and values at {READ_RATE / 1e12} TB/s"
    )
    print(share_in_graphs(engine, batch))


# The program ------------------------------------------------------------------------------------------------


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
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=number, help=f"see engine.Sizes; default: {sizes}"
        )
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
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sizes)}
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
    engine, copies = start_engine(params, config, sizes)
    begin = time.perf_counter()
    engine.run(requests)
    report(engine, params, config, requests, time.perf_counter() - begin)
    print(f"{'FAIL' if copies else 'PASS'}: the decode step makes {copies} copies of the cache")
    passed = not copies
    if tiny if args.check is None else args.check:
        passed &= check(engine, params, config, requests, MARGIN[tiny])
        print(same_alone(engine, requests[:8]))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
