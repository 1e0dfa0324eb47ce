"""The choice of keys on Hopper, as launches of the kernels of ops/indexer and ops/topk.

In parts: tokens by tokens, scores of some go to scratch memory, and the choice reads them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax_deepgemm.core.chain import Part, renamed
from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Given, Kernels, Operands
from jax_deepgemm.core.launch import LaunchPlan, Operand, Result, Scratch
from jax_deepgemm.core.plan import Step
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.indexer import sm90 as indexer
from jax_deepgemm.ops.indexer.family import FAMILY as LOGITS
from jax_deepgemm.ops.indexer.family import IndexerConfig
from jax_deepgemm.ops.indexer_topk.family import IndexerTopkProblem
from jax_deepgemm.ops.topk.family import FAMILY as TOPK
from jax_deepgemm.ops.topk.problem import beyond

MOST_PARTS = 120
"""Of a plan, which has 256 steps at most."""
_ALIGNED = 16
"""Tokens: parts are whole blocks of them for every configuration of the logits."""
_OF_TOKENS = ("q", "weights", "start", "end")


def part_tokens(p: IndexerTopkProblem) -> int:
    """Tokens of a part: as many as have room for their scores.

    >>> part_tokens(IndexerTopkProblem(8192, 65536, 64, 128, 2048))
    1024
    """
    fitting = max(p.scratch // (4 * p.keys) // _ALIGNED * _ALIGNED, _ALIGNED)
    fewest = -(-p.tokens // MOST_PARTS)
    return min(max(fitting, -(-fewest // _ALIGNED) * _ALIGNED), p.tokens)


def ranges(p: IndexerTopkProblem) -> Iterator[tuple[int, int]]:
    """First token and number of tokens of each part."""
    each = part_tokens(p)
    for first in range(0, p.tokens, each):
        yield first, min(each, p.tokens - first)


def _row_bytes(p: IndexerTopkProblem, given: Operands, name: str) -> int:
    """Of a token, in an operand."""
    return p.heads * p.logits.row_bytes if name == "q" else 4 * (*given[name].shape, 1)[1]


def tokens_of(p: IndexerTopkProblem, given: Operands, first: int, count: int) -> dict[str, Given]:
    """The operands of some tokens, as the logits' kernel is given them."""
    return {
        name: Given(i, (count, *one.shape[1:]) if name in _OF_TOKENS else one.shape)
        for i, (name, one) in enumerate(given.items())
    }


def places(p: IndexerTopkProblem, given: Operands, first: int) -> tuple[Operand, ...]:
    """Where those operands are in the call's."""
    return tuple(
        Operand(one.index, first * _row_bytes(p, given, name) if name in _OF_TOKENS else 0)
        for name, one in given.items()
    )


def _in_parts(p: IndexerTopkProblem, c: IndexerConfig, chip: Chip, given: Operands) -> Iterator[Step]:
    for first, count in ranges(p):
        operands, at = tokens_of(p, given, first, count), dict(zip(given, places(p, given, first)))
        scored = LOGITS.plan(p.logits_of(count), chip, operands, c)
        yield from renamed(Part(scored, tuple(at.values()), (Scratch(0),)))
        rows = {
            "x": Given(0, (count, p.keys)),
            "start": Given(1, (count,)),
            "end": Given(2, (count,)),
        }
        chosen = TOPK.plan(p.topk_of(count), chip, rows)
        results = tuple(Result(i, 4 * p.k * first) for i in range(2))
        yield from renamed(Part(chosen, (Scratch(0), at["start"], at["end"]), results))


def _plan(p: IndexerTopkProblem, c: IndexerConfig, chip: Chip, given: Operands) -> LaunchPlan:
    scores = 4 * p.keys * part_tokens(p)
    return LaunchPlan(tuple(_in_parts(p, c, chip, given)), (scores,), str(p))


def _sources(p: IndexerTopkProblem, c: IndexerConfig) -> Sequence[KernelSource]:
    found = []
    for count in dict.fromkeys(count for _, count in ranges(p)):
        found += [indexer.kernel_source(p.logits_of(count), c), *TOPK.sources(p.topk_of(count), H200)]
    return list({source.name: source for source in found}.values())


def _refusal(p: IndexerTopkProblem) -> str:
    return indexer.refusal(p.logits) or beyond(part_tokens(p), p.keys, p.k)


KERNELS = Kernels[IndexerTopkProblem, IndexerConfig](
    config=IndexerConfig,
    candidates=lambda p, chip: [LOGITS.choose(p.logits, chip).config],
    cost=lambda p, c, chip: indexer.cost(p.logits, c, chip),
    broken_rules=lambda p, c, chip: indexer.problems_with(p.logits, c),
    refusal=_refusal,
    shared_bytes=lambda p, c: indexer.shared_memory(p.logits, c),
    sources=_sources,
    plan=_plan,
)
