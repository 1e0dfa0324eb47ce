"""What the attention kernels compute: sizes, types and flags of one call."""

from __future__ import annotations

from dataclasses import dataclass

PAGES = (16, 32, 64, 128, 256)
"""Keys of a page, as kernels take them."""
MOST_DEPTH = 256
ROWS = 16
"""Packed rows (token x head of a group) of a unit of work."""
MOST_SEQUENCES = 8192
_BYTES = {"bf16": 2, "f16": 2, "e4m3": 1}


@dataclass(frozen=True)
class AttentionProblem:
    """Attention of packed queries over a paged cache.

    Attributes:
      tokens: rows of q, of all sequences.
      seqs: sequences that the tables have.
      table_pages: pages of a row of the tables.
      pages, page: of the pool (of a layer), and the keys of each.
      layers: pools, one behind the other.
      heads, kv_heads: of queries, and of keys and values.
      depth, v_depth: numbers of a key and of a value.
      q_dtype: "bf16" or "f16", also of the result.
      kv_dtype: "bf16", "f16" or "e4m3".
      window: keys that a query sees, or 0 for all.
      softcap: bound of scores, or 0.0.
      causal: whether a query sees its own and earlier positions only.
      with_sinks, with_slopes: whether heads have a sink, and a slope (ALiBi).
      max_q_len: promised rows of a sequence, or 0.
      split: keys of a part, or 0 for a balanced cut.
      scale: of scores.
    """

    tokens: int
    seqs: int
    table_pages: int
    pages: int
    page: int
    layers: int
    heads: int
    kv_heads: int
    depth: int
    v_depth: int
    q_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    with_sinks: bool = False
    with_slopes: bool = False
    max_q_len: int = 0
    split: int = 0
    scale: float = 1.0

    def __str__(self) -> str:
        depth = f"d={self.depth}" + (f"/{self.v_depth}" if self.v_depth != self.depth else "")
        pages = f"{self.seqs} x {self.table_pages} pages of {self.page}"
        parts = [f"attention {self.kv_dtype}", f"{self.tokens} tokens", pages]
        parts += [f"h={self.heads}/{self.kv_heads}", depth]
        parts += [f"q <= {self.max_q_len}"] if self.max_q_len else []
        parts += [f"window={self.window}"] if self.window else []
        parts += [f"split={self.split}"] if self.split else []
        flags = {"full": not self.causal, "softcap": self.softcap > 0}
        flags |= {"sinks": self.with_sinks, "alibi": self.with_slopes}
        return " ".join([*parts, *(name for name, on in flags.items() if on)])

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads

    @property
    def most_rows(self) -> int:
        """Tokens of a sequence at most."""
        return min(self.tokens, self.max_q_len) if self.max_q_len else self.tokens

    @property
    def keys(self) -> int:
        """Of a sequence, at most."""
        return self.table_pages * self.page

    @property
    def flops(self) -> int:
        """Of products of all queries with as many keys as a table has."""
        return 2 * self.tokens * self.heads * self.keys * (self.depth + self.v_depth)

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values that the tables can name, read once."""
        element = _BYTES[self.kv_dtype]
        return self.seqs * self.keys * self.kv_heads * (self.depth + self.v_depth) * element
