"""Logits on Hopper: problem and configuration -> source text and LaunchPlan; include/jax_deepgemm/indexer/
says how."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Result, Scalar, TensorMap
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.indexer.family import DEPTHS, LARGEST, MOST_HEADS, IndexerConfig, LogitsProblem

DIGITS = 4
MOST_COLUMNS = 128
"""Of a bank's heads."""
REGISTERS = {2: 232 - 28, 3: 160 - 24}
PACKED_REGISTERS = {2: 200 - 28}
"""Of products, weights and steps of linear columns, by consumer warpgroups, so that ptxas has room for the
rest; beside a warpgroup that expands keys in FP4."""
EXPANDED_STAGES = 4
"""Slots of keys that were FP4."""
MOST_STAGES, FEWEST_STAGES = 8, 2
_SLAB_BYTES = 128
_TOKEN_BYTES = 32
_TABLE_BYTES = 160

# LogitsConfig of include/jax_deepgemm/indexer/config.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/indexer/logits.cuh>

{mma}
struct Config {{
  using Mma = ::Mma;
  using Out = {out};
  static constexpr int PAGE = {page};
  static constexpr int HEADS = {heads}, TOKENS = {tokens}, LINEAR = {linear};
  static constexpr int SLABS = {slabs}, STEPS = {steps};
  static constexpr bool OF_TOKENS = {of_tokens};
  static constexpr bool SCALED = {scaled}, COMPRESSED = {compressed}, TENSOR_SUMS = {tensor_sums};
  static constexpr int BANKS = {banks}, CONSUMERS = {consumers};
  static constexpr int STAGES = {stages}, PACKED_STAGES = {packed_stages}, QUERY_STAGES = {query_stages};
  static constexpr int SHARED_BYTES = {shared};
}};

extern "C" __global__ void __launch_bounds__({threads}, 1) {name}({parameters}) {{
  jdg::logits<Config>({{&queries, &keys, {scales}, &weights, starts, ends, logits, tokens, num_keys, columns,
                       batch_tokens, batch_keys, {tables}, {requests}}});
}}
"""
_MAP = "const __grid_constant__ jdg::TensorMap"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def heads_of(p: LogitsProblem) -> int:
    """Heads of a token as the kernel has them: wgmma's columns come in eights."""
    return ceil_div(p.heads, 8) * 8


def slabs_of(p: LogitsProblem) -> int:
    return ceil_div(p.row_bytes, _SLAB_BYTES)


def threads_of(p: LogitsProblem, c: IndexerConfig) -> int:
    """Of a block: consumers, the producer's warpgroup, and one that expands keys in FP4."""
    return 128 * (c.warpgroups + 1 + p.packed)


def registers_of(p: LogitsProblem) -> dict[int, int]:
    """Of a thread, by consumer warpgroups."""
    return PACKED_REGISTERS if p.packed else REGISTERS


def tile_keys(c: IndexerConfig) -> int:
    """Of a slot of the pipeline of keys."""
    return 64 * c.warpgroups


def linear_of(c: IndexerConfig) -> int:
    """Columns of a bank that stand for linear halves of its sums: eight for two tokens."""
    return 2 * DIGITS * ceil_div(c.tokens, 2) if c.linear else 0


def columns_of(p: LogitsProblem, c: IndexerConfig) -> int:
    """Of a bank: what one instruction multiplies."""
    return c.tokens * heads_of(p) + linear_of(c)


def shared_memory(p: LogitsProblem, c: IndexerConfig) -> int:
    """Bytes of shared memory; mirrors LogitsLayout in config.cuh, which asserts it."""
    banks, keys = c.banks, tile_keys(c)
    weights = ceil_div(banks * c.tokens * heads_of(p) * 4, 128) * 128
    scales = keys // p.page * max(4 * p.page, 128) if p.page else keys * 4
    stage = slabs_of(p) * keys * _SLAB_BYTES + (scales if p.is_fp8 else 0) + 32
    rows = slabs_of(p) * banks * columns_of(p, c) * _SLAB_BYTES
    queries = rows + weights + banks * c.tokens * _TOKEN_BYTES + 48
    share = threads_of(p, c) // 32 * 8 + 16 + (ceil_div(c.query_stages * 8, 16) * 16 if c.linear else 0)
    if p.packed:
        packed = keys * p.key_bytes + scales + 32
        slots = EXPANDED_STAGES * stage + c.stages * packed + _TABLE_BYTES
    else:
        slots = c.stages * stage
    return ceil_div(slots + c.query_stages * queries + share, 128) * 128


