"""What a configuration costs on a problem, in microseconds, as terms that can be read.

The constants were fitted to sweeps on an H200 (docs/performance_log.md says how well they choose). They rank
configurations; they do not promise a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jax_deepgemm.core.chip import H200, Chip
from jax_deepgemm.ops.gemm.problem import GemmProblem, align_up, ceil_div
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, fit_stages

# The persistent kernel: microseconds that 128 bytes of k of one tile take on one SM, and that a tile takes
# beside them (its epilogue, and waiting at its edges).
_PER_BLOCK = {
    "fp8 block": {
        (64, 64): 0.1338,
        (64, 96): 0.1777,
        (64, 128): 0.1904,
        (64, 192): 0.3835,
        (64, 256): 0.4355,
        (128, 64): 0.2059,
        (128, 96): 0.3243,
        (128, 128): 0.3689,
        (128, 144): 0.4117,
        (128, 160): 0.4775,
        (128, 176): 0.5204,
        (128, 192): 0.6311,
        (128, 256): 0.6647,
        (192, 128): 0.5318,
        (256, 128): 0.7039,
    },
    "fp8 vector": {
        (64, 64): 0.2744,
        (64, 128): 0.391,
        (128, 64): 0.322,
        (128, 96): 0.4066,
        (128, 128): 0.5304,
        (128, 160): 0.5991,
        (192, 96): 0.5495,
        (192, 128): 0.7007,
        (256, 128): 0.9507,
    },
    "fp8 block_32": {
        (64, 64): 0.24,
        (64, 128): 0.28,
        (64, 256): 0.47,
        (128, 64): 0.26,
        (128, 128): 0.45,
        (192, 128): 0.68,
    },
    "fp8 vector_32": {
        (64, 64): 0.3,
        (64, 128): 0.4,
        (64, 256): 0.82,
        (128, 64): 0.38,
        (128, 128): 0.8,
    },
    "bf16": {
        (64, 64): 0.09759,
        (64, 128): 0.1629,
        (64, 192): 0.2742,
        (64, 256): 0.3512,
        (128, 64): 0.1827,
        (128, 96): 0.2743,
        (128, 128): 0.33,
        (128, 144): 0.3723,
        (128, 160): 0.4042,
        (128, 176): 0.4498,
        (128, 192): 0.5479,
        (128, 224): 0.5543,
        (128, 256): 0.6044,
    },
    "bf16 ping-pong": {
        (128, 128): 0.3314,
        (128, 144): 0.3761,
        (128, 160): 0.4058,
        (128, 176): 0.4541,
        (128, 192): 0.4783,
    },
}
# Microseconds of any tile, and for each element of a bf16 D.
_PER_TILE = {
    "fp8 block": (0.3264, 2.744e-05),
    "fp8 vector": (0.0972, 6.536e-05),
    "fp8 block_32": (0.3264, 2.744e-05),
    "fp8 vector_32": (0.3264, 2.744e-05),
    "bf16": (0.002059, 5.792e-05),
    "bf16 ping-pong": (0.01162, 2.136e-05),
}
START = {"fp8": 2.89, "bf16": 1.473}


@dataclass(frozen=True)
class _SmallM:
    """The small-m kernel, in microseconds and bytes; "token" is a column of the tile."""

    start: float
    alone: tuple[float, float]  # a block of k in one block of threads by itself: fixed, for each token
    tensor: float  # a block of k on the tensor core, for each token and 64 rows
    feed: float  # bytes per microsecond into one SM
    epilogue: tuple[float, float]  # of a split tile; of any, for each token
    next_wave: float  # until the blocks of another wave are under way
    memory: float  # bytes per microsecond
    latency: float  # that a byte is on its way


_SMALL_M = {
    "fp8 swap-AB": _SmallM(
        3.15, (0.03576, 0.002284), 0.004344, 1.629e05, (1.056, 0.01105), 2.679, 3.385e06, 1.429
    ),
    "fp8 32 swap-AB": _SmallM(
        3.15, (0.055, 0.0035), 0.0085, 1.629e05, (1.056, 0.01105), 2.679, 3.385e06, 1.429
    ),
    "fp8 32": _SmallM(1.687, (0.1, 0.002), 0.005, 1.158e05, (1.635, 0.01906), 0.9684, 2.665e06, 1.276),
    "bf16 swap-AB": _SmallM(
        2.895, (0.04293, 0.001097), 0.002501, 1.328e05, (1.581, 2.793e-05), 2.092, 3.961e06, 0.2407
    ),
    "fp8": _SmallM(1.687, (0.06645, 0.001143), 0.002359, 1.158e05, (1.635, 0.01906), 0.9684, 2.665e06, 1.276),
    "bf16": _SmallM(
        3.137, (0.04621, 0.0008584), 0.001865, 1.706e05, (1.37, 0.0001038), 2.66, 4.893e06, 0.2176
    ),
}
_ENOUGH_STAGES = 6  # two blocks of threads on an SM with fewer slots each measured worse than the model says
_MEMORY_BYTES_PER_US = 3.0e6
_L2_BYTES_PER_US = 9.961e06
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


def kind_of(p: GemmProblem, ping_pong: bool) -> str:
    """The key of a persistent kernel in the tables of constants."""
    if p.gated:
        return "fp8 gated" if p.is_fp8 else "bf16 gated"
    return f"fp8 {p.b_scales}" if p.is_fp8 else "bf16 ping-pong" if ping_pong else "bf16"


def per_block(measured: Tiles, c: Sm90Config) -> float:
    """Microseconds of a block of k; a tile that is no candidate was no better than its neighbours."""
    found = measured.get((c.rows, c.cols))
    return 1.3 * measured[128, 128] * c.rows * c.cols / 128**2 if found is None else found


def persistent_tiles(measured: Mapping[str, Tiles], p: GemmProblem) -> list[Sm90Config]:
    """The tiles in such a table that are for a problem, without stages."""
    return [
        Sm90Config(rows, cols, 0, ping_pong=turns, gated=p.gated)
        for turns in ((False,) if p.is_fp8 or p.gated else (False, True))
        for rows, cols in measured[kind_of(p, turns)]
    ]


def _tiles(p: GemmProblem, c: Sm90Config) -> int:
    return ceil_div(p.m, c.block_m) * ceil_div(p.n, c.block_n) * p.batches


def _persistent(p: GemmProblem, c: Sm90Config, chip: Chip) -> Cost:
    waves = ceil_div(_tiles(p, c), chip.num_sms)
    traffic = (2 if p.out == "float32" else 1) * (2 if p.add_c else 1)
    kind = kind_of(p, c.ping_pong)
    fixed, for_each = _PER_TILE[kind]
    per_tile = fixed + for_each * c.block_m * c.block_n * traffic**0.5
    compute = waves * (per_tile + p.k_blocks * per_block(_PER_BLOCK[kind], c))
    return Cost(START["fp8" if p.is_fp8 else "bf16"], compute, p.bytes_moved / _MEMORY_BYTES_PER_US, waves)


def _small_m(p: GemmProblem, c: Sm90Config, chip: Chip) -> Cost:
    kind = "fp8 32" if p.fine else "fp8" if p.is_fp8 else "bf16"
    k = _SMALL_M[kind + (" swap-AB" if c.swap_ab else "")]
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


def cost(p: GemmProblem, c: Sm90Config, chip: Chip) -> Cost:
    """The model's opinion of running `p` with `c`."""
    return _small_m(p, c, chip) if c.one_tile else _persistent(p, c, chip)


