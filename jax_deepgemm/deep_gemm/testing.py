"""DeepGEMM's `testing`: how far results are apart, how long a function takes, how many bytes it moves."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_deepgemm.core.chip import chip_of
from jax_deepgemm.jit.toolchain import read_settings
from jax_deepgemm.tools.bench import timing, trace

__all__ = [
    "assert_bitwise_equal",
    "bench",
    "bench_kineto",
    "calc_diff",
    "count_bytes",
    "get_arch_major",
    "ignore_env",
    "test_filter",
]


def calc_diff(x: ArrayLike, y: ArrayLike) -> float:
    """How far two arrays are apart: 1 - 2 sum(x y) / sum(x^2 + y^2), in float64 on the host.

    Args:
      x: [..] of a floating type, FP8 too.
      y: [..] of the same shape.

    Returns:
      0 for equal arrays, and for two of zeros; NaN where there is NaN.

    Raises:
      ValueError: shapes that differ.

    >>> calc_diff(jnp.ones(4), jnp.ones(4)), calc_diff(jnp.zeros(4), jnp.zeros(4))
    (0.0, 0.0)
    """
    one, other = (np.asarray(jnp.asarray(v).astype(jnp.float32)).astype(np.float64) for v in (x, y))
    if one.shape != other.shape:
        raise ValueError(f"calc_diff: x is {list(one.shape)} and y is {list(other.shape)}, need one shape.")
    denominator = float((one * one + other * other).sum())
    return 0.0 if denominator == 0 else 1.0 - 2.0 * float((one * other).sum()) / denominator


def assert_bitwise_equal(x: ArrayLike, y: ArrayLike, label: str = "") -> None:
    """Compares the bytes of two arrays, so that NaN equals itself and 0 is not -0.

    Args:
      x: [..] of any type.
      y: [..] of the same shape and type.
      label: of the message.

    Raises:
      AssertionError: another shape or type, or other bytes; says how many and where the first is.

    >>> assert_bitwise_equal(jnp.array([1.0, jnp.nan]), jnp.array([1.0, jnp.nan]))
    """
    one, other = np.asarray(x), np.asarray(y)
    described = f"{label}: " if label else ""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        raise AssertionError(
            f"{described}{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)} differ in kind."
        )
    size = one.dtype.itemsize
    rows = [np.ascontiguousarray(v).reshape(-1).view(np.uint8).reshape(-1, size) for v in (one, other)]
    wrong = np.flatnonzero((rows[0] != rows[1]).any(axis=1))
    if wrong.size:
        first = tuple(int(i) for i in np.unravel_index(wrong[0], one.shape))
        raise AssertionError(
            f"{described}{wrong.size} of {one.size} elements differ, the first at {list(first)}: "
            f"{one[first]} and {other[first]}."
        )


def count_bytes(*arrays: Any) -> int:
    """The bytes of arrays, and of those in tuples and other trees of them; None counts nothing.

    Args:
      arrays: trees of arrays.

    Returns:
      int. Raises nothing.

    >>> count_bytes(jnp.ones((2, 3)), (jnp.ones(4, jnp.bfloat16), None))
    32
    """
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arrays))


def bench(fn: Callable[[], Any], num_warmups: int = 5, num_tests: int = 10) -> float:
    """Seconds of a call by the clock: calls are queued one after the other, and waited for once.

    Args:
      fn: called without arguments; what it returns is waited for.
      num_warmups: calls before.
      num_tests: calls that count.

    Returns:
      Seconds, the mean. Raises nothing but what fn raises.

    >>> bench(jax.jit(lambda: jnp.ones(8))) > 0
    True
    """
    for _ in range(num_warmups):
        jax.block_until_ready(fn())
    begin = time.perf_counter()
    jax.block_until_ready([fn() for _ in range(num_tests)])
    return (time.perf_counter() - begin) / num_tests


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | Sequence[str],
    num_tests: int = 30,
    flush_l2: bool = True,
    barrier: Callable[[], Any] | None = None,
) -> Any:
    """Seconds of kernels on the GPU, as JAX's profiler records them.

    Args:
      fn: called without arguments.
      kernel_names: a part of a kernel's name, or several.
      num_tests: calls.
      flush_l2: whether 8 GiB are written before each, which empties the L2 cache.
      barrier: called before each, or None.

    Returns:
      Seconds, the mean over the launches of kernels whose names contain that part; a tuple of them for
      several names. With JAX_DEEPGEMM_NVIDIA_TOOLS=1 each is 1.0 and nothing is profiled, so that another
      profiler can.

    Raises:
      RuntimeError: no kernel of such a name, or no GPU.

    >>> bench_kineto(lambda: None, "gemm")  # doctest: +SKIP
    1.25e-05
    """
    names = [kernel_names] if isinstance(kernel_names, str) else list(kernel_names)
    jax.block_until_ready(fn())
    if read_settings().nvidia_tools:
        seconds = [1.0 for _ in names]
    else:
        events = _traced(fn, num_tests, flush_l2, barrier)
        seconds = [_mean(events, name) for name in names]
    return seconds[0] if isinstance(kernel_names, str) else tuple(seconds)


def _traced(fn: Callable[[], Any], calls: int, flush_l2: bool, barrier: Any) -> list[trace.Event]:
    on_gpu = jax.devices()[0].platform == "gpu"
    flush = timing.flusher() if flush_l2 and on_gpu else lambda: None
    with tempfile.TemporaryDirectory(prefix="jdg_trace_") as folder:
        with timing.profiler(folder):
            results = []
            for _ in range(calls):
                flush()
                if barrier is not None:
                    barrier()
                results.append(fn())
            jax.block_until_ready(results)
        return trace.read(folder)


def _mean(events: Sequence[trace.Event], name: str) -> float:
    found = [event.duration for event in events if name in event.name]
    if not found:
        seen = sorted({event.name for event in events})
        raise RuntimeError(
            f"bench_kineto: no kernel has {name!r} in its name; the trace has {seen or 'no GPU'}."
        )
    return sum(found) / len(found) / 1e9


def get_arch_major() -> int:
    """The major compute capability of the first GPU here; 9 without one, as kernels are then made for it.

    Returns:
      int. Raises nothing.

    >>> get_arch_major() in (8, 9, 10, 12)
    True
    """
    return int(chip_of(jax.devices()[0]).capability.split(".")[0])


def test_filter(condition: Callable[[], bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function runs where the condition holds, and else says that it is left out.

    Args:
      condition: asked at each call.

    Returns:
      The decorator. Raises nothing.

    >>> @test_filter(lambda: get_arch_major() >= 100)
    ... def compare():
    ...     print("compared")
    >>> compare()
    compare is left out
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if condition():
                return fn(*args, **kwargs)
            print(f"{fn.__name__} is left out")
            return None

        return call

    return decorate


test_filter.__test__ = False  # type: ignore[attr-defined]  # to pytest, names that begin so are tests


@contextlib.contextmanager
def ignore_env(name: str, condition: Callable[[], bool]) -> Iterator[None]:
    """A context in which an environment variable is not set, where the condition holds.

    Args:
      name: of the variable.
      condition: asked at the begin.

    Yields:
      Nothing. Raises nothing.

    >>> os.environ["JAX_DEEPGEMM_DUMP"] = "ptx"
    >>> with ignore_env("JAX_DEEPGEMM_DUMP", lambda: True):
    ...     os.environ.get("JAX_DEEPGEMM_DUMP")
    >>> os.environ.pop("JAX_DEEPGEMM_DUMP")
    'ptx'
    """
    kept = os.environ.pop(name, None) if condition() else None
    try:
        yield
    finally:
        if kept is not None:
            os.environ[name] = kept
