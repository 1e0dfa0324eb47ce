"""The memory-bound kernels that make FP8: problem -> source text and LaunchPlan.

One tile of 128 x 128 per block of threads, or lower ones side by side; include/jax_deepgemm/quantize/
quantize_tile.cuh says how, and fine.cuh of blocks of 32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jax_deepgemm.core.chip import Chip
from jax_deepgemm.core.family import Kernels, Operands
from jax_deepgemm.core.launch import Launch, LaunchPlan, Operand, Param, Result, Scalar, Scratch
from jax_deepgemm.jit import KernelSource, compile_kernel
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.problem import FINE, TILE, QuantizeProblem

SUM_THREADS = 256
STRIPE_BYTES, STRIPE_TILES = 8 << 20, 8
"""Of rows that are taken by an index: a part of L2, and no more tiles than fill whole lines of DRAM."""

# include/jax_deepgemm/quantize/quantize_tile.cuh says what each field means.
_TEXT = """\
#include <jax_deepgemm/{header}.cuh>
{include}
struct Config {{
  using In = {x};
  using Fp8 = jdg::{fp8};
  static constexpr jdg::Scales SCALES = jdg::Scales::{scales};
  static constexpr int TILES = {tiles}, HEIGHT = {height}, ROWS = {rows_of_a_thread};
  static constexpr float MIN_AMAX = {min_amax};
  static constexpr bool UE8M0 = {ue8m0}, TRANSPOSED = {transposed}, LIMITED = {limited};
  static constexpr bool SQUARE_T = {square_t};
  static constexpr bool BLOCKED = {blocked}, INDEXED = {indexed};
  static constexpr bool WEIGHTED = {weighted}, ALIGNED = {aligned}, ALIGNED_T = {aligned_t};
}};
{activation}
extern "C" __global__ void __launch_bounds__({threads}, {blocks_per_sm}) {name}({parameters}) {{
  {head}const jdg::Quantized to = {{values, scales, {values_t}, {scales_t}, rows, cols, {rows_t}}};
  {body}
}}
"""

# include/jax_deepgemm/swiglu/activation.cuh says what each field means.
_ACTIVATION = """
struct Act {{
  static constexpr jdg::Function FUNCTION = jdg::Function::{function};
  static constexpr float LIMIT = {limit}, ALPHA = {alpha}, SHIFT = {shift};
  static constexpr bool INTERLEAVED = {interleaved};
}};
"""

_SUM_TEXT = """\
#include <jax_deepgemm/swiglu/swiglu.cuh>

