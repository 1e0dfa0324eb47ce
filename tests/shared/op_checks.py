"""Checks that every op passes, as a table: list an op once, and get them all.

    CASES = [OpCase("fp8_gemm", fn=..., args=..., nests=..., shards=..., plain=...)]

    @pytest.mark.parametrize("check", op_checks.checks(CASES))
    def test_op(check):
        check()

jit = eager, vmap = loop, sharded = unsharded with exactly the expected collectives (Auto axes, Explicit axes,
and shard_map), gradients and Hessian-vector products = those of plain jnp, remat and scan = neither.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_COLLECTIVE = re.compile(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\(")


@dataclass(frozen=True)
class Shard:
    """One sharding of one call.

    Attributes:
      specs: spec of each operand.
      out: spec of the result, or a tuple of specs for several results.
      collectives: names in `COLLECTIVES`, as often as the compiled program has them.
      modes: "auto", "explicit" (axis types), and "shard_map" where the op on local pieces is the piece of the
        result.
      out_sharding: what the call is given in "explicit", if not `out` (under vmap: without vmap's
        dimensions).
      explicit_collectives: if the explicit program needs others.
    """

    specs: tuple[PartitionSpec, ...]
    out: Any
    collectives: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("auto", "explicit")
    out_sharding: Any = None
    explicit_collectives: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{','.join(map(_short, self.specs))}->{_short(self.out)}"


@dataclass(frozen=True, eq=False)
class OpCase:
    """One call of one op, and what is asked of it.

    Attributes:
      name: test id.
      fn: (*arrays, out_sharding=None) -> array or tuple of arrays.
      args: (seed) -> operands, without vmap's dimensions; different seeds give different numbers.
      nests: each a nest of `in_axes`, outermost first.
      shards: table of shardings, on a mesh of (2, 4) devices with axes x and y.
      plain: the same function in differentiable jnp, for gradients; None: not differentiable.
      wrt: operands to differentiate.
      second: check Hessian-vector products too.
      tolerance: largest difference, relative to the largest value.
      grad_tolerance: the same for gradients against `plain`.
    """

    name: str
    fn: Callable[..., Any]
    args: Callable[[int], Sequence[jax.Array]]
    nests: tuple[tuple[Any, ...], ...] = ()
    shards: tuple[Shard, ...] = ()
    plain: Callable[..., Any] | None = None
    wrt: tuple[int, ...] = ()
    second: bool = False
    tolerance: float = 1e-5
    grad_tolerance: float = 1e-5

    def operands(self) -> list[jax.Array]:
        return list(self.args(0))


def checks(cases: Sequence[OpCase]) -> list[Any]:
    """All checks of all cases, as pytest parameters that are called."""
    return list(itertools.chain.from_iterable(map(_checks, cases)))


def _checks(case: OpCase) -> Iterator[Any]:
    def one(label: str, function: Callable[..., None], *args: Any) -> Any:
        return pytest.param(functools.partial(function, case, *args), id=f"{case.name}-{label}")

    yield one("jit", check_jit)
    for nest in case.nests:
        yield one(f"vmap{nest}", check_vmap, nest)
    for shard in case.shards:
        for mode in shard.modes:
            yield one(f"{mode}-{shard}", check_sharded, shard, mode)
    if case.plain is not None:
        yield one("grad", check_grad)
        yield one("remat-scan", check_remat_in_scan)
        if case.second:
            yield one("hvp", check_hessian_vector_product)
        for shard in case.shards:
            for mode in shard.modes:
                yield one(f"grad-{mode}-{shard}", check_sharded_grad, shard, mode)


@functools.cache
def jitted(case: OpCase) -> Callable[..., Any]:
    """The call as one program, compiled once for all checks."""
    return jax.jit(case.fn)


@functools.cache
def unsharded(case: OpCase) -> Any:
    """The results on one device, of one program."""
    return jitted(case)(*case.operands())


@functools.cache
def unsharded_gradients(case: OpCase) -> Any:
    return jax.jit(jax.grad(_loss(case.fn), case.wrt))(*case.operands())


def check_jit(case: OpCase) -> None:
    assert_same(unsharded(case), case.fn(*case.operands()), case.tolerance)


def check_vmap(case: OpCase, nest: Sequence[Sequence[Any]]) -> None:
    operands = case.operands()
    sizes = [2 + level for level in range(len(nest))]
    arrays = [
        _stack(case, operand, [axes[operand] for axes in nest], sizes) for operand in range(len(operands))
    ]
    mapped = case.fn
    for axes in reversed(nest):
        mapped = jax.vmap(mapped, axes)
    got = jax.jit(mapped)(*arrays)
    for index in np.ndindex(*sizes):
        picked = [_pick(x, [axes[i] for axes in nest], index) for i, x in enumerate(arrays)]
        assert_same(jax.tree.map(lambda leaf, i=index: leaf[i], got), jitted(case)(*picked), case.tolerance)


def check_sharded(case: OpCase, shard: Shard, mode: str) -> None:
    compiled, placed = compile_sharded(case, shard, mode)
    assert_same(compiled(*placed), unsharded(case), case.tolerance)
    wanted = shard.collectives
    if mode == "explicit" and shard.explicit_collectives is not None:
        wanted = shard.explicit_collectives
    assert collectives(compiled.as_text()) == Counter(wanted)


def check_grad(case: OpCase) -> None:
    plain = jax.jit(jax.grad(_loss(_plain(case)), case.wrt))(*case.operands())
    assert_same(unsharded_gradients(case), plain, case.grad_tolerance)


def check_hessian_vector_product(case: OpCase) -> None:
    operands = case.operands()

    def product(fn: Callable[..., Any]) -> Callable[..., Any]:
        def gradient(*live: jax.Array) -> Any:
            full = list(operands)
            for i, x in zip(case.wrt, live, strict=True):
                full[i] = x
            return jax.grad(_loss(lambda *a: jnp.sin(fn(*a).astype(jnp.float32))), case.wrt)(*full)

        return jax.jit(lambda live, by: jax.jvp(gradient, live, by)[1])

    live = [operands[i] for i in case.wrt]
    by = [jnp.cos(x.astype(jnp.float32)).astype(x.dtype) for x in live]
    assert_same(product(case.fn)(live, by), product(_plain(case))(live, by), 4 * case.grad_tolerance)


def check_remat_in_scan(case: OpCase) -> None:
    operands = case.operands()

    def steps(fn: Callable[..., Any], *args: jax.Array) -> jax.Array:
        def step(total: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
            return total + scale * _loss(fn)(*args), None

        return jax.lax.scan(step, jnp.float32(0), jnp.arange(1.0, 4.0))[0]

    remat = jax.jit(jax.grad(functools.partial(steps, jax.checkpoint(case.fn)), case.wrt))(*operands)
    once = unsharded_gradients(case)
    assert_same(remat, jax.tree.map(lambda g: g * 6, once), max(case.tolerance, 4 * case.grad_tolerance))


def check_sharded_grad(case: OpCase, shard: Shard, mode: str) -> None:
    mesh = make_mesh(mode)
    placed = _place(case.operands(), shard, mesh)
    with jax.set_mesh(mesh) if mode == "explicit" else contextlib.nullcontext():
        got = jax.jit(jax.grad(_loss(_in_mode(case, shard, mode, mesh)), case.wrt))(*placed)
    assert_same(got, unsharded_gradients(case), case.grad_tolerance)
    if mode == "explicit":
        for i, gradient in zip(case.wrt, got, strict=True):
            assert gradient.sharding.is_equivalent_to(placed[i].sharding, gradient.ndim)


def compile_sharded(case: OpCase, shard: Shard, mode: str, **jit_options: Any) -> tuple[Any, list[jax.Array]]:
    """The compiled program of a sharded call, and its placed operands."""
    mesh = make_mesh(mode)
    placed = _place(case.operands(), shard, mesh)
    if mode == "auto":
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), shard.out, is_leaf=_is_spec)
        jit_options["out_shardings"] = shardings
    with jax.set_mesh(mesh) if mode == "explicit" else contextlib.nullcontext():
        return jax.jit(_in_mode(case, shard, mode, mesh), **jit_options).lower(*placed).compile(), placed


def make_mesh(mode: str, sizes: tuple[int, ...] = (2, 4), names: tuple[str, ...] = ("x", "y")) -> Mesh:
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))


def collectives(hlo: str) -> Counter[str]:
    """How often each collective stands in a compiled program."""
    return Counter(_COLLECTIVE.findall(hlo))


def assert_same(got: Any, expected: Any, tolerance: float) -> None:
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        mine, theirs = (np.asarray(jax.device_get(x)).astype(np.float64) for x in (one, other))
        if mine.size:
            scale = max(np.abs(theirs).max(), 1e-30)
            assert np.abs(mine - theirs).max() <= tolerance * scale, np.abs(mine - theirs).max() / scale


def _in_mode(case: OpCase, shard: Shard, mode: str, mesh: Mesh) -> Callable[..., Any]:
    if mode == "auto":
        return case.fn
    if mode == "shard_map":
        return jax.shard_map(case.fn, mesh=mesh, in_specs=shard.specs, out_specs=shard.out)
    asked = shard.out if shard.out_sharding is None else shard.out_sharding
    return functools.partial(case.fn, out_sharding=asked)


def _place(operands: Sequence[jax.Array], shard: Shard, mesh: Mesh) -> list[jax.Array]:
    """From the host: XLA would compile how an array of one device is cut."""
    shardings = [NamedSharding(mesh, spec) for spec in shard.specs]
    return [jax.device_put(np.asarray(x), to) for x, to in zip(operands, shardings, strict=True)]


def _loss(fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A scalar whose gradient with respect to each result is not constant."""

    def loss(*operands: jax.Array, **options: Any) -> jax.Array:
        leaves = jax.tree.leaves(fn(*operands, **options))
        return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in leaves)

    return loss


