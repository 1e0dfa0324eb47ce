"""The dense GEMMs whose product becomes something else before it is stored, as ops, and what it becomes in
plain jnp.

    D = activation(alpha * A B^T + bias) + C        float32, then one rounding

k is not cut over devices: a sum must be whole before it is anything but added. Where D's columns are not the
product's, they are cut after it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import pieces_of_whole
from jax_deepgemm.ops.gemm import op as ops
from jax_deepgemm.ops.gemm import padding
from jax_deepgemm.ops.gemm.checks import FLOAT32, LAYOUTS, PER_ROW, Options, Quantized
from jax_deepgemm.ops.gemm.finish import Finish, Heads
from jax_deepgemm.ops.gemm.op import FP8_GRADIENT_HINT, recut_blocks
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.quantize.array import QuantizedArray
from jax_deepgemm.ops.quantize.reference import quantize_float32
from jax_deepgemm.ops.swiglu.reference import act, of_each

E4M3 = np.dtype(jnp.float8_e4m3fn)

QUANTIZED_HINT = (
    "A quantised result has no useful derivative. Leave out_scales out, and quantise the result in a layer "
    "that has gradients, or use jax.lax.stop_gradient."
)

# In plain jnp


def finished(sums: jax.Array, finish: Finish, *rest: jax.Array) -> jax.Array:
    """D in float32 of sums [.., m, n] in float32.

    rest: alpha [1], bias [n], or one with dimensions in front, and C, as far as they are given.
    """
    given = iter(rest)
    if finish.alpha:
        sums = sums * next(given)[0]
    if finish.bias:
        bias = next(given)
        sums = sums + (bias[None] if bias.ndim < sums.ndim else bias)
    if finish.activation is not None:
        sums = of_each(sums, finish.activation) if finish.each else act(sums, None, None, finish.activation)
    for c in given:
        sums = sums + c.astype(jnp.float32)
    return sums


def stored(d: jax.Array, finish: Finish, out_dtype: Any) -> list[jax.Array]:
    """D rounded once, or its values and scales."""
    if finish.quantized:
        return quantize_float32(d, block=PER_ROW, dtype=E4M3, scale_format="f32")
    return [d.astype(out_dtype)]


def spread(product: jax.Array, heads: Heads, d: jax.Array | None) -> jax.Array:
    """The product [m, n] between the holes of D, which hold what d holds there, or zeros."""
    m, n = product.shape
    count = n // heads.taken
    by_head = product.reshape(m, count, heads.taken)
    if d is None:
        hole = jnp.zeros_like(product, shape=(m, count, heads.mid))
    else:
        hole = d.reshape(m, count, sum(heads))[..., heads.left : heads.left + heads.mid]
    parts = [by_head[..., : heads.left], hole, by_head[..., heads.left :]]
    return jnp.concatenate(parts, axis=-1).reshape(m, heads.width(n))


def _reference(
    base: Op, *arrays: jax.Array, finish: Finish, out_dtype: Any, **params: Any
) -> list[jax.Array]:
    count = len(base.rule.operands)
    operands, rest = arrays[:count], arrays[count:]
    if finish.heads is not None:
        [product] = base.reference(*operands, out_dtype=out_dtype, **params)
        return [spread(product, finish.heads, rest[0] if rest else None)]
    [sums] = base.reference(*operands, out_dtype=FLOAT32, **params)
    return stored(finished(sums, finish, *rest), finish, out_dtype)


# Ops


def _result(base: Op, *shapes: Any, finish: Finish, **params: Any) -> list[Any]:
    [((m, n), dtype)] = base.result(*shapes[: len(base.rule.operands)], **params)
    width = finish.width(n)
    if finish.quantized:
        return [((m, width), E4M3), ((m, -(-width // SCALE_BLOCK)), FLOAT32)]
    return [((m, width), dtype)]


def _whole_d(base: Op, prepare: Any, *arrays: jax.Array, finish: Finish, **params: Any) -> Any:
    """Operands as the kernel reads them; D's memory with vmap's dimension if the others have it."""
    count = len(base.rule.operands)
    operands = prepare(*arrays[:count], **params)
    rest = list(arrays[count:])
    if finish.heads is not None and rest and rest[0].ndim == 2:
        levels = [x.shape[0] for x, own in zip(operands, base.rule.operands) if x.ndim > len(own)]
        rest = [jnp.broadcast_to(rest[0], (*levels[:1], *rest[0].shape))]
    return (*operands, *rest)


def _bf16_jvp(
    primals: list[Any], tangents: list[Any], *, layout: str, finish: Finish, out_dtype: Any, **params: Any
) -> list[jax.Array]:
    """That of the product in float32, then of what it becomes."""
    (a, b, *rest), (da, db, *drest) = primals, tangents
    params |= {"config": None}
    run = functools.partial(ops.BF16_GEMM[layout], layout=layout, out_dtype=FLOAT32, **params)
    [sums] = run(a, b)
    terms = [] if da is None else run(da, b)
    terms += [] if db is None else run(a, db)
    dsums = functools.reduce(jnp.add, terms, jnp.zeros_like(sums))
    drest = [jnp.zeros_like(x) if dx is None else dx for x, dx in zip(rest, drest, strict=True)]

    def function(sums: jax.Array, *rest: jax.Array) -> jax.Array:
        return finished(sums, finish, *rest).astype(out_dtype)

    return [jax.jvp(function, (sums, *rest), (dsums, *drest))[1]]


@functools.cache
def _op(base: Op, alpha: bool, bias: bool, last: str, columns: str, quantized: bool) -> Op:
    """The op of a product's.

    Args:
      base: the product.
      alpha, bias: whether it meets one.
      last: the operand behind them: "c", "d" (what holes hold), or none, "".
      columns: the name of D's columns: "n" where they are the product's, else "w".
      quantized: whether D has scales.
    """
    fp8 = base not in ops.BF16_GEMM.values()
    form = ops.scale_step(base.rule.blocks["kb"][1]) if fp8 else {}
    extra = [*(["o"] if alpha else []), *(["n"] if bias else [])]
    extra += [f"m {'n' if last == 'c' else 'held'}"] if last else []
    operands = [" ".join(one) for one in base.rule.operands]
    words = [*(["alpha"] if alpha else []), *(["bias"] if bias else []), *([last] if last else []), columns]
    words += ["quantized"] if quantized else []
    options: dict[str, Any] = {"grad_hint": FP8_GRADIENT_HINT}
    if not fp8:
        options = {"grad_hint": QUANTIZED_HINT} if quantized else {"jvp": _bf16_jvp}
    if columns != "n":
        options["spmd"] = pieces_of_whole(columns, "wb")
    elif fp8:
        options["spmd"] = lambda plan, local, *arrays: (recut_blocks(plan, *arrays), None)
    return Op(
        "_".join([base.name, "finished", *words]),
        f"{', '.join([*operands, *extra])} -> m {columns}" + (", m wb" if quantized else ""),
        functools.partial(_result, base),
        functools.partial(_reference, base),
        blocks={**base.rule.blocks, **({"wb": ("w", SCALE_BLOCK)} if quantized else {})},
        kernel=LazyKernel(
            "jax_deepgemm.ops.gemm.kernel", f"{'fp8' if fp8 else 'bf16'}_finished", batched=True, **form
        ),
        kernel_prepare=functools.partial(_whole_d, base, padding.fp8_rows if fp8 else padding.bf16_rows),
        aliases={len(operands) + len(extra) - 1: 0} if last else {},
        **options,
    )


def _run(base: Op, operands: Any, rest: Any, last: str, finish: Finish, options: Options, **own: Any) -> Any:
    same = finish.halves == 1 and finish.heads is None and not finish.quantized
    run = _op(base, finish.alpha, finish.bias, last, "n" if same else "w", finish.quantized)
    params = {name: value for name, value in vars(options).items() if name != "reduce_dtype"}
    results = run(*operands, *rest, finish=finish, **params, **own)
    return QuantizedArray(results[0], results[1], PER_ROW) if finish.quantized else results[0]


def fp8_gemm(
    a: Quantized, b: Quantized, rest: list[jax.Array], last: str, finish: Finish, options: Options
) -> jax.Array:
    """D of FP8 operands that both have k last; rest: alpha, bias and what `last` names."""
    return _run(
        ops.FP8_GEMM[b.block][0], (a.values, a.scales, b.values, b.scales), rest, last, finish, options
    )


def bf16_gemm(
    layout: str,
    a: jax.Array,
    b: jax.Array,
    rest: list[jax.Array],
    last: str,
    finish: Finish,
    options: Options,
) -> jax.Array:
    """D of BF16 operands as they are stored."""
    assert layout in LAYOUTS
    return _run(ops.BF16_GEMM[layout], (a, b), rest, last, finish, options, layout=layout)
