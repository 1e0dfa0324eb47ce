"""route: checks, the call of the op, and the weights' derivative."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.core.derivatives import same_varying_axes
from jax_deepgemm.ops.route.family import beyond
from jax_deepgemm.ops.route.op import ANYWHERE, route_op, tangent_op
from jax_deepgemm.ops.route.router import SCORES, Router

_AS_THEY_ARE = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
"""Dtypes of logits that the kernels read; others become float32 before."""

DEEPSEEK_V3: Mapping[str, Any] = types.MappingProxyType(
    {"score": "sigmoid", "num_groups": 8, "top_groups": 4, "renormalize": True, "scale": 2.5}
)
"""DeepSeek-V3's router, for 256 experts and top_k=8: route(logits, 8, bias=bias, **DEEPSEEK_V3)."""


def route(
    logits: jax.Array,
    top_k: int,
    *,
    score: str | None = "softmax",
    num_groups: int | None = None,
    top_groups: int | None = None,
    bias: jax.Array | None = None,
    renormalize: bool | None = None,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The top_k experts of every token, and their weights.

    Scores are the softmax, the sigmoid or sqrt(log(1 + exp(.))) of the logits. Experts are chosen by score +
    bias; their weights are the scores without it. With groups (DeepSeek-V3), the experts are num_groups equal
    runs of neighbours; a group counts what its best two experts count together, and only the experts of the
    top_groups best groups can be chosen, so that a token goes to few devices.

    >>> import jax.numpy as jnp
    >>> ids, weights = route(jnp.array([[0.1, 0.5, 0.25, 0.15]]), 2, score=None, renormalize=False)
    >>> ids.tolist(), weights.tolist()
    ([[1, 2]], [[0.5, 0.25]])

    DeepSeek-V3's router by name: sigmoid, 8 groups of 32 experts, the 8 best experts of the 4 best groups.

    >>> import jax
    >>> from jax_deepgemm.moe import DEEPSEEK_V3
    >>> logits = jax.random.normal(jax.random.key(0), (5, 256))
    >>> ids, weights = route(logits, 8, bias=jnp.zeros(256), **DEEPSEEK_V3)
    >>> ids.shape, bool(jnp.all(jnp.abs(weights.sum(-1) - 2.5) < 1e-5))
    ((5, 8), True)
    >>> dict(DEEPSEEK_V3)
    {'score': 'sigmoid', 'num_groups': 8, 'top_groups': 4, 'renormalize': True, 'scale': 2.5}

    Args:
      logits: [t, experts], any floating dtype; computed in float32.
      top_k: experts per token.
      score: "softmax" over all experts, "sigmoid", "sqrt_softplus" (as DeepSeek-V4), or None if `logits` are
        scores already, none negative.
      num_groups, top_groups: group-limited choice; both or neither.
      bias: [experts] float32, added to the scores in the choice only; it has no gradient.
      renormalize: divide the chosen weights by their sum (plus 1e-20, as DeepSeek-V3 does). None: where
        top_k > 1. A single weight divided by itself is 1, through which no router learns.
      scale: factor of all weights, after that.

    Returns:
      (ids int32 [t, top_k], weights float32 [t, top_k]), best expert first. A token's ids are distinct. The
      weights are differentiable with respect to the logits, through the scores of the chosen experts:
      finite for all finite scores, those of a token whose scores are all zero included.

    Raises:
      ValueError, TypeError: shapes and counts that do not fit; the message names both sides.

    Warns:
      UserWarning: renormalize=True with top_k=1.

    Deterministic: of equal scores the lowest id comes first, of equal groups the first. NaN scores rank below
    all numbers, so ids are in range and distinct whatever the logits are; the weights of a token with a NaN
    are NaN where its scores are (with softmax or renormalize: all of them), so it does not go unseen.

    One kernel on CUDA, and a second one for the gradient, for up to 2048 experts, top_k 32 and 32 groups; jnp
    elsewhere and beyond. Both compute scores in float32, each with its own rounding: they choose the same
    experts where scores differ by more than that, and weights agree to 1e-6 of their size.
    """
    logits, bias = unwrapped(logits), unwrapped(bias)
    experts = _check(logits, top_k, score, num_groups, top_groups, bias)
    router = Router(
        top_k=int(top_k),
        score=score,
        num_groups=num_groups or 1,
        top_groups=top_groups or 1,
        renormalize=_renormalizes(renormalize, top_k),
        scale=float(scale),
    )
    added = [] if bias is None else [jnp.asarray(bias, jnp.float32)]
    logits = jnp.asarray(logits, logits.dtype if logits.dtype in _AS_THEY_ARE else jnp.float32)
    logits, *added = same_varying_axes([logits, *added])
    kernel = not beyond(experts, router)
    fixed = map(lax.stop_gradient, [logits, *added])
    ids, weights = route_op(bool(added), kernel)(*fixed, router=router, **ANYWHERE)
    return ids, _differentiable((router, kernel), logits, ids, weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    static: tuple[Router, bool], logits: jax.Array, ids: jax.Array, weights: jax.Array
) -> jax.Array:
    """The weights, which come from these logits."""
    return weights


@_differentiable.defjvp
def _differentiable_jvp(
    static: tuple[Router, bool], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (router, kernel), (logits, ids, _) = static, primals
    [moved] = tangent_op(kernel)(logits, ids, tangents[0], router=router, **ANYWHERE)
    return _differentiable(static, *primals), moved


def _renormalizes(asked: bool | None, top_k: int) -> bool:
    if asked and top_k == 1:
        warnings.warn(
            "route: renormalize=True with top_k=1 makes every weight 1, so the router has no gradient. Leave "
            "renormalize out, or pass renormalize=False: the score itself is the weight.",
            stacklevel=3,
        )
    return top_k > 1 if asked is None else asked


def _check(
    logits: Any, top_k: int, score: Any, num_groups: int | None, top_groups: int | None, bias: Any
) -> int:
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        given = np.dtype(logits.dtype).name if hasattr(logits, "dtype") else type(logits).__name__
        raise TypeError(f"route: logits are {given}, need a floating point array [t, experts].")
    if logits.ndim != 2:
        raise ValueError(
            f"route: logits are {list(logits.shape)}, need [t, experts]. "
            "Merge leading dimensions: logits.reshape(-1, logits.shape[-1])."
        )
    if score not in SCORES:
        raise ValueError(
            f"route: score is {score!r}, need 'softmax', 'sigmoid', 'sqrt_softplus', or None for ready "
            "scores."
        )
    experts = logits.shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"route: top_k is {top_k} and there are {experts} experts, need 1 <= top_k <= experts."
        )
    if bias is not None and tuple(bias.shape) != (experts,):
        raise ValueError(
            f"route: bias is {list(bias.shape)} and logits are {list(logits.shape)}, need [{experts}]."
        )
    if (num_groups is None) != (top_groups is None):
        raise ValueError(
            f"route: num_groups is {num_groups} and top_groups is {top_groups}, need both or neither."
        )
    if num_groups is not None and top_groups is not None:
        _check_groups(experts, top_k, num_groups, top_groups)
    return experts


def _check_groups(experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    if num_groups < 1 or experts % num_groups:
        _group_error(f"num_groups is {num_groups} and there are {experts} experts", "groups of equal size")
    if not 1 <= top_groups <= num_groups:
        _group_error(f"top_groups is {top_groups} of {num_groups} groups", "1 <= top_groups <= num_groups")
    if top_k > top_groups * (experts // num_groups):
        _group_error(
            f"top_k is {top_k}, and {top_groups} groups have {top_groups * (experts // num_groups)} experts",
            "at least top_k experts in top_groups groups",
        )


def _group_error(given: str, rule: str) -> NoReturn:
    raise ValueError(f"route: {given}, need {rule}. Leave num_groups and top_groups out for a free choice.")
