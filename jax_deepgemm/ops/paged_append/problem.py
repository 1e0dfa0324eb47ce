"""What a kernel that appends to a cache is to compute."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AppendProblem:
    """Tokens into pages.

    Attributes:
      tokens, kv_heads: of k and v.
      head_dim, v_head_dim: numbers of a key and of a value.
      layers, pages, page: of the cache, and slots of a page.
      dtype, stored: of tokens, and of the cache.
      pairs: of numbers that turn; 0: none.
      interleaved: pairs are neighbours.
      heads: of queries, which turn, too; 0: there are none.
    """

    tokens: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    layers: int
    pages: int
    page: int
    dtype: str = "bfloat16"
    stored: str = "bfloat16"
    pairs: int = 0
    interleaved: bool = False
    heads: int = 0

    def __str__(self) -> str:
        depth = f"{self.head_dim}" + f"+{self.v_head_dim}" * (self.v_head_dim != self.head_dim)
        turned = f"{self.pairs} {'interleaved ' * self.interleaved}pairs turned"
        parts = [f"append {self.tokens}x{self.kv_heads}x{depth} {self.dtype}", f"to {self.stored}"]
        parts += [f"{self.layers}x{self.pages} pages of {self.page}"] + [turned] * (self.pairs > 0)
        return ", ".join([*parts, *[f"{self.heads} heads of queries"] * (self.heads > 0)])

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0
