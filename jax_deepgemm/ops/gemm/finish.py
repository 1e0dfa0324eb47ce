"""What a product becomes before it is stored, as data: flags of problems, static parameters of ops."""

from __future__ import annotations

from typing import NamedTuple

from jax_deepgemm.ops.quantize.activation import Activation


class Heads(NamedTuple):
    """Columns of a head before, in and behind its hole (`fp8_gemm_nt_skip_head_mid`).

    >>> Heads(128, 64, 128).width(512)
    640
    """

    left: int
    mid: int
    right: int

    @property
    def taken(self) -> int:
        """Columns of the product in a head."""
        return self.left + self.right

    def width(self, n: int) -> int:
        """Columns of D of a product of n."""
        return n + n // self.taken * self.mid


class Finish(NamedTuple):
    """D = activation(alpha * sum + bias) + C, with holes between its columns, perhaps.

    Attributes:
      alpha, bias: whether there is one.
      activation: what follows; None: nothing.
      each: of every number, instead of gate and up.
      heads: where D has holes.
      fill: whether the holes become zeros; they keep what D's memory holds otherwise.
      quantized: whether D is float8_e4m3fn, with a scale for each row and 128 columns.
    """

    alpha: bool = False
    bias: bool = False
    activation: Activation | None = None
    each: bool = False
    heads: Heads | None = None
    fill: bool = False
    quantized: bool = False

    @property
    def halves(self) -> int:
        """Columns of the product for each of D."""
        return 2 if self.activation is not None and not self.each else 1

    @property
    def apart(self) -> bool:
        """Whether gate and up are halves of the product's columns."""
        return self.activation is not None and not self.each and not self.activation.interleaved

    @property
    def changes(self) -> bool:
        """Whether numbers become others."""
        return self.alpha or self.bias or self.quantized or self.activation is not None

    def width(self, n: int) -> int:
        """Columns of D of a product of n."""
        return self.heads.width(n) if self.heads is not None else n // self.halves

    def taken(self, columns: int) -> int:
        """Columns of a product whose D has so many."""
        if self.heads is not None:
            return columns // sum(self.heads) * self.heads.taken
        return columns * self.halves

    @property
    def words(self) -> tuple[str, ...]:
        """For names of kernels and for people."""
        said = [name for name in ("alpha", "bias") if getattr(self, name)]
        if self.activation is not None:
            tag = self.activation.tag or "silu"
            said.append(tag if self.each else f"gated_{tag}")
        if self.heads is not None:
            said.append(f"heads{'_'.join(map(str, self.heads))}")
            said += ["zeros"] if self.fill else []
        return (*said, "quantized") if self.quantized else tuple(said)


AS_IT_IS = Finish()
