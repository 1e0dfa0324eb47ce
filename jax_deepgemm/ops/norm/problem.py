"""What a kernel that normalises rows is to compute."""

from __future__ import annotations

from dataclasses import dataclass, fields

DTYPES = ("bfloat16", "float16", "float32")
SCALE_FORMATS = ("f32", "ue8m0")
MOST_FEATURES = 16_384
"""Numbers of a row that the kernel holds in registers."""
TILE = 128
"""Neighbours in a row that share a scale."""


@dataclass(frozen=True)
class NormForm:
    """What of a norm is static, but for eps.

    Attributes:
      kind: "layer" or "rms".
      residual, bias, gamma, beta: whether there is one.
      normed: whether the norm is a result.
      scales: of the norm in FP8, "f32" or "ue8m0"; "": it is no result.
      summed: whether x + residual + bias is a result.
    """

    kind: str
    residual: bool = False
    bias: bool = False
    gamma: bool = False
    beta: bool = False
    normed: bool = True
    scales: str = ""
    summed: bool = False

    def __str__(self) -> str:
        named = [one.name for one in fields(self)[1:] if getattr(self, one.name) is True]
        return "_".join([self.kind, *named, *([self.scales] if self.scales else [])])


@dataclass(frozen=True)
class NormProblem:
    """Norms of rows.

    Attributes:
      rows, cols: of x.
      form: what is given and what is wanted.
      eps: added to the variance, or the mean of squares.
      dtype: of x.
      vectors: of bias, gamma and beta; that of x where there are none.
    """

    rows: int
    cols: int
    form: NormForm
    eps: float = 1e-5
    dtype: str = "bfloat16"
    vectors: str = "bfloat16"

    def __str__(self) -> str:
        parts = [f"norm {self.rows}x{self.cols} {self.dtype}", str(self.form).replace("_", " ")]
        parts += [f"vectors {self.vectors}"] * (self.vectors != self.dtype)
        return ", ".join([*parts, f"eps {self.eps:g}"])

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0
