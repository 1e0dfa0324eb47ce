"""Functions of single numbers that XLA fuses with their neighbours: biases, activations, residuals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "identity": lambda x: x,
        "relu": jax.nn.relu,
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
        "silu": jax.nn.silu,
    }
)
GATINGS = (None, "split", "interleaved")
MODES = ("pre", "post", "parallel")


def bias_act(
    x: ArrayLike,
    bias: ArrayLike | None = None,
    act: str = "identity",
    *,
    gated: str | None = None,
    gate_first: bool = False,
) -> jax.Array:
    """act(x + bias), or of two halves of the features value * act(gate).

        gelu_tanh(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
        gelu_erf(z)  = z / 2 (1 + erf(z / sqrt(2)))             silu(z) = z / (1 + exp(-z))

    >>> import jax.numpy as jnp
    >>> bias_act(jnp.array([-1.0, 2.0]), jnp.array([0.0, 1.0]), "relu").tolist()
    [0.0, 3.0]
    >>> x = jnp.array([[1.0, 2.0, -3.0, 4.0]])
    >>> bias_act(x, act="relu", gated="split").tolist()                    # value | gate
    [[0.0, 8.0]]
    >>> bias_act(x, act="relu", gated="interleaved", gate_first=True).tolist()   # gate, value, gate, value
    [[2.0, 0.0]]

    Args:
      x: [.., n] bfloat16, float16 or float32.
      bias: [n], or None.
      act: "identity", "relu", "gelu_tanh", "gelu_erf" or "silu".
      gated: None, or where the two halves of x stand: "split", one behind the other, or "interleaved", in
        turns.
      gate_first: whether the gate is the first of both; else the value is.

    Returns:
      [.., n] in the dtype of x, [.., n / 2] where it is gated; computed in float32 and rounded once.

    Raises:
      TypeError, ValueError: types, shapes and words that do not fit.

    Differentiable. Source: Hendrycks and Gimpel, arXiv:1606.08415; gates: Shazeer, arXiv:2002.05202.
    """
    given = checks.floats("bias_act", "x", x)
    if given.ndim < 1:
        raise ValueError("bias_act: x is a scalar, need [.., n]: x[None].")
    wide = given.astype(jnp.float32)
    if bias is not None:
        wide = wide + checks.row("bias_act", "bias", bias, given.shape[-1], given.ndim)
    return activated("bias_act", wide, act, gated, gate_first).astype(given.dtype)


def activated(op: str, wide: jax.Array, act: Any, gated: Any, gate_first: bool) -> jax.Array:
    """An activation of float32 numbers."""
    function = ACTIVATIONS[checks.choice(op, "act", act, tuple(ACTIVATIONS))]
    if checks.choice(op, "gated", gated, GATINGS) is None:
        return function(wide)
    n = wide.shape[-1]
    if n % 2:
        raise ValueError(
            f"{op}: there are {n} features, an odd number, and gated={gated!r}; need two halves."
        )
    if gated == "split":
        first, second = wide[..., : n // 2], wide[..., n // 2 :]
    else:
        pairs = wide.reshape(*wide.shape[:-1], n // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    gate, value = (first, second) if gate_first else (second, first)
    return value * function(gate)


def residual_add(
    hidden: ArrayLike,
    residual: ArrayLike,
    attn: ArrayLike | None = None,
    attn_bias: ArrayLike | None = None,
    final_bias: ArrayLike | None = None,
    *,
    mode: str = "pre",
    mp_size: int = 1,
) -> jax.Array:
    """The residual behind a transformer block.

        pre        m + (r + a + b_a + b_f) / mp_size        norms in front of the layers
        post       m + r + b_f                              norms behind them
        parallel   m + a + (r + b_a + b_f) / mp_size        attention and MLP side by side (GPT-J, GPT-NeoX)

    where m is hidden, r residual, a attn, b_a attn_bias and b_f final_bias.

    With mp_size devices that hold parts of m (and, in parallel, of a), the sum of their results is the
    residual: what all of them hold is divided by mp_size.

    >>> import jax.numpy as jnp
    >>> m, r, a, b = (jnp.full((1, 2), x) for x in (1.0, 2.0, 4.0, 8.0))
    >>> [residual_add(m, r, a, b[0], mode=mode, mp_size=2)[0, 0].item() for mode in ("pre", "parallel")]
    [8.0, 10.0]
    >>> residual_add(m, r, final_bias=b[0], mode="post")[0].tolist()
    [11.0, 11.0]

    Args:
      hidden: [.., h] bfloat16, float16 or float32: what the MLP gave.
      residual: [.., h] in the dtype of hidden.
      attn: [.., h] in the dtype of hidden, what attention gave; None in mode "post".
      attn_bias, final_bias: [h], or None.
      mode: "pre", "post" or "parallel".
      mp_size: the number of devices that the results are summed over; 1 in mode "post".

    Returns:
      [.., h] in the dtype of hidden, summed in float32 and rounded once.

    Raises:
      TypeError, ValueError: types and shapes that do not fit, and terms that a mode has not.

    Differentiable. Source: DeepSpeed's residual_add_bias.
    """
    op = "residual_add"
    checks.choice(op, "mode", mode, MODES)
    parts = checks.whole(op, "mp_size", mp_size, 1)
    m = checks.floats(op, "hidden", hidden)
    why = "as hidden"
    terms = {"residual": residual} | ({} if attn is None else {"attn": attn})
    wide = {
        name: checks.shaped(op, name, checks.floats(op, name, x, like=m), m.shape, why).astype(jnp.float32)
        for name, x in terms.items()
    }
    biases = {
        name: checks.row(op, name, x, m.shape[-1], m.ndim)
        for name, x in {"attn_bias": attn_bias, "final_bias": final_bias}.items()
        if x is not None
    }
    if mode == "post" and (attn is not None or attn_bias is not None or parts != 1):
        raise ValueError(
            f"{op}: mode is 'post', which adds residual and final_bias to hidden, and attn, attn_bias or "
            "mp_size are given; leave them out, or use mode='pre'."
        )
    if mode != "post" and attn is None:
        raise ValueError(
            f"{op}: mode is {mode!r} and attn is None, need what attention gave, or mode='post'."
        )
    shared = sum(biases.values(), wide["residual"])
    own = m.astype(jnp.float32)
    if mode == "parallel":
        own = own + wide["attn"]
    elif mode == "pre":
        shared = shared + wide["attn"]
    return (own + shared / parts).astype(m.dtype)
