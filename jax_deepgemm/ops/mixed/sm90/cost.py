"""What a configuration costs on a problem, in microseconds, and which ones are worth comparing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.gemm.problem import ceil_div
from jax_deepgemm.ops.mixed.problem import MixedProblem
from jax_deepgemm.ops.mixed.sm90.config import (
    MixedConfig,
    broken_rules,
    height,
    shared_memory,
)

_RESERVED_BYTES = 1024  # what the system takes of an SM's shared memory for each resident block
_MAX_STAGES = 24
_TOKENS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160)
_WARPS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))  # across, deep
_SLABS_WARPS = (*_WARPS, (4, 1))  # boxes are twice as large, and leave few slots then
STAGED = MixedConfig(tokens=256, across=2, deep=1, stages=0, staged=True)
_FEW_TOKENS = 32  # up to which no staged tile is worth looking at
_SPREAD = tuple(0.7 + 0.05 * i for i in range(13))  # of group sizes around the expected one


class _Model(NamedTuple):
    """Microseconds and bytes per microsecond, fitted to sweeps on an H200."""

    start: float
    alone: tuple[float, float]  # a block of k in one warpgroup by itself: fixed, a token
    shared: tuple[float, float]  # what a warpgroup takes of an SM for it: fixed, a token
    end: tuple[float, float]  # of a tile: fixed, a token
    gather: float  # sums of warpgroups, a token
    cluster: tuple[float, float]  # sums of another block: fixed, a token
    second: float  # that there is another block on an SM
    memory: float
    feed: float  # into one SM, weights and tokens
    overlap: float  # of the smaller one of compute and memory


_SLABS = _Model(
    start=3.465,
    alone=(0.1673, 0.000338),
    shared=(0.0977, 0.00127),
    end=(0.659, 0.0148),
    gather=0.0006,
    cluster=(0.5, 0.0112),
    second=0.613,
    memory=3.376e6,
    feed=7.39e4,
    overlap=0.093,
)
_BOXES = _Model(
    start=2.35,
    alone=(0.2084, 0.00117),
    shared=(0.1756, 0.000958),
    end=(0.811, 0.0377),
    gather=0.0025,
    cluster=(0.5, 0.024),
    second=1.52,
    memory=5.23e6,
    feed=1.39e5,
    overlap=0.317,
)


class _StagedModel(NamedTuple):
    """Microseconds, as above."""

    start: float = 4.0
    block: tuple[float, float] = (0.4, 0.13)  # of k of a tile: fixed, a part of 64 tokens
    end: float = 2.5


_STAGED = _StagedModel()


@dataclass(frozen=True)
class MixedCost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launch, first bytes, last stores, and what of computing and reading does not overlap.
      compute: of all waves of tiles.
      memory: reading the weights from memory, or all that tiles need through L2.
    """

    start: float
    compute: float
    memory: float

    @property
    def total(self) -> float:
        return self.start + max(self.compute, self.memory)

    def __str__(self) -> str:
        terms = ("start", "compute", "memory")
        return f"{self.total:.1f} us (" + ", ".join(f"{x} {getattr(self, x):.1f}" for x in terms) + ")"


def _tall(tiles: list[int]) -> float:
    """Tiles above each other that a group counts for: between the mean and the most, as a group that needs
    one more than others keeps some SMs for longer."""
    return 0.75 * sum(tiles) / len(tiles) + 0.25 * max(tiles)


def _sizes(p: MixedProblem) -> list[int]:
    """Tokens of a group, as they may be drawn."""
    return [p.tokens] if p.dense else [max(1, round(p.tokens * factor)) for factor in _SPREAD]


