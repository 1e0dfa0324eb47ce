"""Scores that are filtered as they are made, as launches (include/jax_deepgemm/indexer/candidates.cuh and
indexer_topk/rows.cuh):

    sample      scores of one of 16 keys; topk finds a bound a little below each token's k-th best
    filter      all scores, of which those that are not below the bound are written, with their keys
    in order    candidates by ascending keys; tokens that have too few or too many are listed
    choice      topk among the candidates; their columns become keys
    the rest    rounds of listed tokens: all their scores, topk. A round without tokens ends at once

Everything is decided on the device, in a fixed row of launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jax_deepgemm.core.chain import Part, renamed
from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.core.family import Given, Operands
from jax_deepgemm.core.launch import Buffer, Launch, LaunchPlan, Memset, Operand, Result, Scalar, Scratch
from jax_deepgemm.core.plan import MAX_STEPS, Step
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.indexer import sm90 as indexer
from jax_deepgemm.ops.indexer.family import FAMILY as LOGITS
from jax_deepgemm.ops.indexer.family import IndexerConfig, LogitsProblem
from jax_deepgemm.ops.indexer_topk import rows
from jax_deepgemm.ops.indexer_topk.family import IndexerTopkProblem
from jax_deepgemm.ops.indexer_topk.filter import SEGMENTS, filter_of
from jax_deepgemm.ops.topk.family import FAMILY as TOPK
from jax_deepgemm.ops.topk.problem import TopkProblem, beyond

MOST_TOKENS_OF_A_BANK = 4
"""What a thread knows of their candidates is in registers."""
ALIGNED = 16
_PIECES = 3
_OF_TOKENS = ("q", "weights", "start", "end", "sample_start", "sample_end")
_OF_SAMPLE = {"k": "sample_k", "scales": "sample_scales", "start": "sample_start", "end": "sample_end"}

_SINKS = {
    "kWindows": ("", ""),
    "kCandidates": (
        ", const float* bounds, float* numbers, int* found, int* counts, int pitch, int places",
        ", {bounds, numbers, found, counts, pitch, places}",
    ),
}


def logits_source(p: LogitsProblem, c: IndexerConfig, sink: str) -> KernelSource:
    """The kernel of logits that writes to another sink."""
    plain = indexer.kernel_source(p, c)
    parameters, fields = _SINKS[sink]
    name = f"{plain.name}_{sink[1:].lower()}"
    variant = f"struct Variant : Config {{ static constexpr jdg::Sink SINK = jdg::Sink::{sink}; }};\n\n"
    changes = (
        ('extern "C"', variant + 'extern "C"'),
        (f" {plain.name}(", f" {name}("),
        (") {\n  jdg::logits<Config>", parameters + ") {\n  jdg::logits<Variant>"),
        ("});\n}", fields + "});\n}"),
    )
    text = plain.text
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return replace(plain, name=name, text=text)


@dataclass(frozen=True)
class Cut:
    """How tokens are divided.

    Attributes:
      tokens: of a part.
      listed: tokens of a round.
    """

    tokens: int
    listed: int

    def parts(self, tokens: int) -> Iterator[tuple[int, int]]:
        for first in range(0, tokens, self.tokens):
            yield first, min(self.tokens, tokens - first)

    def rounds(self, tokens: int) -> range:
        """The first of the listed tokens of each round, of so many tokens."""
        return range(0, tokens, self.listed)


def cut_of(p: IndexerTopkProblem) -> Cut:
    """As many tokens as have room for their candidates, and the scores of their sample.

    >>> cut_of(IndexerTopkProblem(8192, 65536, 64, 128, 2048, sampled=4096))
    Cut(tokens=8192, listed=1024)
    """

    def fitting(each: int) -> int:
        return min(max(p.scratch // each // ALIGNED * ALIGNED, ALIGNED), p.tokens)

    tokens = fitting(max(8 * filter_of(p.k).most, 4 * p.sampled))
    return Cut(tokens, min(fitting(4 * p.keys), tokens))


def refusal(p: IndexerTopkProblem) -> str:
    """Why a problem cannot be filtered."""
    cut, f = cut_of(p), filter_of(p.k)
    steps = sum(7 + 4 * len(cut.rounds(count)) for _, count in cut.parts(p.tokens))
    if steps > MAX_STEPS:
        return f"filtering takes {steps} launches, at most {MAX_STEPS}; give it more scratch_bytes"
    if cut.tokens * f.most > 2**31 - 1:
        return "there are more than 2^31 - 1 places for candidates; give it fewer scratch_bytes"
    if rows.shared_bytes(f.places, p.keys) > H200.smem_per_block:
        return f"{p.keys} keys are more than candidates can be put in order of"
    return beyond(cut.tokens, p.keys, p.k)


def config_of(c: IndexerConfig) -> IndexerConfig:
    """What scores are filtered with: eight warps, with registers for what they know of candidates. Bits of
    scores do not depend on how many tokens and keys are scored at a time."""
    return replace(c, tokens=min(c.tokens, MOST_TOKENS_OF_A_BANK), warpgroups=2)


# Buffers ---------------------------------------------------------------------------------------------------

_BIG, _BOUNDS, _RANKED, _COUNTS, _ENDS, _LIST = range(6)
_LISTED_Q, _LISTED_WEIGHTS, _LISTED_STARTS, _LISTED_ENDS, _LISTED_SCORES, _LISTED_KEYS = range(6, 12)


def _zeroed(tokens: int) -> tuple[int, int, int]:
    """Where counts end, where behind them, after how many tokens are listed, first columns of windows begin,
    and where those end."""
    counts = 4 * _PIECES * SEGMENTS * tokens
    return counts, counts + 16, counts + 16 + 4 * tokens


def _scratch(p: IndexerTopkProblem, cut: Cut, heads: int) -> list[int]:
    f, tokens, listed = filter_of(p.k), cut.tokens, cut.listed
    big = max(8 * f.most * tokens, 4 * p.sampled * tokens, 4 * p.keys * listed)
    of_tokens = [4 * f.rank * tokens] * 2 + [_zeroed(tokens)[2], 4 * tokens, 4 * tokens]
    of_listed = [p.heads * p.logits.row_bytes, 4 * heads, 4, 4, 4 * p.k, 4 * p.k]
    return [big, *of_tokens, *(size * listed for size in of_listed)]


# Launches --------------------------------------------------------------------------------------------------


class _Part:
    """The launches of some tokens."""

    def __init__(
        self,
        p: IndexerTopkProblem,
        c: IndexerConfig,
        chip: Chip,
        given: Operands,
        cut: Cut,
        first: int,
        count: int,
    ) -> None:
        self.p, self.c, self.chip, self.given = p, c, chip, given
        self.cut, self.first, self.count, self.filter = cut, first, count, filter_of(p.k)
        self.weights = given["weights"].shape[1]
        self.listed = Scratch(_LIST), Scratch(_COUNTS, _zeroed(count)[0])
        self.results = Result(0, 4 * p.k * first), Result(1, 4 * p.k * first)

    def steps(self) -> Iterator[Step]:
        yield Memset(Scratch(_COUNTS), _zeroed(self.count)[2])
        yield from self._bounds()
        yield self._filtered()
        yield self._in_order()
        yield from self._chosen()
        for first in self.cut.rounds(self.count):
            yield from self._round(first)

    def _at(self, name: str) -> Operand:
        row = {"q": self.p.heads * self.p.logits.row_bytes, "weights": 4 * self.weights}.get(name, 4)
        return Operand(self.given[name].index, self.first * row if name in _OF_TOKENS else 0)

    def _logits(self, count: int, names: dict[str, str]) -> tuple[Operands, tuple[Operand, ...]]:
        """Operands of a kernel of logits, part -> name here, and where they are."""
        shapes = {
            part: (count, *self.given[name].shape[1:]) if name in _OF_TOKENS else self.given[name].shape
            for part, name in names.items()
        }
        given = {part: Given(i, shape) for i, (part, shape) in enumerate(shapes.items())}
        return given, tuple(self._at(name) for name in names.values())

    def _names(self, of_sample: bool = False) -> dict[str, str]:
        plain = ("q", "k", "scales", "weights", "start", "end")
        return {part: _OF_SAMPLE.get(part, part) if of_sample else part for part in plain}

    def _topk(
        self, p: TopkProblem, x: Scratch, window: Sequence[Buffer], to: Sequence[Buffer]
    ) -> Iterator[Step]:
        shapes = {"x": (p.rows, p.columns), "start": (p.rows,), "end": (p.rows,)}
        given = {name: Given(i, shape) for i, (name, shape) in enumerate(shapes.items())}
        yield from renamed(Part(TOPK.plan(p, self.chip, given), (x, *window), tuple(to)))

    def _bounds(self) -> Iterator[Step]:
        p = replace(self.p, tokens=self.count, keys=self.p.sampled)
        given, at = self._logits(self.count, self._names(of_sample=True))
        yield from renamed(Part(LOGITS.plan(p.logits, self.chip, given), at, (Scratch(_BIG),)))
        window = self._at("sample_start"), self._at("sample_end")
        best = replace(p, k=self.filter.rank, by_index=False).topk_of(self.count)
        yield from self._topk(best, Scratch(_BIG), window, (Scratch(_BOUNDS), Scratch(_RANKED)))

    def _filtered(self) -> Launch:
        p, c, f = self.p.logits_of(self.count), config_of(self.c), self.filter
        given, at = self._logits(self.count, self._names())
        # Plain logits are launched alike; their result, which would be all scores, is not written here.
        [plain] = renamed(Part(LOGITS.plan(p, self.chip, given, c), at, (Scratch(_BIG),)))
        kernel = compile_kernel(logits_source(p, c, "kCandidates"), arch=self.chip.arch)
        sizes = (Scalar(f.rank, "int32"), Scalar(f.places, "int32"))
        more = (Scratch(_BOUNDS), Scratch(_BIG), self._keys(), Scratch(_COUNTS), *sizes)
        return replace(plain, kernel=kernel, params=(*plain.params, *more))

    def _keys(self) -> Scratch:
        return Scratch(_BIG, 4 * self.filter.most * self.count)

    def _in_order(self) -> Launch:
        f = self.filter
        pointers = (Scratch(_BOUNDS), Scratch(_BIG), self._keys(), Scratch(_COUNTS), Scratch(_ENDS))
        numbers = (f.rank, f.places, self.p.keys, self.p.k)
        shared = rows.shared_bytes(f.places, self.p.keys)
        return rows.launch("in_order", self.chip, self.count, (*pointers, *self.listed), numbers, shared)

    def _chosen(self) -> Iterator[Step]:
        p = replace(self.p, keys=self.filter.most).topk_of(self.count)
        window = Scratch(_COUNTS, _zeroed(self.count)[1]), Scratch(_ENDS)
        yield from self._topk(p, Scratch(_BIG), window, self.results)
        yield rows.launch(
            "keys_of", self.chip, self.count, (self._keys(), self.results[1]), (self.filter.most, self.p.k)
        )

    def _round(self, first: int) -> Iterator[Step]:
        p, count = self.p, self.cut.listed
        operands = tuple(self._at(name) for name in ("q", "weights", "start", "end"))
        listed = [Scratch(i) for i in (_LISTED_Q, _LISTED_WEIGHTS, _LISTED_STARTS, _LISTED_ENDS)]
        vectors = (p.heads * p.logits.row_bytes // 16, self.weights // 4)
        pointers: tuple[Buffer, ...] = (*operands, *listed, *self.listed)
        yield rows.launch("gathered", self.chip, count, pointers, (*vectors, first))
        q, weights, *window = listed
        given, _ = self._logits(count, self._names())
        at: tuple[Buffer, ...] = (q, self._at("k"), self._at("scales"), weights, *window)
        scored = p.logits_of(count)
        [plain] = renamed(Part(LOGITS.plan(scored, self.chip, given, self.c), at, (Scratch(_BIG),)))
        source = logits_source(scored, self.c, "kWindows")
        yield replace(plain, kernel=compile_kernel(source, arch=self.chip.arch))
        found = Scratch(_LISTED_SCORES), Scratch(_LISTED_KEYS)
        yield from self._topk(p.topk_of(count), Scratch(_BIG), window, found)
        pointers = (*found, *self.results, *self.listed)
        yield rows.launch("scattered", self.chip, count, pointers, (p.k, first))


def plan(p: IndexerTopkProblem, c: IndexerConfig, chip: Chip, given: Operands) -> LaunchPlan:
    """The launches of all parts."""
    cut = cut_of(p)
    steps = [
        step
        for first, count in cut.parts(p.tokens)
        for step in _Part(p, c, chip, given, cut, first, count).steps()
    ]
    return LaunchPlan(tuple(steps), tuple(_scratch(p, cut, given["weights"].shape[1])), str(p))


def sources(p: IndexerTopkProblem, c: IndexerConfig) -> list[KernelSource]:
    """Every kernel of the plan."""
    cut, f = cut_of(p), filter_of(p.k)
    found: list[KernelSource] = []
    for count in dict.fromkeys(count for _, count in cut.parts(p.tokens)):
        sample = replace(p, tokens=count, keys=p.sampled)
        found += LOGITS.sources(sample.logits, H200)
        found += TOPK.sources(replace(sample, k=f.rank, by_index=False).topk_of(count), H200)
        found.append(logits_source(p.logits_of(count), config_of(c), "kCandidates"))
        found += TOPK.sources(replace(p, keys=f.most).topk_of(count), H200)
    found.append(logits_source(p.logits_of(cut.listed), c, "kWindows"))
    found += TOPK.sources(p.topk_of(cut.listed), H200)
    found.append(rows.source("in_order", rows.shared_bytes(f.places, p.keys)))
    found += [rows.source(which) for which in ("keys_of", "gathered", "scattered")]
    return found
