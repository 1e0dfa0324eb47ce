"""Small ops of the same make as the real ones, with which core/op.py is tested on its own.

`block_gemm` has block scales whose blocks straddle shards, `block_gemm_add` accumulates, `quantize` exchanges
the amax of a block that straddles shards, `linear` is a custom_vjp layer on them, `matmul` has jvp and
transpose rules.
"""

from __future__ import annotations

import functools
import hashlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core.derivatives import Wanted, same_varying_axes
from jax_deepgemm.core.family import Family, LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan

BLOCK = 16
F8 = np.dtype(jnp.float8_e4m3fn)
F8_MAX = 448.0
F32 = np.dtype("float32")
BF16 = np.dtype(jnp.bfloat16)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _repeat(scales: jax.Array, size: int, axis: int) -> jax.Array:
    return jnp.take(scales, jnp.arange(size) // BLOCK, axis=axis)


def _dense(a: Any, sa: Any, b: Any, sb: Any) -> jax.Array:
    a = a.astype(F32) * _repeat(sa, a.shape[-1], -1)
    sb = _repeat(sb, b.shape[-1], -1)
    if sb.shape[-2] != b.shape[-2]:
        sb = _repeat(sb, b.shape[-2], -2)
    return jnp.einsum("mk,nk->mn", a, b.astype(F32) * sb)


def _recut(plan: ShardingPlan, *operands: jax.Array) -> tuple[list[jax.Array], None]:
    """Blocks that straddle devices: scales per row of B, and columns moved to the global grid."""
    a, sa, b, sb, *rest = operands
    scale_factors = plan.rule.operands[3]
    if plan.cut("n") and "nb" in scale_factors and not plan.cut("nb"):
        rows = plan.offset("n") + jnp.arange(plan.local_size("n"))
        sb = jnp.take(sb, rows // BLOCK, axis=scale_factors.index("nb"))
    if plan.cut("k") and not plan.cut("kb"):
        first, local = plan.offset("k"), a.shape[-1]
        count = ceil_div(local + BLOCK - 1, BLOCK)

        def shift(x: jax.Array) -> jax.Array:
            empty = jnp.zeros((*x.shape[:-1], count * BLOCK), x.dtype)
            return lax.dynamic_update_slice_in_dim(empty, x, first % BLOCK, -1)

        def scales(s: jax.Array) -> jax.Array:
            padded = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, count)])
            return lax.dynamic_slice_in_dim(padded, first // BLOCK, count, -1)

        a, b, sa, sb = shift(a), shift(b), scales(sa), scales(sb)
    return [a, sa, b, sb, *rest], None


def _mn(a: Any, sa: Any, b: Any, *_: Any, out_dtype: Any, **__: Any) -> list[Any]:
    return [((a[0], b[0]), out_dtype)]


kernel_calls: list[dict[str, Any]] = []
"""What the toy kernel was asked to plan, newest last."""


def _plan(avals_in: Any, avals_out: Any, *, batch: Any, chip: Any, **params: Any) -> Any:
    """A plan that can be lowered and compiled, but not run: its cubin is no code."""
    from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result
    from jax_deepgemm.jit import CompiledKernel

    kernel_calls.append(
        {
            "shapes": [aval.shape for aval in avals_in],
            "results": [aval.shape for aval in avals_out],
            "batch": batch,
            "chip": chip,
            **params,
        }
    )
    cubin = b"no code"
    kernel = CompiledKernel("toy_kernel", cubin, hashlib.sha256(cubin).hexdigest(), chip.arch)
    pointers = (*map(Operand, range(len(avals_in))), Result(0))
    return LaunchPlan((Launch(kernel, (chip.num_sms, 1, 1), 128, pointers),), label="toy")


KERNEL = SimpleNamespace(family=Family("toy", object, {"9.0a": "tests.shared.toy_ops"}), plan=_plan)


def _pad_columns(a: jax.Array, sa: Any, b: jax.Array, sb: Any, *rest: Any, **_: Any) -> list[jax.Array]:
    """Rows of 32 elements, as a kernel might need; from the last dimension, whatever stands before it."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)])

    return [pad(a), sa, pad(b), sb, *rest]


def _block_options(scales_of_b: str) -> dict[str, Any]:
    blocks = {"kb": ("k", BLOCK), "nb": ("n", BLOCK)} if scales_of_b == "nb" else {"kb": ("k", BLOCK)}
    return {
        "reduces": ("k",),
        "blocks": blocks,
        "spmd": lambda plan, local, *operands: _recut(plan, *operands),
        "kernel": LazyKernel("tests.shared.toy_ops", "KERNEL", batched=True),
        "kernel_prepare": _pad_columns,
        "grad_hint": "Use linear(x, w).",
    }


def make_block_gemm(name: str, **options: Any) -> Op:
    return Op(
        name,
        "m k, m kb, n k, nb kb -> m n",
        _mn,
        lambda a, sa, b, sb, *, out_dtype: [_dense(a, sa, b, sb).astype(out_dtype)],
        **_block_options("nb"),
        **options,
    )


block_gemm_op = make_block_gemm("toy_block_gemm")
row_gemm_op = Op(
    "toy_row_gemm",
    "m k, m kb, n k, n kb -> m n",
    _mn,
    lambda a, sa, b, sb, *, out_dtype: [_dense(a, sa, b, sb).astype(out_dtype)],
    **_block_options("n"),
)
block_gemm_add_op = Op(
    "toy_block_gemm_add",
    "m k, m kb, n k, nb kb, m n -> m n",
    _mn,
    lambda a, sa, b, sb, c, *, out_dtype: [(_dense(a, sa, b, sb) + c.astype(F32)).astype(out_dtype)],
    aliases={4: 0},
    addend=4,
    base=block_gemm_op,
    **_block_options("nb"),
)


def block_gemm(*operands: jax.Array, out_dtype: Any = F32, **options: Any) -> jax.Array:
    per_row = operands[3].shape[0] == operands[2].shape[0] and operands[2].shape[0] != 1
    op = block_gemm_add_op if len(operands) == 5 else row_gemm_op if per_row else block_gemm_op
    return op(*operands, out_dtype=out_dtype, **options)[0]


def _quantize_reference(x: jax.Array, *, block: tuple[int, int]) -> list[jax.Array]:
    (r, c), (n, k) = block, x.shape
    padded = jnp.pad(x.astype(F32), [(0, -n % r), (0, -k % c)])
    tiles = padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c)
    scales = jnp.maximum(jnp.max(jnp.abs(tiles), (1, 3)), 1e-4) / F8_MAX
    values = (tiles * (1 / scales)[:, None, :, None]).reshape(padded.shape)[:n, :k]
    return [values.astype(F8), scales]


def _quantize_pieces(block: tuple[int, int], plan: ShardingPlan, local: Any, x: jax.Array) -> Any:
    """Amax on the global grid, exchanged where a cut crosses a block; the grid is small."""
    crossing = [
        (data, grid)
        for data, grid, size in (("r", "rb", block[0]), ("c", "cb", block[1]))
        if size > 1 and plan.cut(data) and not plan.cut(grid)
    ]
    if not crossing:
        return (x,), None
    names = [grid for _, grid in crossing]

    def rows(data: str, grid: str, size: int, extent: int) -> tuple[jax.Array, int]:
        first = plan.offset(data) if grid in names else 0
        return (first + jnp.arange(extent)) // size, plan.size[grid] if grid in names else ceil_div(
            extent, size
        )

    (ri, nr), (ci, nc) = rows("r", "rb", block[0], x.shape[-2]), rows("c", "cb", block[1], x.shape[-1])
    wide = x.astype(F32)
    amax = jnp.zeros((*x.shape[:-2], nr, nc), F32).at[..., ri[:, None], ci[None]].max(jnp.abs(wide))
    amax = lax.pmax(amax, tuple(axis for data, _ in crossing for axis in plan.axes[data]))
    scales = jnp.maximum(amax, 1e-4) / F8_MAX
    return None, [(wide * (1 / scales)[..., ri[:, None], ci[None]]).astype(F8), scales]


def _make_quantize(block: tuple[int, int]) -> Op:
    grid = {"rb": ("r", block[0]), "cb": ("c", block[1])}
    return Op(
        f"toy_quantize_{block[0]}x{block[1]}",
        f"r c -> r c, {'rb' if block[0] > 1 else 'r'} cb",
        lambda x: [(x, F8), ((ceil_div(x[0], block[0]), ceil_div(x[1], block[1])), F32)],
        functools.partial(_quantize_reference, block=block),
        blocks={name: of for name, of in grid.items() if of[1] > 1},
        spmd=functools.partial(_quantize_pieces, block),
    )


_quantize = {block: _make_quantize(block) for block in ((1, BLOCK), (BLOCK, BLOCK))}


def quantize(x: jax.Array, block: tuple[int, int], out_sharding: Any = None) -> tuple[jax.Array, ...]:
    return tuple(_quantize[block](x, out_sharding=out_sharding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, w: jax.Array, out_sharding: Any) -> jax.Array:
    operands = (*quantize(x, (1, BLOCK)), *quantize(w, (BLOCK, BLOCK)))
    return block_gemm(*operands, out_dtype=x.dtype, out_sharding=out_sharding)


def _linear_forward(x: jax.Array, w: jax.Array, out_sharding: Any) -> Any:
    return _linear(x, w, out_sharding), (x, w)


def _linear_backward(out_sharding: Any, residuals: Any, dy: jax.Array) -> Any:
    x, w = residuals
    explicit = bool(jax.sharding.get_abstract_mesh().explicit_axes)
    like_x, like_w = (jax.typeof(z).sharding.spec if explicit else None for z in (x, w))
    dx = block_gemm(
        *quantize(dy, (1, BLOCK)), *quantize(w.T, (BLOCK, BLOCK)), out_dtype=x.dtype, out_sharding=like_x
    )
    dw = block_gemm(
        *quantize(dy.T, (1, BLOCK)), *quantize(x.T, (1, BLOCK)), out_dtype=w.dtype, out_sharding=like_w
    )
    return dx, dw


_linear.defvjp(_linear_forward, _linear_backward)


def linear(x: jax.Array, w: jax.Array, out_sharding: Any = None) -> jax.Array:
    return _linear(*same_varying_axes((x, w)), out_sharding)


# matmul: bilinear, with derivatives of every order ---------------------------------------------------------

_SUBSCRIPTS = {"nt": "mk,nk->mn", "nn": "mk,kn->mn", "tn": "km,kn->mn"}
_DIMS = {"nt": "m k, n k", "nn": "m k, k n", "tn": "k m, k n"}
_TRANSPOSED: dict[str, tuple[tuple[Any, ...], ...]] = {  # layout -> for each operand: layout, left, right
    "nt": (("nn", "ct", 1), ("tn", "ct", 0)),
    "nn": (("nt", "ct", 1), ("tn", 0, "ct")),
    "tn": (("nt", 1, "ct"), ("nn", 0, "ct")),
}


def _matmul_reference(layout: str, a: Any, b: Any, *c: Any, out_dtype: Any) -> list[jax.Array]:
    product = jnp.einsum(_SUBSCRIPTS[layout], a, b, preferred_element_type=F32)
    return [(product + c[0].astype(F32) if c else product).astype(out_dtype)]


def _matmul_jvp(layout: str, primals: Any, tangents: Any, **params: Any) -> list[jax.Array]:
    (a, b, *_), (da, db, *dc) = primals, tangents
    terms = [] if da is None else [matmul(da, b, layout=layout, **params)]
    terms += [] if db is None else [matmul(a, db, layout=layout, **params)]
    terms += [d for d in dc if d is not None]
    return [functools.reduce(jnp.add, terms)]


def _matmul_transpose(layout: str, index: int, cotangents: Any, operands: Any, **params: Any) -> jax.Array:
    wanted = operands[index]
    assert isinstance(wanted, Wanted)
    if index == 2:
        return cotangents[0].astype(wanted.dtype)
    swapped = {"out_dtype": wanted.dtype, "out_sharding": wanted.out_sharding}
    new_layout, *names = _TRANSPOSED[layout][index]
    left, right = (cotangents[0] if name == "ct" else operands[name] for name in names)
    return matmul(left.astype(operands[1 - index].dtype), right, layout=new_layout, **{**params, **swapped})


def _make_matmul(layout: str, base: Op | None) -> Op:
    def mn(a: Any, b: Any, *_: Any, out_dtype: Any) -> list[Any]:
        return [((a[layout[0] == "t"], b[layout[1] == "n"]), out_dtype)]

    add = {} if base is None else {"addend": 2, "base": base, "aliases": {2: 0}}
    return Op(
        f"toy_matmul_{layout}" + ("_add" if base else ""),
        _DIMS[layout] + (", m n" if base else "") + " -> m n",
        mn,
        functools.partial(_matmul_reference, layout),
        reduces=("k",),
        jvp=functools.partial(_matmul_jvp, layout),
        transpose=functools.partial(_matmul_transpose, layout),
        **add,
    )


_matmul = {layout: _make_matmul(layout, None) for layout in _SUBSCRIPTS}
_matmul_add = {layout: _make_matmul(layout, op) for layout, op in _matmul.items()}


def matmul(*operands: jax.Array, layout: str = "nt", out_dtype: Any = F32, **options: Any) -> jax.Array:
    op = (_matmul_add if len(operands) == 3 else _matmul)[layout]
    return op(*operands, out_dtype=out_dtype, **options)[0]
