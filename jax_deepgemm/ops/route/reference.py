"""Routing in jax.numpy, in float32 throughout: the choice, the weights at chosen ids, and their derivatives.

Ids have no derivative, so that of the weights is taken at fixed ids. It exists to any order, and is finite
where scores vanish.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_deepgemm.ops.route.router import Router

_TINY = np.float32(1e-20)
_FAINT = np.float32(1e-18)
"""What chosen scores may sum to before one over its square is no float32."""
_CLOSED = np.finfo(np.float32).min
_LOWEST = np.nextafter(_CLOSED, np.float32(0))
_FAR = np.float32(-17)
"""From here down sqrt(log(1 + exp(x))) is exp(x / 2), to the last bit of a float32."""


def choose(logits: jax.Array, bias: jax.Array | None, router: Router) -> list[jax.Array]:
    """ids int32 [t, top_k], best first, and weights float32 [t, top_k] of logits [t, experts].

    >>> choose(jnp.array([[0.0, 3.0, 1.0]]), None, Router(2, None, renormalize=False))
    [Array([[1, 2]], dtype=int32), Array([[3., 1.]], dtype=float32)]
    """
    scores = _scores(logits.astype(jnp.float32), router.score)
    ranking = scores if bias is None else scores + bias[None, :]
    ranking = jnp.maximum(jnp.where(jnp.isnan(ranking), _LOWEST, ranking), _LOWEST)
    ranking = jnp.where(ranking == 0, jnp.float32(0), ranking)  # top_k ranks -0 below 0
    if router.grouped:
        ranking = _limit_groups(ranking, router)
    ids = lax.top_k(ranking, router.top_k)[1].astype(jnp.int32)
    return [ids, _weights(scores, ids, router)]


def _limit_groups(ranking: jax.Array, router: Router) -> jax.Array:
    """Less than all scores for the experts of all but the best groups."""
    tokens, experts = ranking.shape
    size = experts // router.num_groups
    grouped = ranking.reshape(tokens, router.num_groups, size)
    best, _ = lax.top_k(grouped, min(2, size))
    power = jnp.sum(0.5 * best, axis=-1)  # halves: the sum of two is finite
    _, chosen = lax.top_k(power, router.top_groups)
    open_ = jnp.any(chosen[:, :, None] == jnp.arange(router.num_groups)[None, None], axis=1)
    return jnp.where(open_[:, :, None], grouped, _CLOSED).reshape(ranking.shape)


def _scores(x: jax.Array, score: str | None) -> jax.Array:
    if score == "softmax":
        return jax.nn.softmax(x, axis=-1)
    if score == "sigmoid":
        return jax.nn.sigmoid(x)
    return _sqrt_softplus(x) if score == "sqrt_softplus" else x


def _sqrt_softplus(x: jax.Array) -> jax.Array:
    """sqrt(log(1 + exp(x))), whose derivatives are finite however small it is."""
    far = x < _FAR
    return jnp.where(
        far, jnp.exp(0.5 * jnp.where(far, x, 0)), jnp.sqrt(jax.nn.softplus(jnp.where(far, 0, x)))
    )


# Weights, and their derivatives at fixed ids ------------------------------------------------------------


def weights(logits: jax.Array, ids: jax.Array, router: Router) -> jax.Array:
    """The weights float32 [t, top_k] of chosen experts."""
    return _weights(_scores(logits.astype(jnp.float32), router.score), ids, router)


def tangent(logits: jax.Array, ids: jax.Array, by: jax.Array, router: Router) -> jax.Array:
    """How the weights move where the logits move by [t, experts]."""
    return jax.jvp(lambda x: weights(x, ids, router), (logits,), (by,))[1]


def gradient(logits: jax.Array, ids: jax.Array, by: jax.Array, router: Router) -> jax.Array:
    """The gradient of the logits for this one of the weights, [t, top_k]."""
    return jax.vjp(lambda x: weights(x, ids, router), logits)[1](by)[0]


def _weights(scores: jax.Array, ids: jax.Array, router: Router) -> jax.Array:
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    return (_shares(chosen) if router.renormalize else chosen) * jnp.float32(router.scale)


@jax.custom_jvp
def _shares(weights: jax.Array) -> jax.Array:
    """Each row's weights divided by their sum."""
    return weights / _total(weights)


def _total(weights: jax.Array) -> jax.Array:
    return jnp.sum(weights, axis=-1, keepdims=True) + _TINY


@_shares.defjvp
def _shares_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(tangent - share * sum of tangents) / total, which never squares the total.

    Where all scores vanish, the second derivative is larger than a float32 can be, and counts as zero.
    """
    (weights,), (tangent,) = primals, tangents
    shares, total = _shares(weights), _total(weights)
    faint = jnp.abs(total) < _FAINT
    inverse = jnp.where(faint, 1 / lax.stop_gradient(total), 1 / jnp.where(faint, 1, total))
    fixed = jnp.where(faint, lax.stop_gradient(shares), shares)
    return shares, (tangent - fixed * jnp.sum(tangent, axis=-1, keepdims=True)) * inverse
