"""How the experts of a model are built: what differs between models beside the sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jax_deepgemm.ops.grouped import linear
from jax_deepgemm.ops.quantize import PreparedFp4
from jax_deepgemm.ops.quantize.activation import SILU, Activation, as_activation


@dataclass(frozen=True)
class ExpertForm:
    """How experts compute, for the functions of this module that run them (`form=`).

        y = (f(gate) * up) @ w2.T * weight,   gate | up = x @ w13.T

    Models: Qwen3, Kimi, DeepSeek-V3: ``ExpertForm()``. gpt-oss: ``ExpertForm(GPT_OSS, "kn")`` of
    `jax_deepgemm.activation`. Llama 4: ``ExpertForm(weights_first=True)``. Gemma 4: ``ExpertForm("gelu")``.
    Nemotron 3: ``ExpertForm("relu2")``. DeepSeek-V4: ``ExpertForm(Activation(limit=..))``, with the
    `swiglu_limit` of its configuration.

    Attributes:
      activation: "silu", "gelu", "relu2" (then w13 has one half only, [e, i, h]), or a
        `jax_deepgemm.activation.Activation`: its clips, and whether gate and up take turns in w13
        (`interleaved`, rows 0::2 and 1::2).
      weight_layout: "nk": w13 [e, 2 * i, h], w2 [e, h, i]. "kn": w13 [e, h, 2 * i], w2 [e, i, h]; gradients
        have the same layout, and no weight is transposed.
      weights_first: the routing weight multiplies a token's copy before the first product instead of what
        the second one reads.
      scale_format: of everything that is quantised: "f32", or "ue8m0" for powers of two.
      weight_gradient: elements that share a scale, where a weight's gradient is computed, in what the weight
        multiplies: "1x128", the recipe of DeepSeek-V3, or "128x128", 128 rows of 128 features, which is
        faster (docs/fp8.md says what it costs). With weight_layout "kn" that is said of the results'
        gradients.

    Raises nothing; the functions raise ValueError for values there are not.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm.activation import GPT_OSS
    >>> from jax_deepgemm.moe import ExpertForm, moe_mlp, route
    >>> x = jax.random.normal(jax.random.key(0), (6, 256), jnp.bfloat16)
    >>> ids, weights = route(jax.random.normal(jax.random.key(1), (6, 4)), 2)
    >>> w13 = jax.random.normal(jax.random.key(2), (4, 256, 2 * 128)) / 16
    >>> w2 = jax.random.normal(jax.random.key(3), (4, 128, 256)) / 16
    >>> moe_mlp(x, ids, weights, w13, w2, form=ExpertForm(GPT_OSS, "kn")).shape
    (6, 256)
    """

    activation: str | Activation = SILU
    weight_layout: str = "nk"
    weights_first: bool = False
    scale_format: str = "f32"
    weight_gradient: str = "1x128"

    def checked(self, where: str, **weights: Any) -> ExpertForm:
        """Itself, its activation by value, if it has what there is and the weights fit it."""
        linear.check_form(where, self.weight_layout, self.scale_format, self.weight_gradient, **weights)
        activation, first = as_activation(where, self.activation), bool(self.weights_first)
        return dataclasses.replace(self, activation=activation, weights_first=first)

    @property
    def act(self) -> Activation:
        """The activation by value, also where it was given by name."""
        return as_activation("ExpertForm", self.activation)

    @property
    def fuses(self) -> bool:
        """Whether the first GEMM can give the quantised activation itself (ops/grouped/gated.py)."""
        return self.act == SILU and self.scale_format == "f32"

    def sizes(self, w13: Any, w2: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(experts, rows of the product, features it sums over) of w13 and of w2. An FP4 weight may have
        zeros behind its features: they are those that the other weight makes."""
        shapes = tuple(w13.shape), tuple(w2.shape)
        if self.weight_layout == "nk":
            (e, n, h), (d, m, i) = shapes
            h = m if isinstance(w13, PreparedFp4) and linear.covers(w13, "nk", m) else h
            inner = n // self.act.halves
            i = inner if isinstance(w2, PreparedFp4) and linear.covers(w2, "nk", inner) else i
            return (e, n, h), (d, m, i)
        (e, h, n), (d, i, m) = shapes
        return (e, n, h), (d, m, i)


PLAIN = ExpertForm()
"""SwiGLU of gate | up."""