extern "C" __global__ void {name}(const float* parts, float* sums, int tiles, int rows, int batches) {{
  jdg::add_parts(parts, sums, tiles, rows, batches);
}}
"""

_IN_A_CHAIN = "jdg::ptx::wait_for_previous_kernel();\n  jdg::ptx::let_next_kernel_start();\n  "
_ROWS = "const jdg::CountedRows counted = {{{limit}, {blocks}, {batched_limit}}};\n  "
_INPUTS = (
    _ROWS + "using Inputs = jdg::SwigluInputs<Config::In, jdg::kHalves<Act>>;\n  "
    "const Inputs in = {{h, {weight}, {dact}, {flags}, {width}}};\n  "
)
_BODIES = {
    "quantize_copies": "const jdg::Copies copies = {{position, slots, rows, share}};\n  "
    "jdg::quantize_copies<Config>({{x, index, sources, 0, 1}}, copies, to);",
    "quantize": _ROWS + "jdg::quantize<Config>({{x, {index}, {sources}, batched_x, {stripe}}}, counted, to);",
    "quantize_fine": "jdg::quantize_fine<Config>(x, batched_x, to);",
    "quantize_stream": _ROWS
    + "jdg::quantize_stream<Config>({{x, {index}, {sources}, 0, {stripe}}}, counted, to, tiles);",
    "swiglu": _INPUTS + "jdg::swiglu<Config, Act>(in, counted, to);",
    "swiglu_grad": _INPUTS + "jdg::swiglu_grad<Config, Act>(in, counted, to, {parts});",
    "swiglu_grad_pairs": _INPUTS + "jdg::swiglu_grad_pairs<Config, Act>(in, counted, to, {parts}, tiles);",
}
_TYPES = {"bfloat16": "jdg::bf16", "float16": "jdg::f16", "float32": "float"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_FP8 = {"float8_e4m3fn": "E4m3", "float8_e5m2": "E5m2"}
_FUNCTIONS = {"silu": "kSilu", "gelu": "kGelu", "relu2": "kReluSquared"}
_SCALES = {(1, TILE): "kRow", (TILE, 1): "kColumn", (TILE, TILE): "kBlock"}
_SCALES |= {(1, FINE): "kRow", (FINE, FINE): "kBlock"}


class Cut(NamedTuple):
    """How a matrix is cut: threads of a block, rows of a thread, tiles side by side, blocks that an SM should
    hold."""

    threads: int
    rows: int
    across: int
    blocks_per_sm: int

    @property
    def height(self) -> int:
        """Rows of a tile, each of which 16 threads share."""
        return self.threads // 16 * self.rows


ROW_CUT = Cut(threads=256, rows=1, across=8, blocks_per_sm=4)
"""Where 1x128 scales are all: a row's eight fill a sector of memory, in one store. Of tiles of 128 rows each
scale would be a store to a sector of its own. rows * across: a power of two, at most 16."""

COPY_THREADS = 128
"""Of a block whose threads need not wait for each other."""


def row_cut(cols: int) -> Cut:
    """ROW_CUT, its tiles halved and rows doubled until at most a quarter more tiles are walked than exist.

    >>> [row_cut(cols).across for cols in (7168, 2112, 1536, 576, 128)]
    [8, 4, 4, 2, 1]
    """
    shape, tiles = ROW_CUT, -(-cols // TILE)
    while -tiles % shape.across * 4 > tiles:
        shape = shape._replace(rows=shape.rows * 2, across=shape.across // 2)
    return shape


def cut_of(p: QuantizeProblem) -> Cut:
    """How a tile is divided among threads."""
    if p.pairs:
        return Cut(512, 4, 1, 1)
    quick = p.aligned and (p.aligned_t or not p.transposed)
    if p.fine:
        return Cut(128, 4, 1, 4 if p.x == "float32" or not p.aligned else 8)
    if p.kind != "quantize":
        return Cut(256, 8, 1, 2 if quick and p.x != "float32" else 1)
    few = p.x == "float32" or p.fp8 != "float8_e4m3fn" or not quick
    if p.block == (1, TILE) and not p.transposed:
        shape = row_cut(p.cols)
        if p.copied:
            shape = shape._replace(threads=COPY_THREADS, blocks_per_sm=7)
        return shape._replace(blocks_per_sm=shape.blocks_per_sm // 2) if few else shape
    if few:
        return Cut(256, 8, 1, 2)
    return Cut(256, 8, 1, 3 if p.transposed or p.block == (TILE, 1) else 4)


def tiles(p: QuantizeProblem) -> int:
    """Tiles of all matrices, those side by side as one; 1 if there are none, as a grid is never empty."""
    cols, shape = p.width if p.pairs else p.cols, cut_of(p)
    down = p.blocks or -(-(p.copied or p.rows) // shape.height) * p.batches
    return max(down * -(-cols // (shape.across * TILE)), 1)


def stripe(p: QuantizeProblem, sources: int) -> int:
    """Columns of tiles to be done before the next ones, so that x's part of them stays in L2 meanwhile."""
    item = 4 if p.x == "float32" else 2
    fit = STRIPE_BYTES // (max(sources, 1) * TILE * item * cut_of(p).across)
    return max(min(fit, STRIPE_TILES), 1)


