"""The family of chains that compute a layer of experts in FP8."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family


@dataclass(frozen=True)
class ExpertsProblem:
    """A layer of experts: y[t] = sum over slots of weight * (SwiGLU(x[t] w13.T) w2.T).

    Attributes:
      tokens, slots: of the ids; slots are the experts of a token.
      hidden, inner: features of x, and of the activation.
      experts: all of which are here.
      expected: rows of an expert that the products are chosen for.
      w13, w2: FP8 types of the weights.
      x: dtype of x and y.
    """

    tokens: int
    slots: int
    hidden: int
    inner: int
    experts: int
    expected: int
    w13: str = "e4m3"
    w2: str = "e4m3"
    x: str = "bfloat16"

    @property
    def copies(self) -> int:
        """Rows of the products."""
        return self.tokens * self.slots

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products if no copy is dropped."""
        return 2 * self.copies * 3 * self.inner * self.hidden

    def __str__(self) -> str:
        sizes = f"tokens={self.tokens} top_k={self.slots} hidden={self.hidden} inner={self.inner}"
        return (
            f"experts {sizes} experts={self.experts} expected={self.expected} {self.w13} {self.w2} {self.x}"
        )


FAMILY = Family("experts", ExpertsProblem, {"9.0a": "jax_deepgemm.ops.experts.sm90"})
