"""Layers of experts spread over the GPUs of one host: how long a call takes, and what of that is exchange.

    python benchmarks/expert_parallel.py --out FILE       # measures on all GPUs (two minutes for two)
    python benchmarks/expert_parallel.py --report FILE    # prints the table of docs/moe.md
    python benchmarks/expert_parallel.py --small          # a few small layers, to try the script anywhere

A row is one call of `expert_parallel_moe` with random routing, on every device as many tokens, FP8 weights;
or forward and backward with bfloat16 masters. Every call follows a flush of the L2 caches. Times are of the
device where they are longest, medians of the calls: from the first kernel's start to the last one's end, the
exchange's kernels (waiting for other devices included), the GEMMs', and what is left of the span.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
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
EXCHANGE = ("nccl", "MemcpyP2P", "MemcpyD2D")
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


def split(call: Sequence[trace.Event]) -> dict[str, float]:
    """Microseconds of one call on one device."""
    span = trace.span_of(call)
    exchange = sum(e.duration for e in call if e.name.startswith(EXCHANGE)) / 1e3
    gemms = sum(e.duration for e in call if e.name.startswith(GEMM_PREFIX)) / 1e3
    return {"span_us": span, "exchange_us": exchange, "gemm_us": gemms, "rest_us": span - exchange - gemms}


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
        found = [_median(trace.read(folder, device)) for device in range(mesh.size)]
    longest = max(found, key=lambda times: times.get("span_us", 0.0))
    return dataclasses.asdict(case) | {name: round(value, 1) for name, value in longest.items()}


def _median(events: Sequence[trace.Event]) -> dict[str, float]:
    """Of all calls on one device; nothing where the trace shows no GPU."""
    if not events:
        return {}
    calls = [split(call) for call in trace.split_calls(events, ["jdg_case"] * CALLS)["jdg_case"]]
    return {name: statistics.median(call[name] for call in calls) for name in calls[0]}


def measure(small: bool, time_limit: float, out: Path | None) -> dict[str, Any]:
    """Measures on all devices; writes the file after every row."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    content: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "rows": [],
    }
    chosen, begin, flush = (
        list(cases(small)),
        time.monotonic(),
        flusher(mesh, 1 << 16 if small else FLUSH_BYTES),
    )
    with Progress(len(chosen), "expert parallel") as progress:
        for case in chosen:
            if time.monotonic() - begin > time_limit:
                print(f"not measured within {time_limit:.0f} s: {case}", file=sys.stderr)
                continue
            content["rows"].append(time_case(case, mesh, flush))
            progress.step(str(case))
            if out:
                out.write_text(json.dumps(content, indent=1) + "\n")
    return content


def table(content: dict[str, Any]) -> str:
    """Markdown of a measurement: a line for each case, the methods side by side."""
    lines = [
        "| tokens a device | hidden, inner, experts, top-k | what | " + " | ".join(
            f"{method}: span us | exchange | GEMMs | rest" for method in METHODS
        ) + " |",
        "|--:|:--|:--|" + "--:|" * 4 * len(METHODS),
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        sizes = ", ".join(str(row[name]) for name in ("hidden", "inner", "experts", "top_k"))
        what = "forward and backward" if row["trains"] else "forward"
        groups.setdefault((row["tokens"], sizes, what), {})[row["method"]] = row
    for key, rows in groups.items():
        cells = [
            f"{rows[method][name]:.0f}" if name in rows.get(method, {}) else "–"
            for method in METHODS
            for name in ("span_us", "exchange_us", "gemm_us", "rest_us")
        ]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--report", type=Path, help="print the table of a result file; measure nothing")
    parser.add_argument("--small", action="store_true", help="a few small layers")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds after which no row starts")
    args = parser.parse_args()
    content = (
        json.loads(args.report.read_text()) if args.report else measure(args.small, args.time_limit, args.out)
    )
    print(table(content), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
