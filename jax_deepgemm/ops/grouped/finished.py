"""The m-grouped products whose result becomes something else before it is stored, as ops.

    D[rows of g] = activation(alpha * A[rows of g] B[g]^T + bias[g])        float32, then one rounding

Rows that hold no product are zeros, or undefined, as without an epilogue; no bias reaches them. k is not cut
over devices: a sum must be whole before it is anything but added. Groups may be, as rows of the others'
groups are zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.family import LazyKernel
from jax_deepgemm.core.op import Op
from jax_deepgemm.core.sharding import ShardingPlan, pieces_of_whole
from jax_deepgemm.ops.gemm.checks import BLOCKED, FLOAT32, PER_ROW, Options
from jax_deepgemm.ops.gemm.epilogue import check_epilogue
from jax_deepgemm.ops.gemm.finish import Finish
from jax_deepgemm.ops.gemm.finished import E4M3, QUANTIZED_HINT, finished, stored
from jax_deepgemm.ops.gemm.op import scale_step
from jax_deepgemm.ops.gemm.reference import SCALE_BLOCK
from jax_deepgemm.ops.grouped import op as ops
from jax_deepgemm.ops.grouped import prepare, segments
from jax_deepgemm.ops.grouped.group_rows import GROUP_ROWS, rows_of
from jax_deepgemm.ops.quantize.array import QuantizedArray

MASKED = (*ops.M_MASKED_FP8.values(), *ops.M_MASKED_BF16.values())

# In plain jnp


class _Rows:
    """Which rows of a product count, and what each of them has of its group's."""

    def __init__(self, base: Op, operands: Sequence[jax.Array], rows_format: str) -> None:
        self.masked, self.where, self.rows_format = base in MASKED, operands[-2:], rows_format
        a, b = operands[0], operands[2 if _is_fp8(base) else 1]
        if self.masked:
            self.counted = jnp.arange(a.shape[1])[None, :, None] < operands[-1][:, None, None]
        else:
            sizes, offset = self.where
            self.index = segments.by_index(sizes, rows_format, a.shape[0], offset, b.shape[0])
            self.counted = self.index[:, None] >= 0

    def of_group(self, x: jax.Array) -> jax.Array:
        """[m, n], or [g, m, n], of x [g, n]; zeros in rows that do not count."""
        return jnp.where(self.counted, x[:, None], 0) if self.masked else rows_of(x, self.index)

    def of_group_linear(self, x: jax.Array, like: jax.Array, out_sharding: Any) -> jax.Array:
        """The same with a derivative, and cut as the product is."""
        if self.masked:
            return self.of_group(x)
        params = {"rows_format": self.rows_format, "out_dtype": FLOAT32, "out_sharding": out_sharding}
        return GROUP_ROWS(like, x, *self.where, **params)[0]

    def finished(self, sums: jax.Array, finish: Finish, *rest: jax.Array) -> jax.Array:
        """D in float32; rest: alpha [1] and the rows' biases, as far as they are given."""
        d = finished(jnp.where(self.counted, sums, 0), finish, *rest)
        return jnp.where(self.counted, d, 0)


def _reference(
    base: Op,
    *arrays: jax.Array,
    finish: Finish,
    out_dtype: Any,
    rows_format: str = "",
    **params: Any,
) -> list[jax.Array]:
    count = len(base.rule.operands)
    operands, rest = arrays[:count], list(arrays[count:])
    own = {"rows_format": rows_format} if rows_format else {}
    [sums] = base.reference(*operands, out_dtype=FLOAT32, **own, **params)
    rows = _Rows(base, operands, rows_format)
    if finish.bias:
        rest[-1] = rows.of_group(rest[-1])
    return stored(rows.finished(sums, finish, *rest), finish, out_dtype)


def _jvp(
    base: Op,
    primals: list[Any],
    tangents: list[Any],
    *,
    finish: Finish,
    out_dtype: Any,
    **params: Any,
) -> list[jax.Array]:
    """That of the product in float32, then of what it becomes."""
    count = len(base.rule.operands)
    (a, b, *where), rest = primals[:count], list(primals[count:])
    (da, db), drest = tangents[:2], list(tangents[count:])
    run = functools.partial(base, out_dtype=FLOAT32, **{**params, "config": None})
    [sums] = run(a, b, *where)
    terms = [] if da is None else run(da, b, *where)
    terms += [] if db is None else run(a, db, *where)
    dsums = functools.reduce(jnp.add, terms, jnp.zeros_like(sums))
    rows = _Rows(base, (a, b, *where), params.get("rows_format", ""))
    drest = [jnp.zeros_like(x) if dx is None else dx for x, dx in zip(rest, drest, strict=True)]
    if finish.bias:
        out_sharding = params.get("out_sharding")
        rest[-1], drest[-1] = (rows.of_group_linear(x, sums, out_sharding) for x in (rest[-1], drest[-1]))

    def function(sums: jax.Array, *rest: jax.Array) -> jax.Array:
        return rows.finished(sums, finish, *rest).astype(out_dtype)

    return [jax.jvp(function, (sums, *rest), (dsums, *drest))[1]]


# Ops


def _is_fp8(base: Op) -> bool:
    return "fp8" in base.name


def _form(base: Op) -> dict[str, Any]:
    """What the kernel must know of the product."""
    return scale_step(base.rule.blocks["kb"][1]) if _is_fp8(base) else {"layout": base.name[-2:]}


