"""The family of kernels that score keys for tokens."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.core.family import Family

MOST_HEADS = 128
DEPTHS = (32, 64, 128)
"""Sizes of d that the kernels take."""
LARGEST = 2**31 - 256
"""Tokens, keys, and columns of a row: they, and the last tile's end, are counted in int32. Elements of the
result are not."""


@dataclass(frozen=True)
class LogitsProblem:
    """Logits of every token for the keys of its window.

    Attributes:
      tokens: rows of the result, those of a whole batch.
      keys: of a whole batch, if each of it has its own.
      columns: of the result.
      heads: of a token.
      depth: numbers of a head, and of a key.
      dtype: of them, "e4m3" (keys then have scales) or "bf16".
      out: dtype of the result, "float32" or "bfloat16".
      compressed: whether a row's first column is the first key of its window.
      batches: of vmap, or requests.
      page: keys of a page; 0: keys lie one behind the other. Those of each request are as many as its table
        has.
      pages: of the cache.
      joined: whether a page's scales lie behind its values.
      packed: whether keys are FP4, two numbers in a byte, with a word of scales each; q is e4m3.
      of_tokens: whether requests have any number of tokens, each of which says whose it is.
    """

    tokens: int
    keys: int
    columns: int
    heads: int
    depth: int
    dtype: str = "e4m3"
    out: str = "float32"
    compressed: bool = False
    batches: int = 1
    page: int = 0
    pages: int = 0
    joined: bool = False
    packed: bool = False
    of_tokens: bool = False

    def __str__(self) -> str:
        keys = f"of {self.keys} {'FP4 ' if self.packed else ''}keys"
        parts = ["mqa_logits", self.dtype, f"{self.tokens}x{self.columns}", keys]
        parts += [f"h={self.heads}", f"d={self.depth}"]
        parts += [self.out] if self.out != "float32" else []
        if self.page:
            parts += [f"{self.pages} {'joined ' if self.joined else ''}pages of {self.page}"]
        else:
            parts += ["compressed"] if self.compressed else []
        parts += [f"batches={self.batches}"] if self.batches > 1 else []
        return " ".join(parts + ["of tokens"] * self.of_tokens)

    @property
    def flops(self) -> int:
        """Of products of all queries with all keys that could be in a window."""
        return 2 * self.tokens * self.columns * self.heads * self.depth

    @property
    def is_fp8(self) -> bool:
        return self.dtype == "e4m3"

    @property
    def out_bytes(self) -> int:
        return 4 if self.out == "float32" else 2

    @property
    def row_bytes(self) -> int:
        """Of a key, or of one head of a token, as they are multiplied."""
        return self.depth * (1 if self.is_fp8 else 2)

    @property
    def key_bytes(self) -> int:
        """Of a key in memory, without its scales."""
        return self.depth // 2 if self.packed else self.row_bytes


@dataclass(frozen=True)
class IndexerConfig:
    """How logits are computed on a GPU; what `config=` of `mqa_logits` takes.

    >>> print(IndexerConfig(tokens=2, stages=8))
    2 x 2 tokens x 192 keys stages=8/2

    Raises nothing; a call says which rules a configuration breaks.

    Attributes:
      tokens: of a bank, which is multiplied by one instruction.
      stages: slots of a tile of keys each; of keys in FP4, before they are expanded.
      query_stages: slots of a block's tokens each.
      tensor_sums: whether tensor cores sum over heads (a multiple of 16), from products of q and k that are
        rounded to bfloat16: their relative error is 2**-9, that of the sum less. Otherwise sums are float32.
      linear: whether sum_h w x, half of the sum of w (x + abs(x)), is one product of FP8 digits of
        sum_h w q. Errors then are those of sum_h abs(w x), also where most x are negative.
      banks: of tokens, 1 or 2: what a block of threads has at a time.
      warpgroups: 2 or 3, each with 64 keys of a tile; 2 of keys in FP4.
    """

    tokens: int
    stages: int
    query_stages: int = 2
    tensor_sums: bool = False
    linear: bool = False
    banks: int = 2
    warpgroups: int = 3

    def __str__(self) -> str:
        sums = " tensor sums" * self.tensor_sums + " linear columns" * self.linear
        tokens = f"{self.banks} x {self.tokens} tokens x {64 * self.warpgroups} keys"
        return f"{tokens} stages={self.stages}/{self.query_stages}{sums}"


FAMILY = Family("indexer", LogitsProblem, {"9.0a": "jax_deepgemm.ops.indexer.sm90"})