def _staged_cost(p: MixedProblem, c: MixedConfig, chip: Chip) -> MixedCost:
    """Tiles cost what their parts of tokens do; some SMs have a costly one more."""
    heights = [min(c.tokens, size - first) for size in _sizes(p) for first in range(0, size, c.tokens)]
    across, each = ceil_div(p.n, height(p, c)), p.hit / len(_sizes(p))
    block, part = _STAGED.block
    costs = [p.k_blocks * (block + part * ceil_div(rows, 64)) + _STAGED.end for rows in heights]
    tiles = len(heights) * each * across
    waves = tiles / chip.num_sms
    mean = sum(costs) / len(costs)
    compute = max(costs) * math.ceil(waves) if waves <= 4 else mean * waves + max(costs) / 2
    reads = p.weight_bytes / _SLABS.memory
    return MixedCost(_STAGED.start + _SLABS.overlap * min(compute, reads), compute, reads)


def cost(p: MixedProblem, c: MixedConfig, chip: Chip, model_of: _Model | None = None) -> MixedCost:
    """What a configuration costs on a problem: the share of an SM that its warpgroups need, or how long one
    of them takes for a block of k by itself."""
    if c.staged:
        return _staged_cost(p, c, chip)
    model = model_of or (_SLABS if p.in_slabs else _BOXES)
    sizes = _sizes(p)
    tall = _tall([ceil_div(size, c.tokens) for size in sizes])
    tiles = p.hit * tall * ceil_div(p.n, height(p, c))
    resident = max(1, chip.num_sms * c.blocks_per_sm // c.split_k)
    waves = tiles / resident if tiles > 4 * resident else math.ceil(tiles / resident)
    beside = max(1.0, c.blocks_per_sm * min(1.0, tiles / resident)) * c.warpgroups

    def line(terms: tuple[float, float]) -> float:
        return terms[0] + terms[1] * c.tokens

    blocks = ceil_div(ceil_div(p.k_blocks, c.split_k), c.deep)
    end = line(model.end) + model.gather * c.tokens * (c.deep > 1) + line(model.cluster) * (c.split_k - 1)
    compute = waves * (blocks * max(line(model.alone), beside * line(model.shared)) + end)
    reads = tiles * p.k_blocks * (c.tokens * p.token_bytes + c.across * p.part_bytes)
    sms = min(1.0, tiles * c.split_k / chip.num_sms) * chip.num_sms
    memory = max(p.weight_bytes / model.memory, reads / (sms * model.feed))
    overlap = model.overlap * min(compute, memory)
    return MixedCost(model.start + model.second * (c.blocks_per_sm - 1) + overlap, compute, memory)


def fitted(p: MixedProblem, c: MixedConfig, chip: Chip) -> MixedConfig | None:
    """With as many stages as shared memory holds."""
    capacity = chip.smem_per_block
    if c.staged:
        staged = (replace(c, stages=stages) for stages in (3, 2))
        return next((one for one in staged if not broken_rules(p, one, chip)), None)
    if c.blocks_per_sm > 1:
        capacity = (chip.smem_per_block + _RESERVED_BYTES) // c.blocks_per_sm - _RESERVED_BYTES
    for stages in range(_MAX_STAGES // c.deep * c.deep, max(3, c.deep) - 1, -c.deep):
        one = replace(c, stages=stages)
        if shared_memory(p, one) <= capacity:
            return None if broken_rules(p, one, chip) else one
    return None


def candidates(p: MixedProblem, chip: Chip) -> Iterator[MixedConfig]:
    """Every configuration worth comparing."""
    most = min(p.tokens if p.dense else math.ceil(p.tokens * _SPREAD[-1]), _TOKENS[-1])
    splits = (1, 2, 4, 8) if p.dense else (1,)
    enough = next(t for t in _TOKENS if t >= most)
    warps = _SLABS_WARPS if p.in_slabs else _WARPS
    staged = fitted(p, STAGED, chip)
    if staged is not None and most > _FEW_TOKENS:
        yield staged
    for tokens, (across, deep), split_k, resident in product(_TOKENS, warps, splits, (1, 2)):
        if tokens <= enough:
            one = fitted(p, MixedConfig(tokens, across, deep, 0, split_k, resident), chip)
            if one is not None:
                yield one
