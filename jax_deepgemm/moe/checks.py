"""Operands of the layers of experts, checked: their shapes as the form has them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.moe.form import ExpertForm
from jax_deepgemm.ops.grouped import linear
from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, PreparedWeight, QuantizedArray
from jax_deepgemm.ops.quantize.join import concatenate
from jax_deepgemm.ops.quantize.prepared import Copies


def one_weight(where: str, w13: Any, form: ExpertForm) -> Any:
    """w13 [e, 2 * i, h], where it is two arrays or [e, 2, i, h]."""
    for w in w13 if isinstance(w13, tuple | list) else [w13]:
        if isinstance(w, Fp4Array) and w.global_scale is not None:  # which parts need not have in common
            linear.check_weight(where, "w13", w, "bf16")
    if not isinstance(w13, tuple | list):
        w13 = unwrapped(w13)
        return merged(where, w13, form) if getattr(w13, "ndim", 3) == 4 else w13
    if len(w13) != 2 or not form.act.gated or form.act.interleaved:
        raise ValueError(
            f"{where}: w13 is {len(w13)} arrays and the activation is {form.act}, need one array, or for "
            "activations of gate and up that do not take turns two, (gate, up)."
        )
    gate, up = map(unwrapped, w13)
    if isinstance(gate, PreparedWeight) or isinstance(up, PreparedWeight):
        raise TypeError(
            f"{where}: w13 is two weights, at least one of them prepared. Prepare them as one: "
            "prepare_weights((gate, up), w2)."
        )
    if tuple(gate.shape) != tuple(up.shape) or gate.dtype != up.dtype:
        raise ValueError(
            f"{where}: w13 is (gate {gate.dtype.name} {list(gate.shape)}, up {up.dtype.name} "
            f"{list(up.shape)}), need arrays of the same shape and dtype."
        )
    if isinstance(gate, PreparedFp4 | Fp4Array):
        step = -3 if isinstance(gate, PreparedFp4) else -2
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, step), gate, up)
    axis = -2 if form.weight_layout == "nk" else -1
    if isinstance(gate, QuantizedArray):
        return concatenate([gate, up], axis)
    return jnp.concatenate([gate, up], axis)


def merged(where: str, w13: Any, form: ExpertForm) -> Any:
    """Of w13 [e, 2, i, h], or with layout "kn" [e, h, 2, i], the one of three dimensions: the same bytes.

    Of a prepared weight the transposed copy is moved.
    """
    nk = form.weight_layout == "nk"
    if not form.act.gated or form.act.interleaved or w13.shape[1 if nk else 2] != 2:
        raise ValueError(
            f"{where}: w13 is {list(w13.shape)} and the activation is {form.act}, need 3 dimensions, or for "
            "activations of gate and up that do not take turns [e, 2, i, h] (weight_layout='kn': "
            "[e, h, 2, i])."
        )
    if isinstance(w13, PreparedWeight) and not nk:
        raise ValueError(
            f"{where}: w13 is prepared and {list(w13.shape)}, need 3 dimensions. Prepare it in them: "
            "prepare_weights(w13, w2, form=form)."
        )
    if isinstance(w13, QuantizedArray | PreparedWeight) and w13.shape[2] % 128:
        raise ValueError(
            f"{where}: w13 is {w13!r}, need an inner size that is a multiple of 128: a scale covers 128 "
            "features of gate or of up. Quantise it in 3 dimensions, [e, 2 * i, h]."
        )
    if isinstance(w13, PreparedWeight):
        plain, turned = w13.copies
        turned = jax.tree.map(lambda part: _joined(jnp.moveaxis(part, 1, 2), 2), turned)
        return PreparedWeight(_joined(w13.master, 1), Copies(jax.tree.map(_joined, plain), turned))
    return jax.tree.map(lambda part: _joined(part, 1 if nk else 2), w13)


def _joined(x: jax.Array, axis: int = 1) -> jax.Array:
    """Two neighbouring dimensions as one."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def check(
    where: str,
    rows: Any,
    w13: Any,
    w2: Any,
    sizes: Any,
    row_weights: Any,
    recipe: str,
    form: ExpertForm,
) -> None:
    linear.check_rows(where, "rows", rows)
    check_weights(where, rows, w13, w2, recipe, form)
    linear.check_sizes(where, sizes, w13.shape[0])
    if row_weights is not None and (
        tuple(row_weights.shape) != (rows.shape[0],) or row_weights.dtype != jnp.float32
    ):
        raise ValueError(
            f"{where}: row_weights are {row_weights.dtype.name} {list(row_weights.shape)} and rows are "
            f"{list(rows.shape)}, need float32 [{rows.shape[0]}]. spread_weights(weights, plan) makes them."
        )


def check_weights(where: str, x: Any, w13: Any, w2: Any, recipe: str, form: ExpertForm) -> None:
    """w13 [e, 2 * i, h] and w2 [e, h, i] of x [.., h], for a recipe there is."""
    linear.check_recipe(where, recipe)
    linear.check_weight(where, "w13", w13, recipe)
    linear.check_weight(where, "w2", w2, recipe)
    form.checked(where, w13=w13, w2=w2)
    first, (experts, hidden, intermediate) = form.sizes(w13, w2)
    if first != (experts, form.act.halves * intermediate, hidden) or x.shape[-1] != hidden:
        inner = "2 * i" if form.act.gated else "i"
        order = " (gate and up in turns)" if form.act.interleaved else " (gate, then up)"
        order = order if form.act.gated else ""
        need = [f"[e, {inner}, h]{order}", "[e, h, i]"]
        if form.weight_layout == "kn":
            need = [f"[e, h, {inner}]{order}", "[e, i, h]"]
        raise ValueError(
            f"{where}: inputs are {list(x.shape)}, w13 is {list(w13.shape)} and w2 is {list(w2.shape)}, "
            f"need [.., h], {need[0]} and {need[1]}. ExpertForm says other layouts and activations: form=."
        )