def problems_with(p: LogitsProblem, c: IndexerConfig) -> list[str]:
    """The rules that a configuration breaks."""
    rules = (
        (c.tokens >= 1, f"tokens is {c.tokens}, need at least 1"),
        (
            c.tokens * heads_of(p) <= MOST_COLUMNS,
            f"{c.tokens} tokens of {heads_of(p)} heads are {c.tokens * heads_of(p)} columns of a bank, at "
            f"most {MOST_COLUMNS}",
        ),
        (
            FEWEST_STAGES <= c.stages <= 16,
            f"stages is {c.stages}, need {FEWEST_STAGES} to 16",
        ),
        (2 <= c.query_stages <= 4, f"query_stages is {c.query_stages}, need 2 to 4"),
        (
            not c.tensor_sums or heads_of(p) % 16 == 0,
            f"tensor_sums and {p.heads} heads, need a multiple of 16",
        ),
        (not (c.tensor_sums and c.linear), "tensor_sums and linear, need one of them"),
        (not c.linear or p.is_fp8, f"linear and {p.dtype}, need FP8"),
        (c.warpgroups in REGISTERS, f"warpgroups is {c.warpgroups}, need 2 or 3"),
        (not p.packed or c.warpgroups == 2, f"warpgroups is {c.warpgroups}, need 2 for FP4 keys"),
        (c.banks in (1, 2), f"banks is {c.banks}, need 1 or 2"),
        (
            _registers(p, c) <= registers_of(p).get(c.warpgroups, 0),
            f"{c.banks} x {c.tokens} tokens of {heads_of(p)} heads need {_registers(p, c)} registers of a "
            f"thread, at most {registers_of(p).get(c.warpgroups, 0)} for {c.warpgroups} warpgroups",
        ),
        (
            not p.page or tile_keys(c) % p.page == 0,
            f"tiles of {tile_keys(c)} keys are no whole pages of {p.page}",
        ),
    )
    return [words for kept, words in rules if not kept]


def _registers(p: LogitsProblem, c: IndexerConfig) -> int:
    """Of a thread: a product, weights, steps of linear columns."""
    return columns_of(p, c) // 2 + c.banks * c.tokens * (heads_of(p) // 4 + c.linear)


def refusal(p: LogitsProblem) -> str:
    """Why no configuration can run a problem."""
    if p.depth not in DEPTHS or not 1 <= p.heads <= MOST_HEADS:
        return f"the kernel takes d of {DEPTHS} and 1 to {MOST_HEADS} heads"
    largest = max(p.tokens, p.keys, p.columns)
    return f"{largest} is more than {LARGEST}, tokens, keys and columns at most" if largest > LARGEST else ""


# Choosing --------------------------------------------------------------------------------------------------

# Cycles, from times of one H200 (benchmarks/data/mqa_logits_h200.json). Reading accumulators of one product
# while others are made takes most of a warpgroup's time, so that no unit is ever full.
_CLOCK = 1.7e3  # of a microsecond, under load
_START = 8.0
_EACH_GROUP = 240.0  # 64 keys by a bank's columns, when three warpgroups overlap
_EACH_SCORE = {False: 1.7, True: 1.1}  # of a thread; with linear columns
_EACH_TOKEN = {False: 14.0, True: 24.0}
_EACH_TILE = 12.0
_TWO_WARPGROUPS = 1.04
_EXPAND = 250.0  # of an SM's quarter: 32 keys of a tile in FP4
_HIDDEN = 0.93  # of the tensor cores' time, at best
_L2_BYTES = 30.0  # of a cycle and an SM
_WRITE, _READ = 2.9e6, 3.8e6  # bytes of a microsecond
_MOST_AHEAD = 100 << 10  # bytes of pages that an SM asks for before it has them: more makes others wait


