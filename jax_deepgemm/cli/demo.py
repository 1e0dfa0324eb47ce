"""python -m jax_deepgemm demo: an MLP block in BF16 and FP8, forward and backward, checked and timed."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.cli.arguments import seconds, whole
from jax_deepgemm.cli.info import devices, support
from jax_deepgemm.tools.text import Progress, table

HIDDEN, INTERMEDIATE = 7168, 2048
TOKENS = {"gpu": 4096, "cpu": 64}
MOST_TOKENS = 1 << 20  # 15 GB of activations
HEADER = ("device", "op", "shape", "chosen kernel", "compile ms", "time", "TFLOP/s", "rel. error", "limit")


@dataclass(frozen=True)
class Row:
    """One line of the demo.

    Attributes:
      op: what is run.
      shape: of its problem, for people.
      function: the function to jit.
      exact: its float32 form, on the same operands.
      arguments: of the function.
      exact_arguments: of the float32 form.
      flops: of one call.
      limit: largest relative error (Frobenius norm) that passes.
    """

    op: str
    shape: str
    function: Callable[..., Any]
    exact: Callable[..., Any]
    arguments: tuple[Any, ...]
    exact_arguments: tuple[Any, ...]
    flops: float
    limit: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        type=whole(1, MOST_TOKENS),
        metavar="N",
        help="rows of the activations (default 4096 on a GPU, 64 on a CPU)",
    )
    parser.add_argument(
        "--seconds", type=seconds, default=0.3, help="time to spend on measuring each row (default 0.3)"
    )


def run(args: argparse.Namespace) -> int:
    device = devices()[0]
    supported, reason = support(device)
    if not supported and device.platform != "cpu":
        print(f"{device.device_kind}: {reason} The demo runs on the CPU instead.\n")
        device = jax.devices("cpu")[0]
    platform = "gpu" if supported else "cpu"
    tokens = args.tokens or TOKENS[platform]
    print(
        f"MLP block: hidden {HIDDEN}, intermediate {INTERMEDIATE}, {tokens} tokens, bfloat16 weights, "
        f"on {device.device_kind}."
    )
    if platform == "cpu":
        print(
            "No GPU kernels here: the ops run in their float32 reference form, on few tokens. "
            "Times say nothing of a GPU's."
        )
    with jax.default_device(device):
        rows = problems(tokens)
        cells, passed = [], True
        with Progress(len(rows), "demo") as progress:
            for row in rows:
                progress.draw(row.op)
                line, ok = measure(row, device, args.seconds)
                cells.append(line)
                passed &= ok
                progress.step()
    print()
    print(table(HEADER, cells))
    print(
        f"\n{'PASS' if passed else 'FAIL'}: relative error against float32 (Frobenius norm; the largest, "
        "where a function has several results)"
    )
    return 0 if passed else 1


def problems(tokens: int) -> list[Row]:
    """Draws the block once and returns the demo's rows."""
    import jax_deepgemm as jdg

    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, HIDDEN), jnp.bfloat16)
    up = (jax.random.normal(keys[1], (INTERMEDIATE, HIDDEN)) * HIDDEN**-0.5).astype(jnp.bfloat16)
    down = (jax.random.normal(keys[2], (HIDDEN, INTERMEDIATE)) * INTERMEDIATE**-0.5).astype(jnp.bfloat16)
    cotangent = jax.random.normal(keys[3], (tokens, HIDDEN), jnp.bfloat16)
    middle = jax.nn.silu(bf16_linear(x, up))
    flops = 2 * tokens * HIDDEN * INTERMEDIATE
    rows = []
    for name, left, weight in (("up", x, up), ("down", middle, down)):
        shape = f"{left.shape[0]}x{weight.shape[0]}x{weight.shape[1]}"
        quantised = jdg.quantize(left, block=(1, 128)), jdg.quantize(weight, block=(128, 128))
        exact = (left, weight)
        rows.append(
            Row(f"bf16_gemm_nt ({name})", shape, jdg.bf16_gemm_nt, float32_linear, exact, exact, flops, 0.01)
        )
        rows.append(
            Row(
                f"fp8_gemm_nt ({name})", shape, jdg.fp8_gemm_nt, float32_linear, quantised, exact, flops, 0.05
            )
        )
    shape = f"{tokens}x{HIDDEN}x{INTERMEDIATE}"
    operands = (x, up, down)
    forms = (("bf16", bf16_linear, 0.01, 0.02), ("fp8", jdg.fp8_linear, 0.10, 0.15))
    for name, linear, limit, grad_limit in forms:
        forward, exact_forward = mlp(linear), mlp(float32_linear)
        rows.append(
            Row(f"MLP forward, {name}", shape, forward, exact_forward, operands, operands, 2 * flops, limit)
        )
        backward, exact_backward = gradient(forward), gradient(exact_forward)
        both = (*operands, cotangent)
        rows.append(
            Row(f"MLP fwd + bwd, {name}", shape, backward, exact_backward, both, both, 6 * flops, grad_limit)
        )
    return rows