def _heads_keep_it_busy(p: GemmProblem, chip: Chip) -> bool:
    """Whether a batch that lies inside the rows of D has enough tiles for the persistent kernel, which stores
    its rows through TMA: 13.9 us against 16.3 with swapped tiles for 128 heads of 128 x 128 x 512."""
    tiles = p.batches * ceil_div(p.m, 64) * ceil_div(p.n, 128)
    return bool(p.stored) and p.runs == 1 and p.m > 64 and tiles >= chip.num_sms


def candidates(p: GemmProblem, chip: Chip) -> Iterator[Sm90Config]:
    """Every configuration worth comparing; each obeys `problems_with`."""
    tiles = persistent_tiles(_PER_BLOCK, p)
    wanted = [c for c in tiles if not c.ping_pong or _tiles(p, c) >= 2 * chip.num_sms]
    if (p.m <= 512 or p.runs > 1) and not _heads_keep_it_busy(p, chip):
        wanted += [
            Sm90Config(tokens, weights, 0, True, split, resident)
            for tokens in (8, 16, 32, 64, 128)
            for weights in (64, 128)
            for split in (1, 2, 4, 8)
            for resident in (2, 1)  # of equals the first is chosen
            if tokens < 2 * max(8, p.m) and not (tokens == weights == 128 and resident == 2)
        ]
    if 16 < p.m <= 512 or p.runs > 1:
        wanted += [
            Sm90Config(rows, cols, 0, split_k=split)
            for rows, cols in ((64, 32), (64, 64), (128, 64))
            for split in (2, 4, 8)
        ]
    for config in wanted:
        fitted = fit_stages(p, config, chip)
        if fitted is not None and (fitted.blocks_per_sm == 1 or fitted.stages >= _ENOUGH_STAGES):
            yield fitted
