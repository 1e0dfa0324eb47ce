"""What a configuration costs on a problem, in microseconds, as a sum of terms that can be read.

The constants are measured (docs/performance.md). The model ranks configurations; it does not promise a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from jax_deepgemm.sm90.chip import Chip
from jax_deepgemm.sm90.config import GemmConfig, GemmProblem, ceil_div, fit_stages

_CLOCK_MHZ = 1650.0  # of an SM under tensor-core load
_FEED_BYTES_PER_CYCLE = 45.0  # from L2 into one SM's shared memory
_MEMORY_BYTES_PER_US = 3.3e6
_LAUNCH_US = 2.6  # empty pipeline, first bytes, last stores
_CLUSTERS = {1: {1: 132, 2: 66, 4: 30, 8: 15}, 2: {1: 264, 2: 132, 4: 62, 8: 30}}  # resident at once


@dataclass(frozen=True)
class Cost:
    """Microseconds; `total` is what configurations are compared by."""

    compute: float
    memory: float
    waves: int

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + 0.1 * min(self.compute, self.memory)

    def __str__(self) -> str:
        return f"{self.total:.1f} us (compute {self.compute:.1f}, memory {self.memory:.1f}, waves {self.waves})"


def _cycles_per_block(p: GemmProblem, c: GemmConfig) -> float:
    """Cycles that one tile's 128 bytes of k take on one SM, all consumer warpgroups together."""
    tensor = 2.0 * c.cols * c.warpgroups
    if p.is_fp8:  # promotion is partly hidden behind the other warpgroup's multiplication
        if p.b_scales == "vector":
            tensor = 1.9 * tensor
        elif c.swap_ab:
            tensor = 1.2 * tensor + 140
        elif c.warpgroups == 2:
            tensor = 0.85 * tensor + 210 + (0.25 * c.cols if c.cols % 64 and 128 % c.cols else 0)
        else:
            tensor = 1.3 * tensor + 80
    feed = (c.rows + c.cols) * 128 / _FEED_BYTES_PER_CYCLE
    return max(tensor, feed)


def cost(p: GemmProblem, c: GemmConfig, chip: Chip) -> Cost:
    tiles = ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * p.batches
    memory = p.bytes_moved / _MEMORY_BYTES_PER_US + _LAUNCH_US
    if c.swap_ab:
        slots = _CLUSTERS[c.blocks_per_sm][c.split_k] * chip.num_sms // 132
        waves = ceil_div(tiles, slots)
        resident = min(c.blocks_per_sm, ceil_div(tiles * c.split_k, chip.num_sms))
        cycles = ceil_div(p.k_blocks, c.split_k) * _cycles_per_block(p, c) * resident
        reduction = 0.8 + (0.9 + c.cols / 64 if c.split_k > 1 else 0)
        compute = _LAUNCH_US + waves * (cycles / _CLOCK_MHZ + reduction)
    else:
        waves = ceil_div(tiles, chip.num_sms)
        out_bytes = c.rows * c.cols * (2 if p.out == "bfloat16" else 4) * (2 if p.add_c else 1)
        cycles = p.k_blocks * _cycles_per_block(p, c) + 500 + out_bytes / 32
        compute = _LAUNCH_US + waves * cycles / _CLOCK_MHZ
    return Cost(compute, memory, waves)


def candidates(p: GemmProblem, chip: Chip) -> Iterator[GemmConfig]:
    """Every configuration worth comparing; each obeys `problems_with`."""
    if p.m > 32 or p.n <= 64:
        widths = range(64, 257, 16) if not p.is_fp8 else range(64, 193, 8 if p.b_scales == "block" else 32)
        for rows in (128, 64, 192):
            for cols in widths:
                if rows == 128 or cols in (64, 96, 112, 120, 128) and not (rows == 64 and cols % 64):
                    yield from _fitted(p, GemmConfig(rows, cols, 0), chip)
    if p.m <= 512:
        for tokens in (8, 16, 32, 64, 128):
            if tokens <= 64 or p.m > 64:
                for weights in (64, 128):
                    for split in (1, 2, 4, 8):
                        for resident in (1, 2):
                            config = GemmConfig(tokens, weights, 0, True, split, resident)
                            if tokens < 2 * max(8, p.m):
                                yield from _fitted(p, config, chip)


def _fitted(p: GemmProblem, c: GemmConfig, chip: Chip) -> Iterator[GemmConfig]:
    fitted = fit_stages(p, c, chip)
    if fitted is not None:
        yield fitted


@lru_cache(maxsize=4096)
def choose(p: GemmProblem, chip: Chip) -> GemmConfig:
    """The cheapest configuration; the first of equals."""
    return min(candidates(p, chip), key=lambda c: cost(p, c, chip).total)
