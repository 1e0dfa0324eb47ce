"""What a configuration costs on a grouped problem: the dense model, summed over groups that have rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.ops.gemm.problem import ceil_div
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, fit_stages, passes
from jax_deepgemm.ops.gemm.sm90.cost import START, Cost, kind_of, per_block, persistent_tiles
from jax_deepgemm.ops.grouped.problem import GroupedProblem
from jax_deepgemm.ops.grouped.sm90.rules import broken_rules

_SPREAD = tuple(0.7 + 0.05 * i for i in range(13))  # of group sizes around the expected one

# Tiles that can win -> microseconds that 128 bytes of k of one tile take on one SM, as in cost.py, but of
# kernels that mostly run for long enough to reach the power limit.
_PER_BLOCK = {
    "fp8 block": {
        (64, 64): 0.1912,
        (64, 96): 0.1704,
        (64, 112): 0.1995,
        (64, 128): 0.2282,
        (64, 192): 0.378,
        (64, 256): 0.516,
        (128, 128): 0.4012,
        (128, 192): 0.557,
        (128, 256): 0.7477,
        (192, 128): 0.5612,
        (256, 128): 0.7425,
    },
    "fp8 gated": {
        (64, 256): 0.5,
        (128, 256): 0.7477,
    },
    "bf16 gated": {
        (64, 256): 0.36,
        (128, 256): 0.6841,
    },
    "fp8 vector": {
        (64, 128): 0.44,
        (128, 128): 0.68,
        (128, 160): 0.84,
    },
    "fp8 block_slices": {  # those of the same loop in groups of rows
        (64, 128): 0.2282,
        (64, 256): 0.516,
        (128, 128): 0.4012,
        (128, 256): 0.7477,
        (192, 128): 0.5612,
        (256, 128): 0.7425,
    },
    "fp8 block_32": {
        (64, 64): 0.24,
        (64, 96): 0.27,
        (64, 128): 0.3,
        (128, 128): 0.5,
        (192, 128): 0.72,
    },
    "fp8 vector_32": {
        (64, 64): 0.3,
        (64, 96): 0.35,
        (64, 128): 0.42,
        (128, 64): 0.42,
        (128, 128): 0.85,
    },
    "fp8 slices": {
        (64, 128): 0.7357,
        (128, 128): 0.5668,
        (128, 160): 0.7183,
        (192, 128): 0.7598,
        (256, 96): 0.7772,
        (256, 128): 1.04,
    },
    "bf16": {
        (64, 64): 0.1809,
        (64, 96): 0.1533,
        (64, 112): 0.1771,
        (64, 128): 0.2013,
        (128, 128): 0.3842,
        (128, 192): 0.5157,
        (128, 256): 0.6841,
    },
    "bf16 ping-pong": {
        (128, 128): 0.3538,
        (128, 160): 0.4271,
        (128, 176): 0.4767,
        (128, 192): 0.4872,
    },
}
# Microseconds of any tile beside its blocks, and for each element of a bf16 D.
_PER_TILE = {
    "fp8 block": (0.5942, 6.49e-06),
    "fp8 gated": (1.2, 6.49e-06),
    "bf16 gated": (0.002294, 2.711e-05),
    "fp8 vector": (0.2, 2.0e-5),
    "fp8 block_slices": (0.5942, 6.49e-06),
    "fp8 block_32": (0.5942, 6.49e-06),
    "fp8 vector_32": (0.5942, 6.49e-06),
    "fp8 slices": (0.00168, 8.836e-06),
    "bf16": (0.002294, 2.711e-05),
    "bf16 ping-pong": (0.003022, 2.991e-05),
}
_MEMORY_BYTES_PER_US = 3.794e6
_READ_SHARE = {64: 0.82, 96: 0.91, 112: 0.94, 128: 0.965, 192: 0.95}
"""What narrow FP8 tiles of 64 rows reach of that rate, measured with 8 to 128 rows over 32 and 256 groups:
wide ones ask for more bytes at a time."""
_WIDEST, _BUSY = 256, 0.9
_READ_AGAIN = 0.1  # of a group's B, which leaves L2 before the SM with its next row tile has it
_MANY_WAVES = 4  # from here on tiles of different lengths even out
_HALF = 0.54  # what half a tile costs of a whole one


def grouped_candidates(p: GroupedProblem, chip: Chip) -> Iterator[Sm90Config]:
    """Every configuration worth comparing."""
    for tile in persistent_tiles(_PER_BLOCK, p.gemm):
        fitted = fit_stages(p.gemm, tile, chip)
        if fitted is not None and not broken_rules(p, fitted, chip):
            yield fitted


def grouped_cost(p: GroupedProblem, c: Sm90Config, chip: Chip) -> Cost:
    """The dense model, summed over groups of sizes around the expected one, as many as can have rows."""
    col_tiles = ceil_div(p.n, c.block_n)
    if p.inner:
        row_tiles = float(ceil_div(p.m, c.block_m))
    else:
        sizes = [max(1, round(p.expected * factor)) for factor in _SPREAD]
        row_tiles = sum(ceil_div(size, c.block_m) for size in sizes) / len(sizes)
    tiles = p.hit * row_tiles * col_tiles
    waves = _waves(tiles / chip.num_sms, halves(p, c))
    traffic = (2 if p.out == "float32" else 1) * (2 if p.add_c else 1)
    kind = kind_of(p.gemm, c.ping_pong)
    fixed, for_each = _PER_TILE[kind]
    per_tile = fixed + for_each * c.block_m * c.block_n * traffic
    compute = waves * (per_tile + p.gemm.k_blocks * per_block(_PER_BLOCK[kind], c))
    again = 0 if p.inner else _READ_AGAIN * min(row_tiles - 1, 1) * p.n * p.gemm.row_bytes
    moved = p.hit * (p.gemm.bytes_moved + again)
    rate = _MEMORY_BYTES_PER_US * (_READ_SHARE.get(c.block_n, 1.0) if _reads_weights(p, c, chip) else 1.0)
    start = START["fp8" if p.gemm.is_fp8 else "bf16"]
    return Cost(start, compute, moved / rate, round(waves))


def _reads_weights(p: GroupedProblem, c: Sm90Config, chip: Chip) -> bool:
    """Whether the bytes are those of B, for few rows, and the widest tiles would keep the SMs busy."""
    few = p.gemm.is_fp8 and not p.inner and c.block_m == 64
    return few and p.hit * ceil_div(p.n, _WIDEST) >= _BUSY * chip.num_sms


def halves(p: GroupedProblem, c: Sm90Config) -> bool:
    """Whether the last tiles are cut in two where that fills the SMs: those whose columns take two passes."""
    return not (p.inner or p.gated) and passes(p.gemm, c) == 2


def _waves(even: float, cut: bool) -> float:
    """How many rounds so many tiles for each SM take. `cut`: the last ones are cut in two."""
    if even > _MANY_WAVES:
        return even + (_HALF / 2 if cut else 0.5)
    return math.floor(even) + _HALF if cut and 0 < even % 1 <= 0.5 else math.ceil(even)