def _plain(case: OpCase) -> Callable[..., Any]:
    assert case.plain is not None
    return case.plain


def _stack(case: OpCase, operand: int, axes: Sequence[int | None], sizes: Sequence[int]) -> jax.Array:
    """The operand with vmap's dimensions, filled with different numbers."""
    carried = [size for axis, size in zip(axes, sizes, strict=True) if axis is not None]
    seeds = range(100 * operand + 1, 100 * operand + 1 + int(np.prod(carried, dtype=int)))
    one = np.stack([np.asarray(case.args(seed)[operand]) for seed in seeds])
    stacked = one.reshape(*carried, *one.shape[1:])
    lead = len(carried)
    for axis in reversed([axis for axis in axes if axis is not None]):
        lead -= 1
        stacked = np.moveaxis(stacked, lead, lead + axis)
    return jnp.asarray(stacked)


def _pick(x: jax.Array, axes: Sequence[int | None], index: Sequence[int]) -> jax.Array:
    for axis, i in zip(axes, index, strict=True):
        if axis is not None:
            x = jnp.asarray(np.take(np.asarray(x), i, axis=axis))
    return x


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _short(spec: Any) -> str:
    if not isinstance(spec, PartitionSpec):
        return "(" + ",".join(map(_short, spec)) + ")"
    return "[" + " ".join("." if e is None else e if isinstance(e, str) else "".join(e) for e in spec) + "]"
