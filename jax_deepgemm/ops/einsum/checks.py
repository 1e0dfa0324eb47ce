"""What an einsum accepts: rules about its string, shapes, dtypes and scale blocks, checked while tracing.

Each error says what was given, the rule, and the way out. Operands are named as the caller wrote them, and
returned in the order of the oriented form, whose result ends with columns of the second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jax_deepgemm.ops.einsum.form import Form, NotAProduct, Term, oriented, parse
from jax_deepgemm.ops.gemm import checks as dense
from jax_deepgemm.ops.gemm.checks import BLOCKED, PER_ROW, Quantized, Side


@dataclass(frozen=True)
class Operand(Side):
    """An operand by its letters; a matrix of the last two, to which blocks of scales refer."""

    letters: Term = ()

    @property
    def dims(self) -> str:
        return f"[{', '.join(self.letters)}]"


def text(form: Form) -> str:
    """The string of a form that was read from one."""
    a, b, d = ("".join(term) for term in (form.a, form.b, form.d))
    return f"{a},{b}->{d}"


def form_of(op: str, expr: Any) -> tuple[Form, bool]:
    """The oriented form of a string, and whether its operands are exchanged."""
    if not isinstance(expr, str):
        raise TypeError(f"{op}: expr is {expr!r}, need a string such as 'bhr,hdr->bhd'. Write one.")
    try:
        return oriented(parse(expr))
    except NotAProduct as problem:
        raise ValueError(
            f"{op}: {expr!r} {problem}. Need one matrix product of two operands, plain or batched, as "
            f"'bhr,hdr->bhd' is. jnp.einsum({expr!r}, a, b) computes any other."
        ) from None


def check_k_last(op: str, expr: str, form: Form, exchanged: bool) -> None:
    """FP8 operands are read along one summed dimension, their last."""
    names = "ba" if exchanged else "ab"
    if len(form.summed) > 1:
        raise ValueError(
            f"{op}: {expr!r} sums over {' and '.join(map(repr, form.summed))}, need one summed letter, as "
            "scales lie along it. Make one of them by a reshape before quantising, or use bf16_einsum."
        )
    (k,) = form.summed
    for name, term in zip(names, (form.a, form.b), strict=True):
        if term[-1] != k:
            stored = "".join([one for one in term if one != k] + [k])
            terms = dict(zip(names, map("".join, (form.a, form.b)), strict=True)) | {name: stored}
            better = f"{terms['a']},{terms['b']}->{''.join(form.d)}"
            raise ValueError(
                f"{op}: {expr!r} sums over {k!r}, which is not the last dimension of {name} "
                f"[{', '.join(term)}]: FP8 tensor cores read along the summed dimension, and nothing is "
                f"transposed unasked. Quantise {name} as [{', '.join(stored)}] and say {better!r}, or use "
                f"bf16_einsum, which reads it as it is."
            )


def _sides(form: Form, exchanged: bool) -> tuple[Operand, Operand]:
    names = "ba" if exchanged else "ab"
    columns = [name for name in form.d if form.classes[name] == "n"]
    whole = columns == [form.b[-2]]
    blocks = ((PER_ROW,), (BLOCKED, PER_ROW) if whole else (PER_ROW,))
    first, second = (
        Operand(name, term[-2], False, block, letters=term)
        for name, term, block in zip(names, (form.a, form.b), blocks, strict=True)
    )
    return first, second


def check_bf16(op: str, form: Form, exchanged: bool, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Both BF16 operands, in the order of the form."""
    given = (b, a) if exchanged else (a, b)
    first, second = (
        dense.check_bf16_operand(op, side, x) for side, x in zip(_sides(form, exchanged), given, strict=True)
    )
    return first, second


def check_fp8(op: str, form: Form, exchanged: bool, a: Any, b: Any) -> tuple[Quantized, Quantized]:
    """Both FP8 operands, in the order of the form."""
    given = (b, a) if exchanged else (a, b)
    first, second = (
        dense.quantized(op, dense.check_fp8_parts(op, side, x))
        for side, x in zip(_sides(form, exchanged), given, strict=True)
    )
    return first, second


def sizes_of(op: str, expr: str, form: Form, exchanged: bool, first: Any, second: Any) -> dict[str, int]:
    """The size of each letter."""
    names = "ba" if exchanged else "ab"
    sizes = dict(zip(form.a, first.shape, strict=True))
    for letter, size in zip(form.b, second.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            shapes = dict(zip(names, (list(first.shape), list(second.shape)), strict=True))
            raise ValueError(
                f"{op}: {expr!r} of a {shapes['a']} and b {shapes['b']}: {letter!r} is {sizes[letter]} in "
                f"{names[0]} and {size} in {names[1]}. Make both equal; no dimension is broadcast."
            )
    return sizes
