"""The family of plans that score keys and choose the best of them."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family
from jax_deepgemm.ops.indexer.family import LogitsProblem
from jax_deepgemm.ops.topk.problem import TopkProblem

SCRATCH = 1 << 28
"""Bytes of scores that are in memory at once."""


@dataclass(frozen=True)
class IndexerTopkProblem:
    """The k best keys of every token.

    Attributes:
      tokens: rows of the result.
      keys: of the whole call.
      heads: of a token.
      depth: numbers of a head, and of a key.
      k: how many keys are chosen for each token.
      dtype: of keys and queries.
      by_index: whether they are in the order of their numbers, not the best first.
      scratch: bytes of scores that may be in memory at once.
    """

    tokens: int
    keys: int
    heads: int
    depth: int
    k: int
    dtype: str = "e4m3"
    by_index: bool = False
    scratch: int = SCRATCH

    def __str__(self) -> str:
        parts = [f"indexer_topk {self.k} of {self.dtype} {self.tokens}x{self.keys}"]
        parts += [f"h={self.heads} d={self.depth}"]
        return " ".join(parts + ["by index"] * self.by_index)

    @property
    def flops(self) -> int:
        """Of the scores."""
        return self.logits.flops

    @property
    def logits(self) -> LogitsProblem:
        """All scores of the call."""
        return self.logits_of(self.tokens)

    def logits_of(self, tokens: int) -> LogitsProblem:
        """The scores of some tokens."""
        return LogitsProblem(tokens, self.keys, self.keys, self.heads, self.depth, self.dtype)

    def topk_of(self, tokens: int) -> TopkProblem:
        """The choice from the scores of some tokens."""
        return TopkProblem(tokens, self.keys, self.k, windows=True, values=True, by_index=self.by_index)


FAMILY = Family("indexer_topk", IndexerTopkProblem, {"9.0a": "jax_deepgemm.ops.indexer_topk.sm90"})
