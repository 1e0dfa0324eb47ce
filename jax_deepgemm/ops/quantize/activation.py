"""What becomes of h, the first GEMM's result, before the second: the function, its clips, and where gate and
up are in h."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

GATES = ("silu", "gelu", "relu2")


class Activation(NamedTuple):
    """act = f(gate) * (up + shift) of h = gate | up, or f(h) without a gate.

        silu   f(x) = x * sigmoid(alpha * x)
        gelu   f(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
        relu2  f(x) = max(x, 0)^2, no gate: h has one half only

    With a limit gate counts as min(gate, limit), and up as min(max(up, -limit), limit); what was clipped has
    gradient zero.

    Attributes:
      function: "silu", "gelu" or "relu2".
      limit: of gate and up; None: neither is clipped.
      alpha: factor inside silu's sigmoid.
      shift: added to up after clipping.
      interleaved: gate is h[.., 0::2] and up h[.., 1::2]; False: gate is the first half of h, up the second.

    Raises:
      Nothing; functions that take one raise ValueError for another function, a limit that is not positive,
      or an option that "gelu" or "relu2" has not.

    >>> import jax.numpy as jnp
    >>> from jax_deepgemm.activation import GPT_OSS, Activation, swiglu
    >>> GPT_OSS == Activation(limit=7.0, alpha=1.702, shift=1.0, interleaved=True)
    True
    >>> swiglu(jnp.array([3.0, -1.0, 2.0]), activation=Activation("relu2")).tolist()
    [9.0, 0.0, 4.0]
    """

    function: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    shift: float = 0.0
    interleaved: bool = False

    @property
    def gated(self) -> bool:
        """Whether h has an up beside the gate."""
        return self.function != "relu2"

    @property
    def halves(self) -> int:
        """Columns of h for each of act."""
        return 2 if self.gated else 1

    @property
    def tag(self) -> str:
        """For names of ops and kernels; silu's is empty."""
        numbers = {"clip": self.limit or 0.0, "alpha": self.alpha - 1 and self.alpha, "plus": self.shift}
        parts = [self.function] if self.function != "silu" else []
        parts += [f"{name}{value:g}" for name, value in numbers.items() if value]
        parts += ["interleaved"] if self.interleaved else []
        return "_".join(parts).replace(".", "p").replace("-", "m").replace("+", "")


SILU = Activation()
GPT_OSS = Activation(limit=7.0, alpha=1.702, shift=1.0, interleaved=True)
"""(up + 1) * gate * sigmoid(1.702 * gate), gate at most 7 and up within +-7, from columns 0::2 and 1::2."""


def as_activation(where: str, given: Any) -> Activation:
    """The activation of a name or of itself, checked."""
    activation = Activation(given) if isinstance(given, str) else given
    if not isinstance(activation, Activation) or activation.function not in GATES:
        name = repr(activation.function) if isinstance(activation, Activation) else repr(given)
        raise ValueError(
            f"{where}: activation is {name}, need 'silu', 'gelu', 'relu2', or a "
            "jax_deepgemm.activation.Activation of one of them."
        )
    function, limit, alpha, shift, interleaved = activation
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"{where}: activation has limit {limit}, need a positive number, or None for none.")
    if function != "silu" and alpha != 1:
        raise ValueError(
            f"{where}: activation {function!r} has alpha {alpha}, which only 'silu' has: need 1."
        )
    if not activation.gated and (limit is not None or shift or interleaved):
        raise ValueError(
            f"{where}: activation {function!r} has no gate beside what it is of, so limit, shift and "
            "interleaved mean nothing: leave them out."
        )
    limit = None if limit is None else float(limit)
    return Activation(function, limit, float(alpha), float(shift), bool(interleaved))
