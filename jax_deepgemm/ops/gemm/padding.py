"""Row strides the kernels can read: TMA moves rows of whole 16 bytes.

Traced on local shapes in front of the kernel, on CUDA only. Zeros are padded, so no product changes; an
operand that already fits passes through untouched. A padded operand is copied at each call, hence the note.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.log import note_once

ROW_BYTES = 16


def pad_axis(name: str, x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros behind one of its last two dimensions (axis -1 or -2), up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    padded = jnp.pad(x, widths)
    note_once(
        f"{name} {x.dtype.name}{list(x.shape)} is copied to {list(padded.shape)} at each call, so that its "
        f"rows are whole {ROW_BYTES} bytes; store it so to avoid the copy."
    )
    return padded


def fp8_rows(
    a: jax.Array, sa: jax.Array, b: jax.Array, sb: jax.Array, *rest: jax.Array, **_: Any
) -> tuple[jax.Array, ...]:
    """k to a multiple of 16 values and ceil(k / 128) to a multiple of 4 scales; C stays as it is."""
    return (
        pad_axis("fp8_gemm: a", a, -1, ROW_BYTES),
        pad_axis("fp8_gemm: scales of a", sa, -1, ROW_BYTES // 4),
        pad_axis("fp8_gemm: b", b, -1, ROW_BYTES),
        pad_axis("fp8_gemm: scales of b", sb, -1, ROW_BYTES // 4),
        *rest,
    )


def bf16_rows(a: jax.Array, b: jax.Array, *rest: jax.Array, layout: str, **_: Any) -> tuple[jax.Array, ...]:
    """The contiguous dimension of A and of B to a multiple of 8; the other operand's k follows, C stays as it
    is.

    m or n of a padded operand may then exceed the result's: the result's shape tells the true sizes.
    """
    step = ROW_BYTES // 2
    a = pad_axis("bf16_gemm: a", a, -1, step)
    b = pad_axis("bf16_gemm: b", b, -1, step)
    if layout[0] == "n" or layout[1] == "t":
        a = pad_axis("bf16_gemm: a", a, -1 if layout[0] == "n" else -2, step)
        b = pad_axis("bf16_gemm: b", b, -1 if layout[1] == "t" else -2, step)
    return a, b, *rest
