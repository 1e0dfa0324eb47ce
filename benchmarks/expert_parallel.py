"""Layers of experts spread over the GPUs of one host: how long a call takes, and what of that is exchange.

    python benchmarks/expert_parallel.py --out FILE       # measures on all GPUs (two minutes for two)
    python benchmarks/expert_parallel.py --report FILE    # prints the table of docs/moe.md
    python benchmarks/expert_parallel.py --small          # a few small layers, to try the script anywhere

A row is one call of `expert_parallel_moe` with random routing, on every device as many tokens, FP8 weights;
or forward and backward with bfloat16 masters. Every call follows a flush of the L2 caches. Times are of the
device where they are longest, medians of the calls: from the flush's end to the last kernel's end (the span),
the exchange's kernels (waiting for other devices included), the GEMMs', and what is left of the span.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm import quantize
from jax_deepgemm.moe import expert_parallel_moe, route
from jax_deepgemm.ops.gemm.bench import GEMM_PREFIX
from jax_deepgemm.tools.bench import trace
from jax_deepgemm.tools.bench.timing import FLUSH_BYTES, named, profiler
from jax_deepgemm.tools.text import Progress

AXIS = "expert"
CUT = P(AXIS)
CALLS = 8
WARM_UP = 2
EXCHANGE = (
    "nccl",
    "MemcpyP2P",
    "void stream_executor::gpu::RaggedAllToAll",
    "stream_executor::gpu::RaggedAllToAll",
)
"""How the names of the kernels and copies begin by which devices exchange rows."""


@dataclass(frozen=True)
class Case:
    """A row. `tokens` are those of one device, `experts` those of all."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    method: str
    trains: bool = False

    def __str__(self) -> str:
        what = "training" if self.trains else "inference"
        sizes = f"{self.hidden}/{self.inner}, {self.top_k} of {self.experts}"
        return f"{what}, {self.tokens} tokens a device, {sizes}, {self.method}"


MODELS = ((7168, 2048, 256, 8), (2048, 768, 128, 8), (4096, 2048, 256, 6))
"""Hidden, inner, experts and top-k of DeepSeek-V3, Qwen3-30B-A3B and DeepSeek-V4-Flash."""
METHODS = ("all_to_all", "ragged")


def cases(small: bool) -> Iterator[Case]:
    if small:
        yield from (
            Case(16, 256, 128, 8, 2, method, trains) for method in METHODS for trains in (False, True)
        )
        return
    for model in MODELS:
        for method in METHODS:
            for tokens in (16, 128, 1024, 8192):
                yield Case(tokens, *model, method)
            yield Case(4096, *model, method, trains=True)


def draw(case: Case, mesh: Mesh) -> tuple[Any, ...]:
    """Tokens, ids, routing weights, both weights, and the gradient of the result, cut over the mesh."""
    tokens, to = case.tokens * mesh.size, NamedSharding(mesh, CUT)

    @functools.partial(jax.jit, out_shardings=to)
    def tokens_and_choice() -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        x, dy = (jax.random.normal(key, (tokens, case.hidden), jnp.bfloat16) for key in keys[:2])
        return x, *route(jax.random.normal(keys[2], (tokens, case.experts)), case.top_k), dy

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=CUT, out_specs=CUT)
    def weights(keys: jax.Array) -> Any:
        def one(key: jax.Array) -> Any:
            first, second = jax.random.split(key)
            w13 = case.hidden**-0.5 * jax.random.normal(first, (2 * case.inner, case.hidden))
            w2 = case.inner**-0.5 * jax.random.normal(second, (case.hidden, case.inner))
            if case.trains:
                return w13.astype(jnp.bfloat16), w2.astype(jnp.bfloat16)
            return quantize(w13, (128, 128)), quantize(w2, (128, 128))

        return jax.lax.map(one, keys)

    x, ids, routing, dy = tokens_and_choice()
    return x, ids, routing, *jax.jit(weights)(jax.random.split(jax.random.key(1), case.experts)), dy


def program(case: Case, mesh: Mesh) -> Callable[..., Any]:
    """What is measured, of what `draw` returns."""
    layer = functools.partial(expert_parallel_moe, axis=AXIS, method=case.method)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=CUT, out_specs=CUT)
    def forward(x: Any, ids: Any, routing: Any, w13: Any, w2: Any) -> jax.Array:
        return layer(x, ids, routing, w13, w2)[0]

    def call(x: Any, ids: Any, routing: Any, w13: Any, w2: Any, dy: Any) -> Any:
        if not case.trains:
            return forward(x, ids, routing, w13, w2)
        y, vjp = jax.vjp(lambda x, *rest: forward(x, ids, *rest), x, routing, w13, w2)
        return y, vjp(dy)

    return call


