"""What the kernels of latent attention compute: sizes, types and flags of one call."""

from __future__ import annotations

from dataclasses import dataclass

PAGES = (16, 32, 64, 128, 256)
"""Keys of a page, as kernels take them."""
MOST_DEPTH, MOST_V_DEPTH = 576, 512
ROWS = 64
"""Rows (token x head) of a block of threads."""
MOST_SEQUENCES = 512


@dataclass(frozen=True)
class MlaProblem:
    """Attention of heads that share their keys.

    Attributes:
      tokens: rows of q, of all sequences.
      heads: of each.
      seqs, columns: of the tables: sequences, and pages of each; sparse: tokens, and slots of each.
      pages, page: of the cache (of a layer), and the keys of each.
      layers: caches, one behind the other.
      depth, v_depth: numbers of a key, and how many of them are the value.
      dtype: "bf16" or "f16".
      causal: whether a token sees its own and earlier positions only.
      sparse: whether tokens name their keys.
      max_q_len: promised tokens of a sequence, or 0.
      split: keys of a part, or 0 for a balanced cut.
      scale: of scores.
    """

    tokens: int
    heads: int
    seqs: int
    columns: int
    pages: int
    page: int
    layers: int = 1
    depth: int = 576
    v_depth: int = 512
    dtype: str = "bf16"
    causal: bool = True
    sparse: bool = False
    max_q_len: int = 0
    split: int = 0
    scale: float = 1.0

    def __str__(self) -> str:
        keys = f"{self.columns} keys each" if self.sparse else f"{self.seqs} x {self.columns} pages"
        parts = [f"{'sparse ' * self.sparse}mla {self.dtype} {self.tokens} tokens", keys, f"of {self.page}"]
        parts += [f"h={self.heads} d={self.depth}/{self.v_depth}"]
        parts += [f"q <= {self.max_q_len}"] if self.max_q_len else []
        parts += [f"split={self.split}"] if self.split else []
        return " ".join([*parts, *["full"] * (not self.causal and not self.sparse)])

    @property
    def most_rows(self) -> int:
        """Tokens of a sequence at most."""
        if self.sparse:
            return 1
        return min(self.tokens, self.max_q_len) if self.max_q_len else self.tokens

    @property
    def keys(self) -> int:
        """Of a sequence, at most."""
        return self.columns if self.sparse else self.columns * self.page

    @property
    def flops(self) -> int:
        """Of products of all queries with as many keys as a table has."""
        return 2 * self.tokens * self.heads * self.keys * (self.depth + self.v_depth)

    @property
    def kv_bytes(self) -> int:
        """Of all keys that the tables can name, read once."""
        return self.seqs * self.keys * self.depth * 2
