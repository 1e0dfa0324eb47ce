"""Weights of experts, quantised once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike

from jax_deepgemm.moe.experts import one_weight
from jax_deepgemm.moe.form import PLAIN, ExpertForm
from jax_deepgemm.ops.quantize import Fp4Array, PreparedFp4, prepare_fp4, prepare_weight
from jax_deepgemm.ops.quantize.fp4 import nvfp4_parts


def prepare_weights(
    w13: ArrayLike | Fp4Array | Sequence[ArrayLike | Fp4Array],
    w2: ArrayLike | Fp4Array,
    *,
    form: ExpertForm = PLAIN,
) -> Any:
    """Both weights of the experts quantised once, for all calls of a training step: see `prepare_weight`.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.moe import expert_mlp, prepare_weights
    >>> batches = jax.random.normal(jax.random.key(0), (4, 10, 256), jnp.bfloat16)
    >>> w13 = jax.random.normal(jax.random.key(1), (3, 2 * 128, 256)) / 16
    >>> w2 = jax.random.normal(jax.random.key(2), (3, 256, 128)) / 16
    >>> def loss(weights, sizes):
    ...     prepared = prepare_weights(*weights)      # once, outside the scan over microbatches
    ...     def body(total, rows):
    ...         return total + jnp.sum(expert_mlp(rows, *prepared, sizes).astype(jnp.float32)), None
    ...     return jax.lax.scan(body, jnp.float32(0), batches)[0]
    >>> [dw.shape for dw in jax.grad(loss)((w13, w2), jnp.array([4, 0, 5]))]
    [(3, 256, 256), (3, 256, 128)]

    Args:
      w13: [.., e, 2 * i, h] gate and up projections, bfloat16 or float32.
        Or two arrays, (gate, up), which are joined here: the gradients are theirs. Or an `Fp4Array` (or two,
        in NVFP4 with global scales of their own), which has no gradient.
      w2: [.., e, h, i] down projections, likewise.
      form: as in `expert_mlp`.

    Returns:
      Two PreparedWeights, which `expert_mlp`, `moe_mlp`, `moe_layer` and `expert_parallel_moe` take in place
      of w13 and w2. On a mesh they are cut as those are. Of an Fp4Array a `PreparedFp4` (`prepare_fp4`).

    Raises:
      TypeError, ValueError: as `prepare_weight` and `prepare_fp4`.
    """
    _check_one_format(w13)
    parts: Any = tuple(map(_nvfp4, w13)) if isinstance(w13, tuple | list) else _nvfp4(w13)
    one, form = one_weight("prepare_weights", parts, form), form.checked("prepare_weights")
    return _prepared(one, form), _prepared(w2, form)


def _check_one_format(w13: Any) -> None:
    if isinstance(w13, tuple | list) and len({_is_nvfp4(part) for part in w13}) > 1:
        raise TypeError(
            "prepare_weights: one of gate and up is NVFP4 and the other is not, need one format. Quantise "
            "both alike: quantize(w, (1, 16), float4_e2m1fn)."
        )


def _is_nvfp4(w: Any) -> bool:
    return isinstance(w, Fp4Array) and nvfp4_parts(w) is not None


def _nvfp4(w: Any) -> Any:
    """A part of NVFP4 prepared, whose slabs are joined with others where global scales are not."""
    return prepare_fp4(w) if _is_nvfp4(w) else w


def _prepared(w: Any, form: ExpertForm) -> Any:
    if isinstance(w, PreparedFp4):
        return w
    return prepare_fp4(w) if isinstance(w, Fp4Array) else prepare_weight(w, scale_format=form.scale_format)