def flusher(mesh: Mesh, size: int) -> Callable[[], None]:
    """Writes a buffer of `size` bytes on every device."""
    to = NamedSharding(mesh, CUT)

    def jdg_flush(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value, buffer.shape)

    fill = jax.jit(jdg_flush, donate_argnums=0, out_shardings=to)
    shape = (mesh.size * max(size >> 16, 1), 1 << 14)
    held = [jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=to)()]

    def flush() -> None:
        held[0] = fill(held[0], jnp.float32(1))

    return flush


SIZES = ("trains", "hidden", "inner", "experts", "top_k", "tokens")
TIMES = ("span_us", "exchange_us", "gemm_us", "rest_us")

Call = tuple[float, list[trace.Event]]
"""When the flush before a call ended, in nanoseconds, and what ran then."""


def calls(events: Sequence[trace.Event]) -> list[Call]:
    """The calls of a trace of one device, which flushes divide."""
    found: list[Call] = []
    for event in events:
        if trace.FLUSH in event.module:
            found.append((event.start + event.duration, []))
        elif found:
            found[-1][1].append(event)
    return [call for call in found if call[1]]


def split(call: Call) -> dict[str, float]:
    """Microseconds of one call on one device."""
    flushed, events = call
    span = (max(e.start + e.duration for e in events) - flushed) / 1e3
    exchange = sum(e.duration for e in events if e.name.startswith(EXCHANGE)) / 1e3
    gemms = sum(e.duration for e in events if e.name.startswith(GEMM_PREFIX)) / 1e3
    return {"span_us": span, "exchange_us": exchange, "gemm_us": gemms, "rest_us": span - exchange - gemms}


def longest_kernels(call: Call, count: int = 12) -> dict[str, float]:
    """Microseconds of the kernels that take most of a call, by name."""
    total: dict[str, float] = {}
    for event in call[1]:
        total[event.name] = total.get(event.name, 0.0) + event.duration / 1e3
    return {name: round(us, 1) for name, us in sorted(total.items(), key=lambda pair: -pair[1])[:count]}


def time_case(case: Case, mesh: Mesh, flush: Callable[[], None]) -> dict[str, Any]:
    """A row of the result file."""
    arguments = draw(case, mesh)
    compiled = jax.jit(named(program(case, mesh), "jdg_case")).lower(*arguments).compile()
    for _ in range(WARM_UP):
        jax.block_until_ready(compiled(*arguments))
    with tempfile.TemporaryDirectory(prefix="jdg_trace_") as folder:
        with profiler(folder):
            for _ in range(CALLS):
                flush()
                result = compiled(*arguments)
            jax.block_until_ready(result)
        devices = [calls(trace.read(folder, device)) for device in range(mesh.size)]
    row: dict[str, Any] = dataclasses.asdict(case)
    if not any(devices):  # no GPU: the program ran, and that is all
        return row
    longest = max(devices, key=lambda found: statistics.median(split(call)["span_us"] for call in found))
    times = [split(call) for call in longest]
    row |= {name: round(statistics.median(each[name] for each in times), 1) for name in times[0]}
    return row | {"kernels": longest_kernels(longest[-1])}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures on all devices; writes the file after every row."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    content: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "rows": [],
    }
    chosen = [case for case in cases(args.small) if args.rows.search(str(case))]
    begin, flush = time.monotonic(), flusher(mesh, 1 << 16 if args.small else FLUSH_BYTES)
    with Progress(len(chosen), "expert parallel") as progress:
        for case in chosen:
            if time.monotonic() - begin > args.time_limit:
                print(f"not measured within {args.time_limit:.0f} s: {case}", file=sys.stderr)
                continue
            content["rows"].append(time_case(case, mesh, flush))
            progress.step(str(case))
            if args.out:
                args.out.write_text(json.dumps(content, indent=1) + "\n")
    return content


def table(content: dict[str, Any]) -> str:
    """Markdown of a measurement: a line for each row, those that differ in the method alone together."""
    lines = [
        "| tokens a device | hidden / inner | experts | what | method | span us | exchange | GEMMs | rest |",
        "|--:|:--|:--|:--|:--|--:|--:|--:|--:|",
    ]
    for row in sorted(content["rows"], key=lambda row: [row[name] for name in SIZES]):
        what = "forward and backward" if row["trains"] else "forward"
        experts = f"{row['top_k']} of {row['experts']}"
        cells = [row["tokens"], f"{row['hidden']} / {row['inner']}", experts, what, row["method"]]
        cells += [f"{row[name]:.0f}" if name in row else "–" for name in TIMES]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--report", type=Path, help="print the table of a result file; measure nothing")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="regular expression on rows")
    parser.add_argument("--small", action="store_true", help="a few small layers")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds after which no row starts")
    args = parser.parse_args()
    content = json.loads(args.report.read_text()) if args.report else measure(args)
    print(table(content), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
