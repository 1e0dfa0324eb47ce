"""Puts a launch plan into a program: the custom call `jax_deepgemm_launch`, executed by the module `_ffi`.

    plan = LaunchPlan((Launch(kernel, grid=(132, 1, 1), block=384, params=(...)),), label="my op")

    def cuda_rule(ctx, a, b, **params):            # a lowering rule
        return emit(ctx, plan, (a, b))

The call carries the plan and the SHA-256 of its cubins. They are found at run time in the process that
lowered, in the kernel cache, or in the package; within `embed_kernels()` the program carries them itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jax_deepgemm.core.parameters import Buffer, Operand, Param, Peer, Result, Scalar, Scratch, TensorMap
from jax_deepgemm.core.plan import Copy, Launch, LaunchPlan, Memset, check_buffer, described, encode
from jax_deepgemm.jit.cache import cubin_directory
from jax_deepgemm.jit.toolchain import read_settings, say

__all__ = [
    "TARGET",
    "Buffer",
    "Copy",
    "Launch",
    "LaunchPlan",
    "Memset",
    "Operand",
    "Param",
    "Peer",
    "Result",
    "Scalar",
    "Scratch",
    "TensorMap",
    "attributes",
    "decode",
    "embed_kernels",
    "emit",
    "encode",
    "find_cubin",
    "native",
    "register_target",
]

TARGET = "jax_deepgemm_launch"
"""Name of the custom call in HLO, and what `jax.export` must be told to accept."""

_PACKED_BITS = {"float4_e2m1fn": 4, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}

# Part of jax's tracing and lowering cache keys, so that a function lowered outside is lowered again inside.
_embed = jax.make_user_context(False)

_register_lock = threading.Lock()


@cache
def native() -> ModuleType:
    """The native module; RuntimeError with the way out when it is not built."""
    try:
        from jax_deepgemm import _ffi
    except ImportError as error:
        raise RuntimeError(
            f"The native module jax_deepgemm._ffi cannot be imported ({error}). It is built for Linux by "
            "`pip install .`, or in a source tree by `make ext PYTHON=...`. Without it every op runs on the "
            "CPU, and none on CUDA."
        ) from error
    return _ffi


def cubin_directories() -> list[str]:
    """Where the native side looks for `<digest>.cubin`: the kernel cache, then the package."""
    shipped = str(Path(__file__).parent.parent / "cubins")
    try:
        return [str(cubin_directory()), shipped]
    except ValueError:  # no home directory: compiling says so, importing this package does not fail
        return [shipped]


@cache
def _register_once() -> None:
    module = native()
    # XLA needs the state's type before the handlers that use it. Without a CUDA plugin both wait, unused.
    jax.ffi.register_ffi_type(f"{TARGET}_state", module.type(), platform="CUDA")
    jax.ffi.register_ffi_target(TARGET, module.handlers(), platform="CUDA")


def register_target() -> None:
    """Registers the custom call with XLA, once, and tells the native side where the kernel cache is now.

    Importing this module does it, so that a deserialised program finds its custom call; `emit` does it again.
    """
    with _register_lock:
        _register_once()
        native().set_cubin_directories(cubin_directories())


@contextmanager
def embed_kernels() -> Iterator[None]:
    """Programs lowered in this context carry their kernels' code: they need neither compiler nor cache.

    For `jax.export` and ahead-of-time artefacts; a program grows by the size of a cubin per kernel and call
    site.

    Yields:
      Nothing. Raises nothing itself.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_nt, embed_kernels, export_checks
    >>> a = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    >>> export = jax.export.export(jax.jit(bf16_gemm_nt), platforms=["cuda"], disabled_checks=export_checks)
    >>> small = len(export(a, a).serialize())
    >>> with embed_kernels():
    ...     len(export(a, a).serialize()) > small
    True
    """
    with _embed(True):
        yield


def find_cubin(digest: str) -> str | None:
    """Where this process would take a cubin from: "process", a path, or None."""
    return native().find_cubin(digest)


def decode(plan: np.ndarray | bytes) -> dict[str, Any]:
    """What the native side reads in an encoded plan; ValueError when it is malformed."""
    return native().decode(bytes(plan))


def attributes(plan: LaunchPlan, *, embed: bool | None = None) -> dict[str, Any]:
    """Attributes of the custom call: the plan, readable names for HLO dumps, and the cubins if `embed`."""
    embed = _embed.value if embed is None else embed
    named = [f"{kernel.name}@{kernel.digest[:16]}" for kernel in plan.kernels]
    result: dict[str, Any] = {"plan": encode(plan), "kernels": " ".join(named), "label": plan.label}
    if embed:
        cubins = {f"cubin{i}": kernel.cubin for i, kernel in enumerate(plan.kernels)}
        result |= {name: np.frombuffer(cubin, np.uint8) for name, cubin in cubins.items()}
    return result


def _num_bytes(aval: Any) -> int:
    bits = _PACKED_BITS.get(str(aval.dtype))
    count = math.prod(aval.shape)
    return count * np.dtype(aval.dtype).itemsize if bits is None else -(-count * bits // 8)


def check(plan: LaunchPlan, avals_in: Sequence[Any], avals_out: Sequence[Any]) -> None:
    """Raises ValueError where a step reaches beyond the operands and results it is given."""
    sizes = {Operand: tuple(map(_num_bytes, avals_in)), Result: tuple(map(_num_bytes, avals_out))}
    for where, buffer, needed in plan.buffers():
        if type(buffer) in sizes:
            check_buffer(f"{plan.label or 'launch plan'}: {where}", buffer, needed, sizes[type(buffer)])


def emit(
    ctx: Any, plan: LaunchPlan, operands: Sequence[Any], *, aliases: Mapping[int, int] | None = None
) -> Sequence[Any]:
    """Lowers to the custom call that executes `plan`; for use in an MLIR lowering rule.

    Args:
      ctx: the rule's context; `avals_in` are the operands' types, `avals_out` the op's results.
      plan: its kernels become known to this process, so that the program finds them.
      operands: the rule's operand values, in order.
      aliases: operand index -> index of the result that takes over its buffer.

    Returns:
      The op's results. Scratch buffers are results of the custom call only.

    Raises:
      ValueError: the plan uses a buffer that is not there, or reaches beyond its end.
    """
    check(plan, ctx.avals_in, ctx.avals_out)
    if read_settings().debug:
        say(described(plan))
    register_target()
    for kernel in plan.kernels:
        native().register_cubin(kernel.digest, kernel.cubin)
    scratch = [jax.core.ShapedArray((size,), np.dtype(np.uint8)) for size in plan.scratch_bytes]
    rule = jax.ffi.ffi_lowering(TARGET, operand_output_aliases=dict(aliases or {}))
    results = rule(ctx.replace(avals_out=[*ctx.avals_out, *scratch]), *operands, **attributes(plan))
    return list(results)[: len(ctx.avals_out)]


with suppress(RuntimeError):  # not built: `emit` says so when it is needed
    register_target()