def _result(base: Op, *shapes: Any, finish: Finish, **params: Any) -> list[Any]:
    [((*lead, n), dtype)] = base.result(*shapes[: len(base.rule.operands)], **params)
    width = finish.width(n)
    if finish.quantized:
        return [((*lead, width), E4M3), ((*lead, -(-width // SCALE_BLOCK)), FLOAT32)]
    return [((*lead, width), dtype)]


def _recut(base: Op, plan: ShardingPlan, *arrays: jax.Array, finish: Finish, **params: Any) -> ops.Recut:
    assert base.recut is not None
    count = len(base.rule.operands)
    operands, changed = base.recut(plan, *arrays[:count], **params)
    return (*operands, *arrays[count:]), changed


def _prepare(base: Op, *arrays: jax.Array, finish: Finish, **params: Any) -> Sequence[jax.Array]:
    """Operands as the kernel reads them; a bias of each matrix of b."""
    assert base.kernel_prepare is not None
    count = len(base.rule.operands)
    weights = arrays[2:4] if _is_fp8(base) else arrays[1:2]
    rest = list(arrays[count:])
    if finish.bias:
        rest[-1] = prepare.beside(rest[-1], weights)
    return *base.kernel_prepare(*arrays[:count], **params), *rest


def _takes(base: Op, alpha: bool, bias: bool) -> Callable[[tuple[bool, ...]], bool]:
    """Whether a batch is more groups: of a bias, where b is of the batch too; alpha is one for all."""
    count = len(base.rule.operands)
    b = slice(2, 4) if _is_fp8(base) else slice(1, 2)

    def takes(carried: tuple[bool, ...]) -> bool:
        of_all = not (alpha and carried[count])
        return of_all and (not bias or not carried[-1] or any(carried[b]))

    return takes


@functools.cache
def _op(base: Op, alpha: bool, bias: bool, columns: str, quantized: bool) -> Op:
    """The op of a product's.

    Args:
      base: the product.
      alpha, bias: whether it meets one.
      columns: the name of D's columns: "n" where they are the product's, else "w".
      quantized: whether D has scales.
    """
    *lead, _ = base.rule.results[0]
    extra = [*(["o"] if alpha else []), *(["g n"] if bias else [])]
    operands = [" ".join(one) for one in base.rule.operands]
    results = [" ".join((*lead, columns)), *([" ".join((*lead, "wb"))] if quantized else [])]
    words = [*(["alpha"] if alpha else []), *(["bias"] if bias else []), columns]
    words += ["quantized"] if quantized else []
    blocks = {**base.rule.blocks, **({"wb": ("w", SCALE_BLOCK)} if quantized else {})}
    options: dict[str, Any] = {"grad_hint": ops.FP8_GRADIENT_HINT}
    if not _is_fp8(base):
        options = {"grad_hint": QUANTIZED_HINT} if quantized else {"jvp": functools.partial(_jvp, base)}
    sums = "g" in base.rule.reduces and not quantized
    if columns == "w" and sums:
        blocks["w"] = ("n", 2)  # cut as n is, which is not, so that groups may be
    elif columns == "w":
        options["spmd"] = pieces_of_whole("w", "wb")
    assert base.kernel is not None
    return Op(
        "_".join([base.name, "finished", *words]),
        f"{', '.join([*operands, *extra])} -> {', '.join(results)}",
        functools.partial(_result, base),
        functools.partial(_reference, base),
        reduces=("g",) if sums else (),
        blocks=blocks,
        recut=functools.partial(_recut, base),
        kernel=LazyKernel(
            "jax_deepgemm.ops.grouped.kernel",
            f"{'m_masked' if base in MASKED else 'm_grouped'}_{'fp8' if _is_fp8(base) else 'bf16'}_finished",
            batched=_takes(base, alpha, bias),
            **_form(base),
        ),
        kernel_prepare=functools.partial(_prepare, base),
        **options,
    )


def _run(
    base: Op,
    operands: Sequence[jax.Array],
    own: dict[str, Any],
    rest: list[jax.Array],
    last: str,
    finish: Finish,
    options: Options,
) -> Any:
    assert not last
    columns = "w" if finish.halves == 2 or finish.quantized else "n"
    run = _op(base, finish.alpha, finish.bias, columns, finish.quantized)
    params = dict(vars(options))
    if not run.rule.reduces:
        del params["reduce_dtype"]
    if finish.quantized and options.out_sharding is not None:
        params["out_sharding"] = (options.out_sharding,) * 2
    results = run(*operands, *rest, finish=finish, **own, **params)
    return QuantizedArray(results[0], results[1], PER_ROW) if finish.quantized else results[0]


def _takes_halves(base: Op, n: int) -> bool:
    """Whether tiles can have gate and up of the same features: of FP8, rows of B that begin with a block of
    scales."""
    if _is_fp8(base):
        whole = n % (2 * SCALE_BLOCK) == 0
        return whole and base in (ops.M_GROUPED_FP8[BLOCKED], ops.M_MASKED_FP8[BLOCKED])
    return n > 0 and base.name.endswith("nt")


def gemm(
    op: str,
    base: Op,
    operands: Sequence[jax.Array],
    epilogue: Any,
    groups: int,
    n: int,
    options: Options,
    **own: Any,
) -> Any:
    """D of a product of n columns, or what an epilogue makes of it."""
    if epilogue is None:
        return base(*operands, **own, **vars(options))[0]
    checked = check_epilogue(op, epilogue, n, None, groups, apart=_takes_halves(base, n))
    return checked.run(functools.partial(_run, base, operands, own), None, options)