def bf16_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    import jax_deepgemm as jdg

    return jdg.bf16_gemm_nt(x, w)


def float32_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """The standard of comparison: float32 throughout."""
    return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32).T, precision="highest")


def mlp(linear: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Returns the block with a given linear layer: down(silu(up(x)))."""

    def block(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return linear(jax.nn.silu(linear(x, up)), down)

    return block


def gradient(block: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns a function that gives the block's gradients for x and both weights."""

    def step(x: jax.Array, up: jax.Array, down: jax.Array, cotangent: jax.Array) -> Any:
        result, pullback = jax.vjp(block, x, up, down)
        return pullback(cotangent.astype(result.dtype))

    return step


def measure(row: Row, device: Any, seconds: float) -> tuple[list[str], bool]:
    """Compiles, runs and checks one row; an exception is a row that failed."""
    try:
        begin = time.perf_counter()
        compiled = jax.jit(row.function).lower(*row.arguments).compile()
        compile_ms = (time.perf_counter() - begin) * 1e3
        result = jax.block_until_ready(compiled(*row.arguments))
        exact = jax.jit(row.exact)(*row.exact_arguments)
        error = max(map(relative_error, jax.tree.leaves(result), jax.tree.leaves(exact)))
        duration = time_of(lambda: compiled(*row.arguments), seconds)
        kernel = chosen_kernel(row.function, row.arguments, device)
    except Exception as problem:
        print(f"{row.op}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return [device.device_kind, row.op, row.shape, "-", "-", "-", "-", "failed", f"{row.limit:g}"], False
    passed = error <= row.limit
    unit, scale = ("us", 1e6) if duration < 1e-3 else ("ms", 1e3)
    return [
        device.device_kind,
        row.op,
        row.shape,
        kernel,
        f"{compile_ms:.0f}",
        f"{duration * scale:.4g} {unit}",
        f"{row.flops / duration / 1e12:.3g}",
        f"{error:.4f}" + ("" if passed else " FAIL"),
        f"{row.limit:g}",
    ], passed


def relative_error(got: jax.Array, exact: jax.Array) -> float:
    """||got - exact|| / ||exact||; infinity if anything is not finite."""
    difference = jnp.linalg.norm(got.astype(jnp.float32) - exact.astype(jnp.float32)) / jnp.linalg.norm(exact)
    return float(jnp.where(jnp.isfinite(difference), difference, jnp.inf))


def time_of(call: Callable[[], Any], seconds: float) -> float:
    """Returns seconds per call: median of rounds of queued calls, each waited for once."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - begin
    queued = max(1, min(20, int(seconds / 5 / max(once, 1e-6))))
    rounds = []
    for _ in range(5 if queued > 1 else max(1, min(5, int(seconds / once)))):
        begin = time.perf_counter()
        jax.block_until_ready([call() for _ in range(queued)][-1])
        rounds.append((time.perf_counter() - begin) / queued)
    return statistics.median(rounds)


def chosen_kernel(function: Callable[..., Any], arguments: tuple[Any, ...], device: Any) -> str:
    """Returns the names of the kernels the function launches on the device."""
    if device.platform == "cpu":
        return "reference (float32)"
    from jax_deepgemm.tools.explain import kernel_names

    return ", ".join(kernel_names(function, *arguments)) or "XLA"
