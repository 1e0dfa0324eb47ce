"""Attention over contiguous keys and values, by cuDNN where it can be, else by XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_deepgemm.inference import checks
from jax_deepgemm.inference.products import product
from jax_deepgemm.inference.scores import View, softmax
from jax_deepgemm.log import note_once

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
WIDEST_HEAD = 256


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    causal: bool = False,
    q_offset: ArrayLike = 0,
    window: int | None = None,
    kv_lens: ArrayLike | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """softmax(q k^T * scale + bias + slope * (key - position)) v, over the keys that a query sees.

    Query i stands at position q_offset + i; what it sees is as in `masked_softmax`, and no key from kv_lens
    on. Query head j reads head j // (heads / kv_heads) of keys and values.

    >>> import jax.numpy as jnp
    >>> v = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> attention(jnp.ones((1, 4, 2, 1)), 0 * v, v, causal=True)[0, :, 0, 0].tolist()
    [0.0, 0.5, 1.0, 1.5]
    >>> attention(jnp.ones((1, 1, 2, 1)), 0 * v, v, kv_lens=jnp.array([3]))[0, :, 0, 0].tolist()
    [1.0]

    Args:
      q: [batch, queries, heads, d] bfloat16, float16 or float32.
      k: [batch, keys, kv_heads, d] in the dtype of q; kv_heads divides heads.
      v: [batch, keys, kv_heads, d_v] in the dtype of q.
      bias: broadcasts to [batch, heads, queries, keys].
      alibi_slopes: [heads].
      causal: whether keys behind a query's position are hidden.
      q_offset: the position of the first query, a number or integers [batch]; keys - queries where the
        queries are the last ones.
      window: how many keys a query sees at most, its own included; needs causal.
      kv_lens: integers [batch]: how many keys each sequence has. By XLA what stands behind is not read, NaN
        included; cuDNN needs finite numbers there.
      scale: of q k^T; None: d^-0.5.
      impl: "auto", "cudnn" or "xla".

    Returns:
      [batch, queries, heads, d_v] in the dtype of q; scores and softmax in float32. Rows that see no key are
      zero.

    Raises:
      TypeError, ValueError: types and shapes that do not fit; with impl="cudnn" what cuDNN cannot do, and
        why.

    "auto" is cuDNN (`jax.nn.dot_product_attention`) where this process has a GPU and the call is what cuDNN
    computes: bfloat16 or float16, d = d_v a multiple of 8 up to 256, no bias, no alibi_slopes, with a window
    no kv_lens and no more queries than keys, and q_offset the Python number 0 if it is causal. Else it is
    XLA, which keeps all scores in memory, float32 [batch, heads, queries, keys]; the log (level info) says
    why, once. In a program's text the call stands in a scope named "attention_cudnn" or "attention_xla". For
    keys in pages, or with an offset, `ragged_paged_attention` and `attend_with_cache` keep no scores.
    Differentiable.
    """
    op = "attention"
    checks.choice(op, "impl", impl, IMPLEMENTATIONS)
    q, k, v = _operands(op, q, k, v)
    b, sq, h, d = q.shape
    scale = d**-0.5 if scale is None else float(scale)
    view = View.of(op, (b, h, sq, k.shape[1]), causal, q_offset, window, kv_lens)
    extra = bias is not None or alibi_slopes is not None
    why = _not_cudnn(q, v, view, q_offset, extra)
    if impl == "cudnn" and why:
        raise ValueError(f"{op}: impl is 'cudnn', and {why}. Use impl='auto' or 'xla'.")
    gpu = jax.default_backend() == "gpu"
    if impl == "auto" and why and gpu:
        note_once(f"{op}: q {checks.described(q)} and k {checks.described(k)} run on XLA, because {why}.")

    def by_xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.named_scope("attention_xla"):
            return _xla(op, q, k, v, view, bias, alibi_slopes, scale)

    def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.named_scope("attention_cudnn"):
            return _cudnn(q, k, v, view, scale)

    if impl == "cudnn":
        return by_cudnn(q, k, v)
    if impl == "auto" and gpu and not why:
        return lax.platform_dependent(q, k, v, cuda=by_cudnn, default=by_xla)
    return by_xla(q, k, v)


def _operands(op: str, q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    q = checks.floats(op, "q", q)
    k, v = checks.floats(op, "k", k, like=q), checks.floats(op, "v", v, like=q)
    fits = q.ndim == k.ndim == v.ndim == 4 and (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[3])
    if not fits or v.shape[:3] != k.shape[:3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{op}: q is {list(q.shape)}, k is {list(k.shape)} and v is {list(v.shape)}, need q [batch, "
            "queries, heads, d], k [batch, keys, kv_heads, d] and v [batch, keys, kv_heads, d_v], where "
            "kv_heads divides heads. Arrays [batch, heads, tokens, d] become that by jnp.swapaxes(x, 1, 2)."
        )
    return q, k, v


def _not_cudnn(q: jax.Array, v: jax.Array, view: View, q_offset: Any, extra: bool) -> str:
    """Why a call is not what cuDNN computes as it is defined here; "" if it is."""
    d = q.shape[3]
    if q.dtype == np.float32:
        return "cuDNN computes bfloat16 and float16, and q is float32"
    if 0 in (*q.shape, *v.shape):
        return "there are no queries or no keys"
    if d % 8 or d > WIDEST_HEAD or v.shape[3] != d:
        widths = f"{d} and {v.shape[3]}"
        return f"heads are {widths} wide, and cuDNN's are equal, a multiple of 8, at most {WIDEST_HEAD}"
    if extra:
        return "with a bias or alibi_slopes cuDNN gives NaN for rows that see nothing, and is slow"
    if view.causal and not (isinstance(q_offset, int) and q_offset == 0):
        return "cuDNN's causal mask begins at position 0, and q_offset is not the number 0"
    if view.window is not None and view.ends is not None:
        return "cuDNN has no zeros for rows whose window is behind kv_lens"
    if view.window is not None and q.shape[1] > v.shape[1]:
        return "cuDNN has no zeros for rows whose window is behind the last key"
    return ""


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, view: View, scale: float) -> jax.Array:
    lens = None if view.ends is None else jnp.broadcast_to(view.ends.reshape(-1), (q.shape[0],))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=view.causal,
        key_value_seq_lengths=None if lens is None else jnp.clip(lens, 0, k.shape[1]),
        local_window_size=None if view.window is None else (view.window - 1, 0),
        implementation="cudnn",
    )
    if lens is None:
        return out
    return jnp.where(jnp.expand_dims(lens > 0, (1, 2, 3)), out, jnp.zeros((), out.dtype))


def _xla(
    op: str, q: jax.Array, k: jax.Array, v: jax.Array, view: View, bias: Any, alibi_slopes: Any, scale: float
) -> jax.Array:
    b, sq, h, d = q.shape
    length, kv = k.shape[1], k.shape[2]
    met = view.met()
    if met is not None:  # 0 * NaN would be NaN
        v = jnp.where(met.reshape(-1, length, 1, 1), v, jnp.zeros((), v.dtype))
    grouped = q.reshape(b, sq, kv, h // kv, d).transpose(0, 2, 3, 1, 4)
    scores = product(grouped, k, ((4,), (3,)), ((0, 1), (0, 2)))
    p = softmax(op, scores.reshape(b, h, sq, length) * scale, view, bias, alibi_slopes)
    p = p.astype(v.dtype).reshape(b, kv, h // kv, sq, length)
    out = product(p, v, ((4,), (1,)), ((0, 1), (0, 2)), q.dtype)
    return out.reshape(b, h, sq, v.shape[3]).swapaxes(1, 2)
