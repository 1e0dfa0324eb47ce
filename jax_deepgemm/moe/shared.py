"""Shared experts: a dense MLP that every token passes, beside the experts that it is routed to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.moe.bias import check_biases
from jax_deepgemm.moe.checks import check_weights, one_weight
from jax_deepgemm.moe.dispatch import is_known
from jax_deepgemm.moe.experts import expert_mlp
from jax_deepgemm.moe.form import ExpertForm
from jax_deepgemm.ops.gemm.checks import OUT_DTYPES
from jax_deepgemm.ops.grouped.checks import as_int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedExperts:
    """Experts that every token passes, with weights of their own (`shared=`); a pytree.

        y[t] += sigmoid(x[t] @ gate) * sum_s MLP of shared expert s of x[t],   without a gate: times 1

    They are built as the layer's `form` says and multiply in its recipe; their inner size may be another.

    Attributes:
      w13: [n, 2 * i, h] of n experts, or [2 * i, h] of one: all that the layer takes as w13 (masters,
        prepared, frozen, two arrays), in the same layout.
      w2: [n, h, i], or [h, i], likewise.
      b13, b2: biases [n, 2 * i] and [n, h] (of one expert [2 * i] and [h]), or None.
      gate: [h] bfloat16 or float32, Qwen2-MoE's gate of the shared experts, multiplied in float32; or None.

    Raises nothing; the layers raise ValueError or TypeError for parts that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.moe import SharedExperts, moe_mlp, route
    >>> x = jax.random.normal(jax.random.key(0), (6, 256), jnp.bfloat16)
    >>> ids, weights = route(jax.random.normal(jax.random.key(1), (6, 4)), 2)
    >>> w13 = jax.random.normal(jax.random.key(2), (4, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(jax.random.key(3), (4, 256, 128)) / 16
    >>> shared = SharedExperts(jnp.ones((2 * 384, 256)) / 256, jnp.ones((256, 384)) / 384, gate=jnp.ones(256))
    >>> moe_mlp(x, ids, weights, w13, w2, shared=shared).shape
    (6, 256)
    """

    w13: Any
    w2: Any
    b13: Any = None
    b2: Any = None
    gate: Any = None

    def stacked(self) -> SharedExperts:
        """The same with n in front of all shapes but the gate's, and without wrappers of arrays."""
        w13 = tuple(map(unwrapped, self.w13)) if isinstance(self.w13, tuple | list) else unwrapped(self.w13)
        w2, b13, b2, gate = map(unwrapped, (self.w2, self.b13, self.b2, self.gate))
        if getattr(w2, "ndim", 3) == 2:
            w13, w2, b13, b2 = jax.tree.map(lambda part: part[None], (w13, w2, b13, b2))
        return SharedExperts(w13, w2, b13, b2, gate)

    def joined(self, where: str, form: ExpertForm) -> SharedExperts:
        """Stacked, w13 one array."""
        stacked = self.stacked()
        return dataclasses.replace(stacked, w13=one_weight(f"{where} (shared)", stacked.w13, form))


Shared: TypeAlias = SharedExperts | int | None
"""Weights of their own, or how many of the layer's experts, the last ones, every token passes."""


def checked_shared(
    where: str, shared: Any, x: Any, experts: int, recipe: str, form: ExpertForm, join: bool = True
) -> Shared:
    """The shared experts of a layer with this many experts in w13; None where there are none.

    join: False leaves w13 as it came, and what it holds unchecked, for a layer inside shard_map.
    """
    if shared is None or isinstance(shared, int):
        count = int(shared or 0)
        if not 0 <= count < max(experts, 1):
            raise ValueError(
                f"{where}: shared is {shared} and w13 has {experts} experts, need fewer: the last ones of "
                "w13 and w2, which every token passes. For weights of their own: SharedExperts(w13, w2)."
            )
        return count or None
    if not isinstance(shared, SharedExperts):
        raise TypeError(
            f"{where}: shared is a {type(shared).__name__}, need SharedExperts(w13, w2), or how many of the "
            "last experts of w13 and w2 every token passes."
        )
    if not join:
        return shared.stacked()
    where, shared = f"{where} (shared)", shared.joined(where, form)
    check_weights(where, x, shared.w13, shared.w2, recipe, form)
    check_biases(where, shared.w13, shared.w2, form, shared.b13, shared.b2)
    _check_gate(where, shared.gate, x.shape[-1])
    return shared


def _check_gate(where: str, gate: Any, hidden: int) -> None:
    if gate is None:
        return
    if not hasattr(gate, "dtype") or np.dtype(gate.dtype) not in OUT_DTYPES or tuple(gate.shape) != (hidden,):
        given = f"{gate.dtype} {list(gate.shape)}" if hasattr(gate, "dtype") else type(gate).__name__
        raise ValueError(
            f"{where}: gate is {given}, need bfloat16 or float32 [{hidden}], a number for each feature of x. "
            "Of a stored [1, h] take gate[0]."
        )


def split_shared(shared: Shared) -> tuple[int, SharedExperts | None]:
    """How many of the layer's last experts are shared, and what has weights of its own."""
    return (shared, None) if isinstance(shared, int) else (0, shared)


def with_last_experts(
    ids: jax.Array, weights: jax.Array, experts: int, shared: int
) -> tuple[jax.Array, jax.Array]:
    """ids and weights [t, top_k], and behind them the last `shared` of the experts, with weight 1."""
    if not shared:
        return ids, weights
    ids, routed = as_int32("dispatch", "ids", ids, "[t, top_k]"), experts - shared
    last = jnp.broadcast_to(jnp.arange(routed, experts, dtype=jnp.int32), (ids.shape[0], shared))
    ids, last = same_varying_axes([jnp.where(ids < routed, ids, -1), last])
    weights, ones = same_varying_axes([weights, jnp.ones_like(last, jnp.float32)])
    return jnp.concatenate([ids, last], axis=1), jnp.concatenate([weights, ones], axis=1)


def with_shared(
    y: jax.Array,
    x: jax.Array,
    shared: SharedExperts | None,
    recipe: str,
    form: ExpertForm,
    num_sms: int | None,
) -> jax.Array:
    """y plus what the shared experts make of x [t, h], rounded once."""
    if shared is None:
        return y
    return _sum([y, *_each(x, shared, recipe, form, num_sms)])


def _each(
    x: jax.Array, shared: SharedExperts, recipe: str, form: ExpertForm, num_sms: int | None
) -> list[jax.Array]:
    """[t, h] of each shared expert."""
    tokens, count = x.shape[0], shared.w13.shape[0]
    rows = jnp.concatenate([x] * count) if count > 1 else x
    y = expert_mlp(
        rows,
        shared.w13,
        shared.w2,
        jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), (count,)),
        None if shared.gate is None else jnp.concatenate([_opened(x, shared.gate)] * count),
        b13=shared.b13,
        b2=shared.b2,
        recipe=recipe,
        form=dataclasses.replace(form, weights_first=False),
        expected_m=max(tokens, 1) if is_known(tokens) else None,
        num_sms=num_sms,
    )
    return [y] if count == 1 else [y[s * tokens : (s + 1) * tokens] for s in range(count)]


def _opened(x: jax.Array, gate: jax.Array) -> jax.Array:
    """float32 [t]: how far the gate is open to each token."""
    return jax.nn.sigmoid(jnp.sum(x.astype(jnp.float32) * gate.astype(jnp.float32)[None], axis=1))


def _sum(parts: list[jax.Array]) -> jax.Array:
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts[0].dtype)
