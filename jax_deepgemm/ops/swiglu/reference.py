"""Activations and their gradients in jax.numpy, in float32 throughout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_deepgemm.ops.quantize.activation import SILU, Activation
from jax_deepgemm.ops.quantize.reference import exact_float32, zero_rows

GELU = (2 * math.sqrt(2 / math.pi), 0.044715)
"""gelu(x) = x * sigmoid(c * (x + d * x^3)), as (1 + tanh(z)) / 2 = sigmoid(2 z)."""


def halves(h: jax.Array, activation: Activation) -> list[jax.Array]:
    """[gate, up] of h [.., 2 i], or [h] without a gate."""
    if not activation.gated:
        return [h]
    if activation.interleaved:
        return [h[..., 0::2], h[..., 1::2]]
    return jnp.split(h, 2, axis=-1)


def joined(parts: list[jax.Array], activation: Activation) -> jax.Array:
    """The inverse of `halves`."""
    if activation.interleaved:
        return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], 2 * parts[0].shape[-1])
    return jnp.concatenate(parts, axis=-1)


def of_each(x: jax.Array, activation: Activation) -> jax.Array:
    """f(x) of every number, in float32."""
    return _of_gate(x, activation)[0]


def _of_gate(x: jax.Array, activation: Activation) -> tuple[jax.Array, jax.Array]:
    """f(x) and its slope."""
    if activation.function == "relu2":
        positive = jnp.where(x < 0, 0, x)
        return positive * positive, 2 * positive
    if activation.function == "gelu":
        scale, cubic = GELU
        near = jnp.clip(x, -16, 16)  # the sigmoid of what is farther is 0 or 1
        sigmoid = jax.nn.sigmoid(scale * (near + cubic * near * near * near))
        inner = scale * (1 + 3 * cubic * near * near)
    else:
        sigmoid, inner = jax.nn.sigmoid(activation.alpha * x), jnp.float32(activation.alpha)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid) * inner


def _of_up(up: jax.Array, activation: Activation) -> jax.Array:
    if activation.limit is not None:
        up = jnp.where(up > activation.limit, activation.limit, up)
        up = jnp.where(up < -activation.limit, -activation.limit, up)
    return up + activation.shift if activation.shift else up


def _clipped_gate(gate: jax.Array, activation: Activation) -> jax.Array:
    limit = activation.limit
    return gate if limit is None else jnp.where(gate > limit, limit, gate)


def act(
    h: jax.Array, weight: jax.Array | None, rows: jax.Array | None, activation: Activation = SILU
) -> jax.Array:
    """f(gate) * up * weight of h [.., m, 2 i], in float32; zeros from row rows [.., 1] on."""
    gate, *up = halves(exact_float32(h), activation)
    product = _of_gate(_clipped_gate(gate, activation), activation)[0]
    if up:
        product = product * _of_up(up[0], activation)
    return zero_rows(product if weight is None else product * weight[..., None], rows)


def grad(
    h: jax.Array,
    weight: jax.Array | None,
    dact: jax.Array,
    rows: jax.Array | None,
    activation: Activation = SILU,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of h [.., m, 2 i] and of weight [.., m], in float32; zeros from row rows [.., 1] on."""
    gate, *up = halves(exact_float32(h), activation)
    given = exact_float32(dact)
    value, slope = _of_gate(_clipped_gate(gate, activation), activation)
    factors = [_of_up(up[0], activation)] if up else []
    partials = [factors[0] * slope, value] if up else [slope]
    if activation.limit is not None:
        partials[0] = jnp.where(gate > activation.limit, 0, partials[0])
        partials[1] = jnp.where(jnp.abs(up[0]) > activation.limit, 0, partials[1])
    scaled = given if weight is None else given * weight[..., None]
    dh = joined([scaled * partial for partial in partials], activation)
    product = given * value * factors[0] if up else given * value
    return zero_rows(dh, rows), jnp.sum(zero_rows(product, rows), axis=-1)
