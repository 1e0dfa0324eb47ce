"""What a configuration costs on a problem, in microseconds, as terms that can be read.

The constants were fitted to sweeps on an H200 (docs/performance.md says how well they choose). They rank
configurations; they do not promise a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from jax_deepgemm.sm90.chip import H200, Chip
from jax_deepgemm.sm90.config import GemmConfig, GemmProblem, align_up, ceil_div, fit_stages
from jax_deepgemm.sm90.tuning import tuned

# The persistent kernel: microseconds that 128 bytes of k of one tile take on one SM, and that a tile takes
# beside them (its epilogue, and waiting at its edges).
_PER_BLOCK = {
    "fp8 block": {
        (64, 64): 0.1389,
        (64, 96): 0.2045,
        (64, 128): 0.2283,
        (64, 192): 0.3506,
        (64, 256): 0.4868,
        (128, 64): 0.2284,
        (128, 96): 0.3462,
        (128, 128): 0.3781,
        (128, 144): 0.4473,
        (128, 160): 0.4906,
        (128, 176): 0.5353,
        (128, 192): 0.5415,
        (128, 256): 0.6956,
        (192, 128): 0.546,
    },
    "fp8 vector": {
        (64, 64): 0.27,
        (64, 128): 0.391,
        (128, 64): 0.3325,
        (128, 96): 0.4247,
        (128, 128): 0.5568,
        (128, 160): 0.6517,
        (192, 96): 0.5934,
        (192, 128): 0.7382,
    },
    "bf16": {
        (64, 64): 0.1054,
        (64, 128): 0.1994,
        (64, 192): 0.2671,
        (64, 256): 0.3525,
        (128, 64): 0.1993,
        (128, 96): 0.3019,
        (128, 128): 0.3364,
        (128, 144): 0.37,
        (128, 160): 0.4147,
        (128, 176): 0.4586,
        (128, 192): 0.4786,
        (128, 224): 0.563,
        (128, 256): 0.6347,
    },
    "bf16 ping-pong": {
        (128, 128): 0.335,
        (128, 144): 0.38,
        (128, 160): 0.415,
        (128, 176): 0.455,
        (128, 192): 0.49,
    },
}
# Microseconds of any tile, and for each element of a bf16 D.
_PER_TILE = {
    "fp8 block": (0.2109, 3.002e-5),
    "fp8 vector": (0.1792, 3.591e-5),
    "bf16": (0.2225, 3.271e-5),
    "bf16 ping-pong": (0.1, 1.0e-5),
}
START = {"fp8": 2.966, "bf16": 2.727}


@dataclass(frozen=True)
class _SmallM:
    """The small-m kernel, in microseconds and bytes; "token" is a column of the tile."""

    start: float
    alone: tuple[float, float]  # a block of k in one block of threads by itself: fixed, for each token
    tensor: float  # a block of k on the tensor core, for each token and 64 weight rows
    feed: float  # bytes per microsecond into one SM
    epilogue: tuple[float, float]  # of a split tile; of any, for each token
    next_wave: float  # until the blocks of another wave are under way
    memory: float  # bytes per microsecond
    latency: float  # that a byte is on its way


_SMALL_M = {
    "fp8": _SmallM(3.079, (0.04191, 0.001955), 0.002245, 1.526e5, (1.328, 0.02941), 3.367, 3.043e6, 1.528),
    "bf16": _SmallM(4.198, (0.04023, 0.000835), 0.001852, 1.991e5, (0.628, 9.103e-5), 4.893, 3.521e6, 0.24),
}
_ENOUGH_STAGES = 5  # two blocks of threads on an SM with fewer slots each measured worse than the model says
_MEMORY_BYTES_PER_US = 3.0e6
_L2_BYTES_PER_US = 1.15e7
# By blocks per SM and size.
_RESIDENT_CLUSTERS = {1: {1: 132, 2: 66, 4: 30, 8: 15}, 2: {1: 264, 2: 132, 4: 62, 8: 30}}


@dataclass(frozen=True)
class Cost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launch, first bytes, last stores.
      compute: of all waves of tiles.
      memory: moving every operand once.
      waves: tiles that the busiest SM (or cluster of them) computes one after the other.
    """

    start: float
    compute: float
    memory: float
    waves: int

    @property
    def total(self) -> float:
        """Compute and memory overlap, but not well where they are equal."""
        return self.start + (self.compute**4 + self.memory**4) ** 0.25

    def __str__(self) -> str:
        terms = f"start {self.start:.1f}, compute {self.compute:.1f}, memory {self.memory:.1f}"
        return f"{self.total:.1f} us ({terms}, waves {self.waves})"


