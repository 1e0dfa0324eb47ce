"""Attention to keys in pages on Hopper: configurations, rules, costs, and the plan of a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import LaunchPlan, Scratch
from jax_deepgemm.jit import KernelSource
from jax_deepgemm.ops.attention.family import AttentionConfig
from jax_deepgemm.ops.attention.problem import MOST_DEPTH, MOST_SEQUENCES, PAGES, AttentionProblem
from jax_deepgemm.ops.attention.sm90 import decode, prefill

KEYS, WARPS, BLOCKS = (16, 32), (4, 8), (1, 2)
MOST_STAGES = 8
SM_BYTES, BLOCK_BYTES = 233_472, 1024
"""Shared memory of an SM, and what each of its blocks takes beside its own."""
MOST_WEIGHTS = 2**31 - 1
_BLOCK_OF_MERGE = 65_535


def problems_with(p: AttentionProblem, c: AttentionConfig) -> list[str]:
    """The rules that a configuration breaks."""
    room = c.blocks * (decode.shared_memory(p, c) + BLOCK_BYTES)
    rules = (
        (c.keys in KEYS, f"keys is {c.keys}, need one of {KEYS}"),
        (c.warps in WARPS, f"warps is {c.warps}, need one of {WARPS}"),
        (c.blocks in BLOCKS, f"blocks is {c.blocks}, need one of {BLOCKS}"),
        (1 <= c.stages <= MOST_STAGES, f"stages is {c.stages}, need 1 to {MOST_STAGES}"),
        (room <= SM_BYTES, f"{c.blocks} blocks need {room} bytes of shared memory, an SM has {SM_BYTES}"),
        (
            c.keys == 16 or max(p.depth, p.v_depth) <= 128,
            f"keys is {c.keys}, need 16 for rows of {max(p.depth, p.v_depth)}: registers",
        ),
        (
            c.warps * c.blocks <= 8,
            f"{c.blocks} blocks of {c.warps} warps, need 8 warps at most: registers",
        ),
    )
    return [words for kept, words in rules if not kept]


def refusal(p: AttentionProblem) -> str:
    """Why no configuration can run a problem."""
    rules = (
        (p.page in PAGES, f"pages have {p.page} keys, need one of {PAGES}"),
        (
            max(p.depth, p.v_depth) <= MOST_DEPTH and p.depth % 16 == 0 and p.v_depth % 16 == 0,
            f"heads are {p.depth} and {p.v_depth} wide, need multiples of 16 up to {MOST_DEPTH}: pad them",
        ),
        (p.seqs <= MOST_SEQUENCES, f"{p.seqs} sequences, at most {MOST_SEQUENCES} in a call: cut the batch"),
        (p.heads <= _BLOCK_OF_MERGE, f"{p.heads} heads, at most {_BLOCK_OF_MERGE}"),
        (p.keys <= MOST_WEIGHTS, f"tables of {p.keys} keys, at most {MOST_WEIGHTS}"),
        (
            decode.most_weights(p, AttentionConfig(16, 1)) <= MOST_WEIGHTS,
            "rows times keys are more than a launch counts: cut the batch",
        ),
        (
            not has_many(p) or prefill.most_counted(p) <= MOST_WEIGHTS,
            "rows times sequences are more than a launch counts: cut the batch",
        ),
    )
    return "; ".join(words for kept, words in rules if not kept)


# Choosing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launches, prefix sums, the first keys.
      reading: all keys, at the rate that copies in flight allow.
      blocks: a block's units one after the other, each with a wait for its first keys, and its end.
    """

    start: float
    reading: float
    blocks: float

    @property
    def total(self) -> float:
        return self.start + max(self.reading, self.blocks)

    def __str__(self) -> str:
        terms = f"start {self.start:.1f}, reading {self.reading:.1f}, blocks {self.blocks:.1f}"
        return f"{self.total:.1f} us ({terms})"