@dataclass(frozen=True)
class Cost:
    """Microseconds; `total` is what configurations are compared by.

    Attributes:
      start: launch, counting of tiles, first bytes, last stores.
      compute: of the busiest block of threads.
      memory: writing the result.
    """

    start: float
    compute: float
    memory: float

    @property
    def total(self) -> float:
        return self.start + max(self.compute, self.memory) + 0.1 * min(self.compute, self.memory)

    def __str__(self) -> str:
        terms = f"start {self.start:.1f}, compute {self.compute:.1f}, memory {self.memory:.1f}"
        return f"{self.total:.1f} us ({terms})"


def blocks_of(p: LogitsProblem, c: IndexerConfig) -> int:
    """Blocks of tokens; those of a request with pages are its own, if all have as many tokens."""
    requests = max(min(p.batches, p.tokens), 1) if p.page else 1
    return requests * ceil_div(ceil_div(p.tokens, requests), c.banks * c.tokens)


def tiles_of(p: LogitsProblem, c: IndexerConfig) -> int:
    """Tiles of all blocks of tokens, if every window has all keys of its batch."""
    own_keys = p.keys > p.columns and not p.page
    return blocks_of(p, c) * ceil_div(p.keys, tile_keys(c) * (p.batches if own_keys else 1))


def cost(p: LogitsProblem, c: IndexerConfig, chip: Chip) -> Cost:
    """The model's opinion: tensor cores, sums, or bytes from L2, whichever takes longest."""
    tensor = columns_of(p, c) / 2 * ceil_div(p.row_bytes, 32) / _HIDDEN
    scores = c.tokens * heads_of(p) / 2
    sums = _EACH_GROUP + _EACH_SCORE[c.linear] * scores + _EACH_TOKEN[c.linear] * c.tokens
    sums *= _TWO_WARPGROUPS if c.warpgroups == 2 else 1.0
    from_l2 = tile_keys(c) * p.key_bytes / _L2_BYTES
    expand = _EXPAND * p.depth / 128 if p.packed else 0.0
    cycles = expand + max(c.warpgroups * (c.banks * max(tensor, sums) + _EACH_TILE), from_l2)
    share = ceil_div(tiles_of(p, c), chip.num_sms)
    written = p.tokens * p.columns * p.out_bytes / _WRITE
    read = p.batches * p.keys * (p.key_bytes + 4) / _READ if p.page else 0.0
    return Cost(_START, share * cycles / _CLOCK, written + read)