Tiles = Mapping[tuple[int, int], float]


def kind_of(p: GemmProblem, c: GemmConfig) -> str:
    """The key of a persistent kernel in the tables of constants."""
    return f"fp8 {p.b_scales}" if p.is_fp8 else "bf16 ping-pong" if c.ping_pong else "bf16"


def per_block(measured: Tiles, c: GemmConfig) -> float:
    """Microseconds of a block of k; a tile that is no candidate was no better than its neighbours."""
    return measured.get((c.rows, c.cols), 1.3 * measured[128, 128] * c.rows * c.cols / 128**2)


def persistent_tiles(measured: Mapping[str, Tiles], p: GemmProblem) -> list[GemmConfig]:
    """The tiles in such a table that are for a problem, without stages."""
    return [
        GemmConfig(rows, cols, 0, ping_pong=turns)
        for turns in ((False,) if p.is_fp8 else (False, True))
        for rows, cols in measured[kind_of(p, GemmConfig(128, 128, 0, ping_pong=turns))]
    ]


def _tiles(p: GemmProblem, c: GemmConfig) -> int:
    return ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * p.batches


def _persistent(p: GemmProblem, c: GemmConfig, chip: Chip) -> Cost:
    waves = ceil_div(_tiles(p, c), chip.num_sms)
    traffic = (2 if p.out == "float32" else 1) * (2 if p.add_c else 1)
    kind = kind_of(p, c)
    fixed, for_each = _PER_TILE[kind]
    per_tile = fixed + for_each * c.block_m * c.block_n * traffic**0.5
    compute = waves * (per_tile + p.k_blocks * per_block(_PER_BLOCK[kind], c))
    return Cost(START["fp8" if p.is_fp8 else "bf16"], compute, p.bytes_moved / _MEMORY_BYTES_PER_US, waves)


def _small_m(p: GemmProblem, c: GemmConfig, chip: Chip) -> Cost:
    k = _SMALL_M["fp8" if p.is_fp8 else "bf16"]
    tiles = _tiles(p, c)
    clusters = max(1, _RESIDENT_CLUSTERS[c.blocks_per_sm][c.split_k] * chip.num_sms // H200.num_sms)
    waves = ceil_div(tiles, clusters)
    blocks = min(tiles, clusters) * c.split_k
    crowd = min(c.blocks_per_sm, ceil_div(blocks, chip.num_sms))
    slot = (c.rows + c.cols) * 128
    share = align_up(ceil_div(p.k_blocks, c.split_k), 4 if p.is_fp8 else 1)
    per_block = max(
        k.alone[0] + k.alone[1] * c.cols,  # latencies of one block's chain
        crowd * c.warpgroups * k.tensor * c.cols,
        crowd * slot / k.feed,
        blocks * slot / _L2_BYTES_PER_US,
    )
    epilogue = k.epilogue[1] * c.cols + (k.epilogue[0] if c.split_k > 1 else 0.0)
    compute = waves * (share * per_block + epilogue) + (waves - 1) * k.next_wave
    rate = min(k.memory, blocks * c.stages * slot / k.latency)
    return Cost(k.start, compute, p.bytes_moved / rate, waves)


def cost(p: GemmProblem, c: GemmConfig, chip: Chip) -> Cost:
    """The model's opinion of running `p` with `c`."""
    return _small_m(p, c, chip) if c.swap_ab else _persistent(p, c, chip)


def candidates(p: GemmProblem, chip: Chip) -> Iterator[GemmConfig]:
    """Every configuration worth comparing; each obeys `problems_with`."""
    wanted = persistent_tiles(_PER_BLOCK, p)
    if p.m <= 512:
        wanted += [
            GemmConfig(tokens, weights, 0, True, split, resident)
            for tokens in (8, 16, 32, 64, 128)
            for weights in (64, 128)
            for split in (1, 2, 4, 8)
            for resident in (1, 2)
            if tokens < 2 * max(8, p.m) and not (tokens == weights == 128 and resident == 2)
        ]
    for config in wanted:
        fitted = fit_stages(p, config, chip)
        if fitted is not None and (fitted.blocks_per_sm == 1 or fitted.stages >= _ENOUGH_STAGES):
            yield fitted


def choose(p: GemmProblem, chip: Chip) -> GemmConfig:
    """The configuration that was measured for this problem (tuning.py), or else the model's."""
    return tuned(p, chip) or cheapest(p, chip)


@lru_cache(maxsize=4096)
def cheapest(p: GemmProblem, chip: Chip) -> GemmConfig:
    """The cheapest configuration by the model; the first of equals."""
    return min(candidates(p, chip), key=lambda c: cost(p, c, chip).total)