# Measured on an H200 (docs/performance.md).
_READ, _AHEAD = 4.4e6, 4e3  # bytes of a microsecond; of an SM, in flight, at half of that rate
_START, _MORE_WARPS, _END, _LATENCY = 6.0, 0.6, 12.0, 1.5
_RATES = {(8, 1): 1.0, (4, 2): 0.99, (4, 1): 0.975}
_FP8_RATES = {(16, 8, 1): 0.74, (16, 4, 2): 0.72, (16, 4, 1): 0.64, (32, 8, 1): 0.82, (32, 4, 2): 0.79}
_SLOWEST = 0.74
"""By keys, warps and blocks: how much of that rate they keep up with."""


def cost(p: AttentionProblem, c: AttentionConfig, chip: Chip) -> Cost:
    """The model's opinion. A cache in FP8 is widened by instructions, for which few warps have no time."""
    flying = c.blocks * c.warps * (c.stages - 1) * decode.tile_bytes(p, c)
    rate = _READ * flying / (flying + _AHEAD)
    if p.kv_dtype == "e4m3":
        rate *= _FP8_RATES.get((c.keys, c.warps, c.blocks), _SLOWEST)
    else:
        rate *= _RATES.get((c.warps, c.blocks), _SLOWEST)
    units = decode.most_units(p)
    own = p.kv_bytes / max(units, 1) * c.blocks / flying * _LATENCY
    blocks = units / (chip.num_sms * c.blocks) * (_END + own)
    return Cost(_START + _MORE_WARPS * (c.warps == 8), p.kv_bytes / rate, blocks)


def candidates(p: AttentionProblem, chip: Chip) -> Iterator[AttentionConfig]:
    """Every tile, with as many slots as fit; one alone where bits must not depend on the batch."""
    for keys in KEYS:
        for warps in WARPS:
            for blocks in BLOCKS:
                config = _filled(p, AttentionConfig(keys, 1, warps, blocks), chip)
                if config.stages >= 2 and not problems_with(p, config):
                    yield config
                    if p.split:
                        return


def _filled(p: AttentionProblem, c: AttentionConfig, chip: Chip) -> AttentionConfig:
    other = decode.shared_memory(p, c) - decode.layout_bytes(p, c)
    room = min(SM_BYTES // c.blocks - BLOCK_BYTES, chip.smem_per_block) - other
    return replace(c, stages=min(room // (c.warps * decode.tile_bytes(p, c)), MOST_STAGES))


# Launching -------------------------------------------------------------------------------------------------

DECODE_ROWS = 64
"""Packed rows of a sequence up to which the kernel for few rows takes it, where both are launched."""


def few_tokens(p: AttentionProblem) -> int:
    """Tokens of a sequence up to which the kernel for few rows takes it."""
    return max(1, DECODE_ROWS // p.group)


def has_many(p: AttentionProblem) -> bool:
    """Whether there may be sequences with more."""
    return p.most_rows > few_tokens(p)


def _prefill_config(p: AttentionProblem) -> prefill.PrefillConfig:
    return prefill.prefill_config(p, few_tokens(p) * p.group)


def _sources(p: AttentionProblem, c: AttentionConfig) -> list[KernelSource]:
    many = [prefill.prefill_source(p, _prefill_config(p))] if has_many(p) else []
    return [*many, decode.decode_source(p, c), decode.merge_source(p, c)]


def _plan(p: AttentionProblem, c: AttentionConfig, chip: Chip, given: Operands) -> LaunchPlan:
    scratch: tuple[int, ...] = decode.scratch_bytes(p, c, chip)
    if not has_many(p):
        return LaunchPlan(decode.launches(p, c, chip), scratch, label=str(p))
    many = prefill.prefill_steps(p, _prefill_config(p), chip, given, Scratch(len(scratch)))
    few = decode.launches(p, c, chip, few_tokens(p))
    return LaunchPlan((*many, *few), (*scratch, prefill.TICKET_BYTES), label=str(p))


KERNELS = Kernels[AttentionProblem, AttentionConfig](
    config=AttentionConfig,
    candidates=candidates,
    cost=cost,
    broken_rules=lambda p, c, chip: problems_with(p, c),
    refusal=refusal,
    shared_bytes=decode.shared_memory,
    sources=_sources,
    plan=_plan,
)
