"""Manifold-constrained hyper-connections (mHC): a residual stream that is n streams wide, and how a layer
reads from it and writes to it. Plain functions on arrays.

    streams = expand(embeddings, n)                                        [tokens, n, d]
    for each layer:
        x, post_weights, mixing = pre(streams, weight, scale, bias)        x [tokens, d]
        streams = post(layer(x), streams, post_weights, mixing)            [tokens, n, d]
    x = head(streams, weight, scale, bias)                                 [tokens, d]

The numbers that mix a token's streams come from all of them. With z = vec(streams) / rms(vec(streams)), of
n d numbers, and h = z weight^T, of n + n + n n columns:

    pre      p_i  = sigmoid(scale_0 h_i + bias_i) + eps                    x      = sum_i p_i streams_i
    post     q_j  = 2 sigmoid(scale_1 h_(n + j) + bias_(n + j))
    mixing   M_ij = sinkhorn(scale_2 h_(2n + n i + j) + bias_(2n + n i + j))
                                                        streams'_j = q_j layer(x) + sum_i M_ij streams_i

Sources: "mHC: Manifold-Constrained Hyper-Connections", arXiv:2512.24880 (H^pre, H^post, and H^res, which is M
transposed; eps is 0 there); the form with eps, in this order of columns, is that of DeepSeek V4 (hc_*_fn,
hc_*_scale, hc_*_base, hc_eps), whose checkpoints fit as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.core.arrays import unwrapped
from jax_deepgemm.ops.hc_prenorm import hc_prenorm_gemm
from jax_deepgemm.ops.sinkhorn.family import beyond
from jax_deepgemm.ops.sinkhorn.op import ANYWHERE, sinkhorn_op

__all__ = ["coefficients", "expand", "head", "post", "pre", "sinkhorn"]

ITERATIONS = 20
EPS = 1e-6


def expand(x: ArrayLike, n: int) -> jax.Array:
    """The streams before the first layer: n copies.

    >>> import jax.numpy as jnp
    >>> expand(jnp.array([[1.0, 2.0]]), 3).tolist()
    [[[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]]

    Args:
      x: [.., d].
      n: how many streams, at least 1.

    Returns:
      [.., n, d] in the dtype of x.

    Raises:
      ValueError: an n that is no such number.
    """
    given = jnp.asarray(unwrapped(x))
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"expand: n is {n!r}, need a whole number, at least 1.")
    return jnp.repeat(given[..., None, :], n, axis=-2)


def pre(
    streams: ArrayLike,
    weight: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    iterations: int = ITERATIONS,
    norm_eps: float = EPS,
    eps: float = EPS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a layer reads, and how it is written back: see the head of this module.

    >>> import jax, jax.numpy as jnp
    >>> streams = jax.random.normal(jax.random.key(0), (5, 4, 16), jnp.bfloat16)
    >>> weight = jax.random.normal(jax.random.key(1), (24, 64))
    >>> x, post_weights, mixing = pre(streams, weight, jnp.full(3, 0.1), jnp.zeros(24))
    >>> x.shape, post_weights.shape, mixing.shape
    ((5, 16), (5, 4), (5, 4, 4))
    >>> bool(jnp.allclose(mixing.sum(-1), 1, atol=1e-3) & jnp.allclose(mixing.sum(-2), 1, atol=1e-3))
    True

    Args:
      streams: [.., n, d] bfloat16, with at least one dimension in front.
      weight: [n + n + n n, n d] float32: rows of pre, of post, of mixing by the stream that is read and then
        the one that is written.
      scale: float32 [3]: of pre, post and mixing.
      bias: float32 [n + n + n n].
      iterations: of `sinkhorn`.
      norm_eps: added to the mean of squares under the root.
      eps: added to the weights of pre, and in `sinkhorn`.

    Returns:
      x [.., d] in the dtype of the streams, summed in float32; post_weights [.., n] and mixing [.., n, n],
      float32, which `post` takes.

    Raises:
      TypeError, ValueError: types and shapes that do not fit; the message says what to do.

    On CUDA one kernel reads the streams for the product and the norm (`jax_deepgemm.hc_prenorm_gemm`, whose
    product is TF32). Differentiable with respect to all operands.
    """
    own, post_weights, mixing = coefficients(
        streams, weight, scale, bias, iterations=iterations, norm_eps=norm_eps, eps=eps
    )
    return _weighted(own, jnp.asarray(unwrapped(streams))), post_weights, mixing


def coefficients(
    streams: ArrayLike,
    weight: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    iterations: int = ITERATIONS,
    norm_eps: float = EPS,
    eps: float = EPS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The numbers that mix each token's streams: the weights of pre, those of post, and mixing.

    >>> import jax.numpy as jnp
    >>> streams = jnp.ones((1, 2, 4), jnp.bfloat16)
    >>> own, post_weights, mixing = coefficients(streams, jnp.zeros((8, 8)), jnp.ones(3), jnp.zeros(8), eps=0)
    >>> own.tolist(), post_weights.tolist(), mixing.tolist()
    ([[0.5, 0.5]], [[1.0, 1.0]], [[[0.5, 0.5], [0.5, 0.5]]])

    Args:
      streams, weight, scale, bias, iterations, norm_eps, eps: as the parameters of `pre`; streams are
        [.., n, d] bfloat16.

    Returns:
      float32 [.., n], [.., n] and [.., n, n].

    Raises:
      TypeError, ValueError: types and shapes that do not fit; the message says what to do.
    """
    given, n = _streams("pre", streams)
    columns = n * (n + 2)
    weight, scale, bias = _parameters("pre", (weight, scale, bias), (columns, given), 3)
    h = _normed(given, weight, norm_eps)
    own = jax.nn.sigmoid(_affine(scale[0], h[..., :n], bias[:n])) + eps
    post_weights = 2 * jax.nn.sigmoid(_affine(scale[1], h[..., n : 2 * n], bias[n : 2 * n]))
    logits = _affine(scale[2], h[..., 2 * n :], bias[2 * n :])
    mixing = sinkhorn(logits.reshape(*logits.shape[:-1], n, n), iterations=iterations, eps=eps)
    return own, post_weights, mixing


def sinkhorn(logits: ArrayLike, *, iterations: int = ITERATIONS, eps: float = EPS) -> jax.Array:
    """Matrices with positive numbers whose rows and columns have sums of 1, nearly: exp(logits), whose rows
    and then columns are divided by their sums, again and again (Sinkhorn and Knopp).

        M = softmax of each row + eps;  columns / (sum + eps);  iterations - 1 times:  rows / (sum + eps),
        columns / (sum + eps)

    >>> import jax.numpy as jnp
    >>> m = sinkhorn(jnp.array([[0.0, 1.0], [2.0, 0.0]]))
    >>> [[f"{x:.2f}" for x in row] for row in m.tolist()]
    [['0.18', '0.82'], ['0.82', '0.18']]

    Args:
      logits: [.., n, n], computed in float32.
      iterations: how often columns are divided, at least 1.
      eps: 0 in the paper, 1e-6 in DeepSeek V4.

    Returns:
      float32 [.., n, n].

    Raises:
      ValueError: no square matrices, or no such number of iterations.

    Differentiable, through the iterations, which the backward pass repeats. On CUDA one kernel each way for n
    up to 8 and up to 32 iterations; jnp elsewhere, beyond, and for tangents. Source: arXiv:2512.24880.
    """
    given = jnp.asarray(unwrapped(logits)).astype(jnp.float32)
    if given.ndim < 2 or given.shape[-1] != given.shape[-2]:
        raise ValueError(f"sinkhorn: logits are {list(given.shape)}, need square matrices [.., n, n].")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"sinkhorn: iterations is {iterations!r}, need a whole number, at least 1.")

    eps = float(eps)
    known = all(isinstance(size, int) for size in given.shape)
    op = sinkhorn_op("sinkhorn", not known or not beyond(given.shape[-1], iterations))
    function: Callable[[jax.Array], list[jax.Array]]
    function = functools.partial(op, iterations=iterations, eps=eps, **ANYWHERE)
    for _ in range(given.ndim - 3):
        function = jax.vmap(function)
    return function(given)[0] if given.ndim > 2 else function(given[None])[0][0]


def post(y: ArrayLike, streams: ArrayLike, post_weights: ArrayLike, mixing: ArrayLike) -> jax.Array:
    """The streams behind a layer: what it computed, spread over them, and the mixed streams.

        streams'_j = post_weights_j y + sum_i mixing_ij streams_i

    >>> import jax.numpy as jnp
    >>> streams, swap = jnp.array([[[1.0], [2.0]]]), jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
    >>> post(jnp.array([[10.0]]), streams, jnp.array([[1.0, 0.5]]), swap).tolist()
    [[[12.0], [6.0]]]

    Args:
      y: [.., d], what the layer gave.
      streams: [.., n, d], as they were before it.
      post_weights: [.., n] float32, from `pre`.
      mixing: [.., n, n] float32, from `pre`: row i is how stream i is spread.

    Returns:
      [.., n, d] in the dtype of the streams, summed in float32.

    Raises:
      ValueError: shapes that do not fit together.
    """
    y, old, weights, mixing = (jnp.asarray(unwrapped(x)) for x in (y, streams, post_weights, mixing))
    *lead, n, d = old.shape if old.ndim >= 2 else (0, 0)
    wanted = {"y": (*lead, d), "post_weights": (*lead, n), "mixing": (*lead, n, n)}
    for (name, shape), x in zip(wanted.items(), (y, weights, mixing), strict=True):
        if x.shape != shape:
            raise ValueError(
                f"post: {name} is {list(x.shape)} and streams are {list(old.shape)}, need {list(shape)}: y "
                "is [.., d], streams [.., n, d], post_weights [.., n], mixing [.., n, n]."
            )
    wide = old.astype(jnp.float32)
    total = weights[..., None] * y.astype(jnp.float32)[..., None, :]
    for i in range(n):
        total += mixing[..., i, :, None] * wide[..., i, None, :]
    return total.astype(old.dtype)


def head(
    streams: ArrayLike,
    weight: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    norm_eps: float = EPS,
    eps: float = EPS,
) -> jax.Array:
    """The sum of the streams behind the last layer, weighted as by `pre`, and nothing to write back.

    >>> import jax.numpy as jnp
    >>> streams = jnp.arange(8, dtype=jnp.bfloat16).reshape(1, 2, 4)
    >>> head(streams, jnp.zeros((2, 8)), jnp.ones(1), jnp.zeros(2), eps=0).tolist()
    [[2.0, 3.0, 4.0, 5.0]]

    Args:
      streams: [.., n, d] bfloat16, with at least one dimension in front.
      weight: [n, n d] float32.
      scale: float32 [1].
      bias: float32 [n].
      norm_eps, eps: as those of `pre`.

    Returns:
      [.., d] in the dtype of the streams.

    Raises:
      TypeError, ValueError: types and shapes that do not fit; the message says what to do.
    """
    given, n = _streams("head", streams)
    weight, scale, bias = _parameters("head", (weight, scale, bias), (n, given), 1)
    own = jax.nn.sigmoid(_affine(scale[0], _normed(given, weight, norm_eps), bias)) + eps
    return _weighted(own, given)


def _normed(streams: jax.Array, weight: jax.Array, norm_eps: float) -> jax.Array:
    """[.., columns]: the root of the mean of squares divides the product, which is made of all streams."""
    *lead, n, d = streams.shape
    product: Any = hc_prenorm_gemm
    for _ in lead[1:]:
        product = jax.vmap(product, (0, None))
    h, squares = product(streams.reshape(*lead, n * d), weight)
    return h * lax.rsqrt(squares / (n * d) + norm_eps)[..., None]


def _affine(scale: jax.Array, h: jax.Array, bias: jax.Array) -> jax.Array:
    return scale * h + jnp.expand_dims(bias, range(h.ndim - 1))


def _weighted(weights: jax.Array, streams: jax.Array) -> jax.Array:
    return jnp.sum(weights[..., None] * streams.astype(jnp.float32), axis=-2).astype(streams.dtype)


# Checks ----------------------------------------------------------------------------------------------------


def _streams(function: str, given: ArrayLike) -> tuple[jax.Array, int]:
    streams = jnp.asarray(unwrapped(given))
    if streams.dtype != jnp.bfloat16:
        raise TypeError(
            f"{function}: streams are {streams.dtype}, need bfloat16. Convert them: "
            "streams.astype(jnp.bfloat16)."
        )
    if streams.ndim < 3:
        raise ValueError(
            f"{function}: streams are {list(streams.shape)}, need [.., n, d] with at least one dimension in "
            "front: streams[None] for one token."
        )
    return streams, streams.shape[-2]


def _parameters(
    function: str, given: tuple[ArrayLike, ...], of: tuple[int, jax.Array], scales: int
) -> list[jax.Array]:
    columns, streams = of
    n, d = streams.shape[-2:]
    shapes = {"weight": (columns, n * d), "scale": (scales,), "bias": (columns,)}
    arrays = [jnp.asarray(unwrapped(x)) for x in given]
    for (name, shape), x in zip(shapes.items(), arrays, strict=True):
        if x.dtype != jnp.float32:
            raise TypeError(
                f"{function}: {name} is {x.dtype}, need float32. Convert it: {name}.astype(jnp.float32)."
            )
        if x.shape != shape:
            raise ValueError(
                f"{function}: {name} is {list(x.shape)}, need {list(shape)} for {n} streams of {d} numbers."
            )
    return arrays