def candidates(p: LogitsProblem, chip: Chip) -> Iterator[IndexerConfig]:
    """As many tokens as there is room for, and fewer, for few tokens; as many stages as fit. Of equals the
    first is chosen."""
    most = max(1, MOST_COLUMNS // heads_of(p))
    for tokens in dict.fromkeys((most, *(1 << i for i in reversed(range(most.bit_length()))))):
        for warpgroups, banks, sums in itertools.product(registers_of(p), (2, 1), _SUMS):
            config = IndexerConfig(tokens, 0, banks=banks, warpgroups=warpgroups, **sums)
            config = _with_most_stages(p, config, chip)
            if not problems_with(p, config) and (not config.linear or p.heads >= _FEWEST_LINEAR_HEADS):
                yield config


_FEWEST_LINEAR_HEADS = 32
"""Of few heads many sums are zero, and the errors of linear columns would be seen."""
_SUMS: tuple[dict[str, bool], ...] = ({}, {"linear": True}, {"tensor_sums": True})


def _with_most_stages(p: LogitsProblem, c: IndexerConfig, chip: Chip) -> IndexerConfig:
    """As many as fit; 0 if none does."""
    most = min(MOST_STAGES, _MOST_AHEAD // (tile_keys(c) * p.key_bytes)) if p.page else MOST_STAGES
    each = (dataclasses.replace(c, stages=stages) for stages in range(most, 0, -1))
    return next((one for one in each if shared_memory(p, one) <= chip.smem_per_block), c)


# Launching -------------------------------------------------------------------------------------------------


def kernel_name(p: LogitsProblem, c: IndexerConfig) -> str:
    """The name that profilers show."""
    parts = [
        "jdg_mqa_logits",
        "fp4" if p.packed else p.dtype,
        f"h{heads_of(p)}x{c.tokens}x{c.banks}",
        f"d{p.depth}",
    ]
    parts += [f"k{tile_keys(c)}s{c.stages}q{c.query_stages}"]
    parts += ["mma"] if c.tensor_sums else ["linear"] if c.linear else []
    parts += ["bf16out"] if p.out == "bfloat16" else []
    parts += [f"page{p.page}"] if p.page else ["compressed"] * p.compressed
    parts += ["tokens"] if p.of_tokens else []
    return "_".join(parts)


def kernel_source(p: LogitsProblem, c: IndexerConfig) -> KernelSource:
    """The source of the kernel that runs `c` on `p`, equal for any number of tokens and keys."""
    name = kernel_name(p, c)
    maps = ["queries", "keys", *["scales"] * p.is_fp8, "weights"]
    parameters = [f"{_MAP} {one}" for one in maps]
    out = "float" if p.out == "float32" else "jdg::bf16"
    parameters += ["const int* starts", "const int* ends", f"{out}* logits"]
    parameters += [f"int {one}" for one in _INTEGERS]
    parameters += ["const int* tables", "int table_width"] if p.page else []
    parameters += ["const int* requests"] if p.of_tokens else []
    text = _TEXT.format(
        mma=wgmma_wrapper(columns_of(p, c), p.dtype, p.dtype),
        out=out,
        heads=heads_of(p),
        tokens=c.tokens,
        linear=linear_of(c),
        banks=c.banks,
        consumers=c.warpgroups,
        slabs=slabs_of(p),
        steps=ceil_div(p.row_bytes, 32),
        scaled=str(p.is_fp8).lower(),
        compressed=str(p.compressed).lower(),
        tensor_sums=str(c.tensor_sums).lower(),
        stages=EXPANDED_STAGES if p.packed else c.stages,
        packed_stages=c.stages if p.packed else 0,
        query_stages=c.query_stages,
        shared=shared_memory(p, c),
        threads=threads_of(p, c),
        page=p.page,
        of_tokens=str(p.of_tokens).lower(),
        tables="tables, table_width" if p.page else "nullptr, 0",
        requests="requests" if p.of_tokens else "nullptr",
        name=name,
        parameters=", ".join(parameters),
        scales="&scales" if p.is_fp8 else "nullptr",
    )
    shown = (("problem", str(p)), ("tokens", c.tokens), ("stages", c.stages))
    return KernelSource(name, text, shown, shared_memory=shared_memory(p, c))


_INTEGERS = ("tokens", "num_keys", "columns", "batch_tokens", "batch_keys")


def tensor_maps(p: LogitsProblem, c: IndexerConfig, given: Operands) -> list[TensorMap]:
    """Maps of queries, keys, their scales, and weights. What is outside arrives as zeros: heads and tokens
    that fill up a bank, numbers that fill up 128 bytes, pages that do not exist."""
    heads, weights = heads_of(p), given["weights"]
    box, strides = (_slab(p), heads, c.tokens), (p.row_bytes, p.heads * p.row_bytes)
    dims, pitch = (p.depth, p.heads, p.tokens), 4 * weights.shape[-1]
    queries = TensorMap(Operand(given["q"].index), _DTYPES[p.dtype], dims, strides, box, 128)
    factors = (weights.shape[-1], p.tokens), (pitch,), (heads, c.banks * c.tokens)
    return [
        queries,
        *(_maps_of_pages(p, given) if p.page else _maps_of_keys(p, tile_keys(c), given)),
        TensorMap(Operand(weights.index), "float32", *factors),
    ]


_DTYPES = {"e4m3": "uint8", "bf16": "bfloat16"}


def _slab(p: LogitsProblem) -> int:
    """Numbers of 128 bytes."""
    return _SLAB_BYTES if p.is_fp8 else _SLAB_BYTES // 2


def _maps_of_keys(p: LogitsProblem, tile: int, given: Operands) -> list[TensorMap]:
    keys = Operand(given["k"].index)
    if p.packed:
        maps = [TensorMap(keys, "uint8", (p.key_bytes, p.keys), (p.key_bytes,), *_packed_box(p, tile))]
    else:
        box = (_slab(p), tile)
        maps = [TensorMap(keys, _DTYPES[p.dtype], (p.depth, p.keys), (p.row_bytes,), box, 128)]
    if p.is_fp8:
        maps.append(TensorMap(Operand(given["scales"].index), _SCALES[p.packed], (p.keys,), (), (tile,)))
    return maps


_SCALES = {False: "float32", True: "int32"}


def _packed_box(p: LogitsProblem, *rows: int) -> tuple[tuple[int, ...], int]:
    """Of keys in FP4, and how it is swizzled: rows of 16 bytes are not."""
    return (p.key_bytes, *rows), p.key_bytes if p.key_bytes > 16 else 0


def _maps_of_pages(p: LogitsProblem, given: Operands) -> list[TensorMap]:
    values = p.page * p.key_bytes
    if p.joined:
        cache = given["cache"].index
        keys, scales, pitches = Operand(cache), Operand(cache, values), (values + 4 * p.page,) * 2
    else:
        keys, scales = Operand(given["k"].index), Operand(given["scales"].index)
        pitches = values, 4 * p.page
    row = p.key_bytes
    box, swizzle = _packed_box(p, p.page, 1) if p.packed else ((_slab(p), p.page, 1), 128)
    return [
        TensorMap(keys, "uint8", (row, p.page, p.pages), (row, pitches[0]), box, swizzle),
        TensorMap(scales, _SCALES[p.packed], (p.page, p.pages), (pitches[1],), (p.page, 1)),
    ]


def _tables(p: LogitsProblem, given: Operands) -> list[Operand | Scalar]:
    if not p.page:
        return []
    tables, requests = given["tables"], [Operand(given["requests"].index)] if p.of_tokens else []
    return [Operand(tables.index), Scalar(tables.shape[1], "int32"), *requests]


def integers(p: LogitsProblem) -> tuple[int, ...]:
    """The kernel's parameters of those names."""
    own_keys = p.batches > 1 and not (p.compressed or p.page) and p.keys > p.columns
    return p.tokens, p.keys, p.columns, max(p.tokens // p.batches, 1), p.columns if own_keys else 0


def _plan(p: LogitsProblem, c: IndexerConfig, chip: Chip, given: Operands) -> LaunchPlan:
    source = kernel_source(p, c)
    launch = Launch(
        kernel=compile_kernel(source, arch=chip.arch),
        grid=(min(chip.num_sms, max(tiles_of(p, c), blocks_of(p, c))), 1, 1),
        block=threads_of(p, c),
        params=(
            *tensor_maps(p, c, given),
            Operand(given["start"].index),
            Operand(given["end"].index),
            Result(0),
            *(Scalar(value, "int32") for value in integers(p)),
            *_tables(p, given),
        ),
        shared_memory=source.shared_memory,
    )
    return LaunchPlan((launch,), label=str(p))


KERNELS = Kernels[LogitsProblem, IndexerConfig](
    config=IndexerConfig,
    candidates=candidates,
    cost=cost,
    broken_rules=lambda p, c, chip: problems_with(p, c),
    refusal=refusal,
    shared_bytes=shared_memory,
    sources=lambda p, c: [kernel_source(p, c)],
    plan=_plan,
)
