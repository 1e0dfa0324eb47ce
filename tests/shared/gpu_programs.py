"""What files of GPU tests share: how results differ, chains of calls, calls whose C is not in D's memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core import launch

QUICK = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}  # the oracle's dots: no search


def program(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=QUICK, **options)


def difference(x: jax.Array, y: jax.Array) -> jax.Array:
    """calc_diff, |x - y|^2 / (|x|^2 + |y|^2), so written that float32 suffices; 0 for two zeros."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    energy = jnp.sum(x * x) + jnp.sum(y * y)
    return jnp.where(energy == 0, 0.0, jnp.sum((x - y) ** 2) / jnp.where(energy == 0, 1.0, energy))


PIECE = 1 << 24


def random_numbers(count: int) -> jax.Array:
    """At least so many standard normal numbers, bfloat16, made piece by piece because a generator needs
    several times the memory of what it makes."""
    keys = jax.random.split(jax.random.key(7), -(-count // PIECE))
    make = functools.partial(jax.random.normal, shape=(PIECE,), dtype=jnp.bfloat16)
    return program(lambda keys: lax.map(make, keys).reshape(-1))(keys)


def chain(
    step: Callable[..., jax.Array], x: jax.Array, *operands: Any, steps: int, scanned: bool = False
) -> jax.Array:
    """x after some steps, each given what the one before gave; unrolled, or in a loop."""
    if scanned:
        return lax.scan(lambda x, _: (step(x, *operands), None), x, length=steps)[0]
    return functools.reduce(lambda x, _: step(x, *operands), range(steps), x)


# C in a buffer that is not D's ----------------------------------------------------------------------------

Add = Callable[..., jax.Array]
"""(c, *operands) -> D."""


def _used_again(add: Add, _: jax.Array, c: jax.Array, *operands: Any) -> tuple[jax.Array, jax.Array]:
    d = add(c, *operands)
    return d, d + c


def _slice(add: Add, _: jax.Array, cs: jax.Array, *operands: Any) -> jax.Array:
    return add(cs[1], *operands)


def _loop(add: Add, _: jax.Array, cs: jax.Array, *operands: Any) -> jax.Array:
    return lax.scan(lambda i, c: (i, add(c, *operands)), 0, cs)[1]


def _not_aliased(add: Add, _: jax.Array, c: jax.Array, *operands: Any) -> jax.Array:
    return add(c, *operands)


C_ELSEWHERE: dict[str, Callable[..., Any]] = {
    "used again": _used_again,
    "slice": _slice,
    "loop": _loop,
    "not aliased": _not_aliased,
}
"""XLA copies a C that is used again. A slice, also a loop's, it hands over where it lies, and so any C of a
custom call that does not ask for one buffer: then it is the launch plan that copies."""


def with_c_elsewhere(where: str, add: Add, c: jax.Array, *operands: Any) -> jax.Array:
    """D of a call whose C is not in D's buffer, which was full of NaN; C is what it was, or this fails."""
    given = jnp.stack([jnp.full_like(c, jnp.nan), c, jnp.full_like(c, jnp.nan)])
    given = given if where in ("slice", "loop") else c
    before = np.asarray(given)
    buffer = jnp.full_like(given if where == "loop" else c, jnp.nan)
    place = buffer.unsafe_buffer_pointer()
    run = program(functools.partial(C_ELSEWHERE[where], add), donate_argnums=0, keep_unused=True)
    with _without_aliases() if where == "not aliased" else contextlib.nullcontext():
        d, *sums = jax.tree.leaves(run(buffer, given, *operands))
    assert d.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(given, before)
    for found in sums:
        np.testing.assert_array_equal(found, d + c)
    return d[1] if where == "loop" else d


def _without_aliases() -> Any:
    """Custom calls that are lowered meanwhile may have C and D anywhere."""
    emit = launch.emit
    return mock.patch.object(launch, "emit", lambda ctx, plan, args, aliases: emit(ctx, plan, args))
