"""What the attention kernels compute: sizes, types and flags of one launch."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads
