"""From an einsum's operands to those of the dense kernels: one dimension for each letter of the form, which
copies nothing, and zeros behind rows that are no whole 16 bytes, which copies the operand.

Traced on local shapes in front of the kernel, on CUDA only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_deepgemm.ops.einsum.form import Form, NotAProduct, Term
from jax_deepgemm.ops.gemm.padding import ROW_BYTES, pad_axis


def one_launch(form: Form, operands: tuple[int, int], carried: Sequence[bool]) -> bool:
    """Whether operands with a dimension of vmap in front are one product too.

    Args:
      form: without that dimension.
      operands: where a and b stand among an op's operands; their scales follow them.
      carried: which of an op's operands have it. Scales have it as their values do, and C as the result.
    """
    a, b = operands
    alike = all(carried[a] == on for on in carried[a:b]) and all(
        carried[b] == on for on in carried[b : 2 * b - a]
    )
    if not alike or not all(carried[2 * b - a :]):
        return False
    try:
        form.mapped((carried[a], carried[b])).classes  # noqa: B018 - raises
    except NotAProduct:
        return False
    return True


def as_called(form: Form, a_rank: int, b_rank: int) -> Form:
    """The form of operands of these ranks, which may have a dimension of vmap in front."""
    carried = (a_rank > len(form.a), b_rank > len(form.b))
    return form.mapped(carried) if any(carried) else form


def _collapsed(form: Form, term: Term, order: str, x: jax.Array) -> jax.Array:
    return x.reshape(form.collapsed(term, order, x.shape))


def bf16_rows(form: Form, a: jax.Array, b: jax.Array, *rest: jax.Array, **_: Any) -> tuple[jax.Array, ...]:
    """The last dimension of A and of B to a multiple of 8; the other operand's k follows."""
    form = as_called(form, a.ndim, b.ndim)
    order_a, order_b, _d = form.orders
    a, b = _collapsed(form, form.a, order_a, a), _collapsed(form, form.b, order_b, b)
    step = ROW_BYTES // 2
    k_last = "k" in (order_a[-1], order_b[-1])
    for_a = {order_a[-1], *("k" if k_last else "")}
    for_b = {order_b[-1], *("k" if k_last else "")}
    a = _padded("bf16_einsum: a", a, order_a, for_a, step)
    b = _padded("bf16_einsum: b", b, order_b, for_b, step)
    return a, b, *rest


def _padded(name: str, x: jax.Array, order: str, letters: set[str], step: int) -> jax.Array:
    for letter in sorted(letters):
        x = pad_axis(name, x, order.index(letter) - len(order), step)
    return x


def fp8_rows(
    form: Form, a: jax.Array, sa: jax.Array, b: jax.Array, sb: jax.Array, *rest: jax.Array, **_: Any
) -> tuple[jax.Array, ...]:
    """k to a multiple of 16 values and ceil(k / 128) to a multiple of 4 scales."""
    form = as_called(form, a.ndim, b.ndim)
    order_a, order_b, _d = form.orders
    return (
        pad_axis("fp8_einsum: a", _collapsed(form, form.a, order_a, a), -1, ROW_BYTES),
        pad_axis("fp8_einsum: scales of a", _collapsed(form, form.a, order_a, sa), -1, ROW_BYTES // 4),
        pad_axis("fp8_einsum: b", _collapsed(form, form.b, order_b, b), -1, ROW_BYTES),
        pad_axis("fp8_einsum: scales of b", _collapsed(form, form.b, order_b, sb), -1, ROW_BYTES // 4),
        *rest,
    )