def shared_memory(p: QuantizeProblem) -> int:
    """Dynamic shared memory: PairsShared of swiglu.cuh, StreamShared of quantize.cuh; others' is static."""
    if not p.walked:
        return 0
    threads, rows, *_ = cut_of(p)
    inputs, tiles = (3, 2) if p.pairs else (1, 1)
    words = tiles * TILE * TILE if p.transposed else 16
    return inputs * rows * threads * 16 + words + tiles * (threads // 32 + 1) * TILE * 4


def _body(p: QuantizeProblem) -> str:
    forms = {"_pairs": p.pairs, "_stream": p.streamed, "_copies": p.copied > 0, "_fine": p.fine}
    return p.kind + next((form for form, on in forms.items() if on), "")


def kernel_name(p: QuantizeProblem) -> str:
    """The name that profilers show."""
    parts = [
        "jdg",
        _body(p),
        *([p.activation.tag] if p.activation.tag else []),
        f"{p.block[0]}x{p.block[1]}",
        _SHORT[p.x],
        _FP8[p.fp8].lower(),
    ]
    shape = cut_of(p)
    parts += [f"tile{shape.height}x{shape.across * TILE}"] if shape.height != TILE else []
    flags = {
        "t": p.transposed and not p.square_t,
        "t128": p.square_t,
        "ue8m0": p.ue8m0,
        "clamped": p.min_amax > 0,
        "rows": p.limited,
        "groups": p.blocks > 0,
        "indexed": p.indexed and not p.copied,
        "w": p.weighted,
        "chained": p.chained,
    }
    parts += [name for name, on in flags.items() if on]
    parts += [] if p.aligned and (p.aligned_t or not p.transposed) else ["unaligned"]
    return "_".join(parts)


def _pointers(p: QuantizeProblem) -> dict[str, str]:
    """Name -> type of the pointers, operands first, then results, in the op's order."""
    swiglu = p.kind != "quantize"
    wanted = {
        "h" if swiglu else "x": "const Config::In*",
        "weight": "const float*" if p.weighted else "",
        "dact": "const Config::In*" if p.kind == "swiglu_grad" else "",
        "index": "const int*" if p.indexed else "",
        "position": "const int*" if p.copied else "",
        "blocks": "const jdg::RowBlock*" if p.blocks else "",
        "limit": "const int*" if p.limited else "",
        "values": "jdg::u8*",
        "scales": "float*",
        "values_t": "jdg::u8*" if p.transposed else "",
        "scales_t": "float*" if p.transposed and p.block == (1, TILE) else "",
    }
    return {name: kind for name, kind in wanted.items() if kind}


def _integers(p: QuantizeProblem) -> list[str]:
    names = ["x", "limit"] if p.kind == "quantize" else ["h", "weight", "dact", "limit"]
    if p.copied:
        return ["rows", "cols", "sources", "slots", "share"]
    more = {"tiles": p.walked, "sources": p.indexed, "stripe": p.indexed, "row_blocks": p.blocks > 0}
    return [
        "rows",
        "cols",
        *(f"batched_{name}" for name in names),
        *(name for name, on in more.items() if on),
    ]


def _literal(number: float) -> str:
    return f"{np.float32(number).item().hex()}f"


def activation_text(a: Activation) -> str:
    """`struct Act` of a kernel's source."""
    return _ACTIVATION.format(
        function=_FUNCTIONS[a.function],
        limit="jdg::kInfinity" if a.limit is None else _literal(a.limit),
        alpha=_literal(a.alpha),
        shift=_literal(a.shift),
        interleaved=str(a.interleaved).lower(),
    )


def _header(p: QuantizeProblem) -> str:
    if p.kind != "quantize":
        return "swiglu/swiglu"
    return "quantize/fine" if p.fine else "quantize/copies" if p.copied else "quantize/quantize"


def kernel_source(p: QuantizeProblem) -> KernelSource:
    """The source of the kernel that solves p, equal for all sizes that are aligned and divided alike."""
    shape = cut_of(p)
    pointers = _pointers(p)
    parts = {"parts": "float*"} if p.kind == "swiglu_grad" and p.weighted else {}
    parameters = [f"{kind} {name}" for name, kind in {**pointers, **parts}.items()]
    parameters += [f"int {name}" for name in _integers(p)]
    names = ("weight", "dact", "limit", "index", "blocks", "values_t", "scales_t", "parts")
    given = {name: name if name in {**pointers, **parts} else "nullptr" for name in names}
    flags = ", ".join(name for name in _integers(p) if name.startswith("batched") and "limit" not in name)
    given |= {"sources": "sources" if p.indexed else "rows", "stripe": "stripe" if p.indexed else "1"}
    given |= {"batched_limit": "batched_limit"}
    width = f"cols / {p.activation.halves}" if p.kind == "swiglu_grad" else "cols"
    name = kernel_name(p)
    body = _BODIES[_body(p)]
    text = _TEXT.format(
        header=_header(p),
        x=_TYPES[p.x],
        fp8=_FP8[p.fp8],
        scales=_SCALES[p.block],
        min_amax=_literal(p.min_amax),
        activation="" if p.kind == "quantize" else activation_text(p.activation),
        tiles=2 if p.pairs else shape.across,
        height=shape.height,
        rows_of_a_thread=shape.rows,
        threads=shape.threads,
        blocks_per_sm=shape.blocks_per_sm,
        name=name,
        parameters=", ".join(parameters),
        values_t=given["values_t"],
        scales_t=given["scales_t"],
        rows_t="row_blocks * jdg::kTile" if p.blocks else "rows",
        include="#include <jax_deepgemm/ptx/barrier.cuh>\n" if p.chained else "",
        head=_IN_A_CHAIN if p.chained else "",
        blocked=str(p.blocks > 0).lower(),
        body=body.format(**given, flags=flags, width=width),
        **{
            flag: str(getattr(p, flag)).lower()
            for flag in (
                "ue8m0",
                "transposed",
                "square_t",
                "limited",
                "indexed",
                "weighted",
                "aligned",
                "aligned_t",
            )
        },
    )
    return KernelSource(name, text, (("problem", str(p)),), shared_memory=shared_memory(p))


def sum_source() -> KernelSource:
    """The source of the kernel that adds the partial sums of the tiles."""
    name = "jdg_swiglu_grad_sum"
    return KernelSource(name, _SUM_TEXT.format(name=name))


def _plan(p: QuantizeProblem, config: None, chip: Chip, given: Operands) -> LaunchPlan:
    """One launch; with a gradient of weights a second one, which adds the tiles' sums in order."""
    pointers = list(_pointers(p))
    operands = pointers[: pointers.index("values")]
    params: list[Param] = [Operand(i) for i in range(len(operands))]
    params += [Result(i) for i in range(len(pointers) - len(operands))]
    sums = p.kind == "swiglu_grad" and p.weighted
    params += [Scratch(0)] if sums else []
    values = {"rows": p.rows, "cols": p.cols, "tiles": tiles(p) if p.rows and p.cols else 0}
    sources = given[next(iter(given))].shape[-2]
    values |= {"row_blocks": p.blocks, "sources": sources, "stripe": stripe(p, sources)}
    if p.copied:
        values |= {"slots": given["position"].shape[-1], "share": -(-p.rows // p.copied)}
    values |= {f"batched_{name}": int(one.batched) for name, one in given.items()}
    params += [Scalar(values.get(name, 0), "int32") for name in _integers(p)]
    launch = Launch(
        kernel=compile_kernel(kernel_source(p), arch=chip.arch),
        grid=(min(tiles(p), chip.num_sms * cut_of(p).blocks_per_sm) if p.walked else tiles(p), 1, 1),
        block=cut_of(p).threads,
        params=tuple(params),
        shared_memory=shared_memory(p),
    )
    if not sums:
        return LaunchPlan((launch,), label=str(p))
    columns = p.summed
    integers = (columns, p.rows, p.batches)
    add = Launch(
        kernel=compile_kernel(sum_source(), arch=chip.arch),
        grid=(max(-(-p.rows * p.batches // SUM_THREADS), 1), 1, 1),
        block=SUM_THREADS,
        params=(
            Scratch(0),
            Result(len(pointers) - len(operands)),
            *(Scalar(i, "int32") for i in integers),
        ),
    )
    return LaunchPlan((launch, add), (max(columns * p.rows * p.batches * 4, 4),), label=str(p))


def _sources(p: QuantizeProblem, config: None) -> list[KernelSource]:
    return [kernel_source(p), *([sum_source()] if p.kind == "swiglu_grad" and p.weighted else [])]


KERNELS = Kernels[QuantizeProblem, None](
    sources=_sources, plan=_plan, shared_bytes=lambda p, config: shared_memory(p)
)
