"""The translation unit of one kernel: the wgmma of its width, its configuration, its entry point."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.jit import KernelSource
from jax_deepgemm.jit.wgmma import wgmma_wrapper
from jax_deepgemm.ops.gemm.finish import AS_IT_IS
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.config import Sm90Config, passes, shared_memory, tma_store
from jax_deepgemm.ops.quantize.activation import SILU
from jax_deepgemm.ops.quantize.sm90 import activation_text

# include/jax_deepgemm/gemm/config.cuh says what each field means.
_CONFIG = """\
struct Config {{
  using Mma = ::Mma;
  using Out = {out};
  static constexpr int ROWS = {rows}, COLS = {cols}, BLOCK_K = {block_k}, STAGES = {stages};
  static constexpr int PASSES = {passes}, SPLITS = {splits}, ACROSS = {across};
  static constexpr bool HALVES = {halves};
  static constexpr int WARPGROUPS = {warpgroups}, SCALE_SLOTS = {scale_slots};
  static constexpr bool SWAP_AB = {swap_ab}, PING_PONG = {ping_pong}, GATED = {gated};
  static constexpr int SLABS = {slabs}, STAGING_BYTES = {staging};
  static constexpr int TABLE_BYTES = {table}, SHARED_BYTES = {shared};
  static constexpr int REGISTERS = {registers}, PRODUCER_REGISTERS = {producer_registers};
  static constexpr bool ROWS_K_MAJOR = {rows_k_major}, COLS_K_MAJOR = {cols_k_major}, MASK_K = {mask_k};
  static constexpr bool RUNS = {runs}, WHOLE_BLOCKS = {whole_blocks};
  static constexpr bool ROWS_ONCE = {rows_once}, COLS_ONCE = {cols_once};
  static constexpr bool ADD = {add}, REDUCE = {reduce}, TMA_STORE = {tma_store}, EVEN_N = {even_n};
  static constexpr bool BATCH_INSIDE = {batch_inside}, BATCHES_TOGETHER = {batches_together};
  static constexpr bool ROWS_BY_INDEX = {rows_by_index}, COLS_BY_INDEX = {cols_by_index};
  static constexpr jdg::Scale ROW_SCALES = jdg::Scale::{row_scales}, COL_SCALES = jdg::Scale::{col_scales};
}};
"""

_TEXT = """\
#include <jax_deepgemm/gemm/{header}.cuh>
{include}
{mma}
{config}{finish}
extern "C" __global__ void __launch_bounds__({threads}, {blocks_per_sm}) {name}({parameters}) {{
  const jdg::Operands operands = {{{operands}}};
  const jdg::Extents extents = {{m, n, batches, batched_c, stripe}};
  jdg::{header}<Config>(operands, extents, {d_map}, {d}, {c}{finished});
}}
"""

# include/jax_deepgemm/gemm/finish.cuh says what each field means.
_FINISH = """\
{act}
struct Finish {{
  using Act = ::Act;
  static constexpr jdg::Form FORM = jdg::Form::{form};
  static constexpr bool ALPHA = {alpha}, BIAS = {bias}, FILL = {fill}, QUANTIZED = {quantized};
  static constexpr int LEFT = {left}, MID = {mid}, RIGHT = {right};
}};
"""

_SCALES = {
    "vector": "kVector",
    "slices": "kSlices",
    "block": "kBlock",
    "block_slices": "kBlockSlices",
    "vector_32": "kVector32",
    "block_32": "kBlock32",
    "none": "kNone",
}
_SCALES_NAMED = {"vector": "sb1", "block_slices": "sb128", "vector_32": "sb1x32", "block_32": "sb32x32"}


def kernel_name(p: GemmProblem, c: Sm90Config) -> str:
    """The name that profilers show: operand types, layout, tile, stages; shapes are run-time parameters,
    but for D's alignment and `b_once`."""
    types = p.a if p.a == p.b else f"{p.a}_{p.b}"
    parts = ["jdg_sm90", types, p.layout, f"{c.block_m}x{c.block_n}", f"s{c.stages}"]
    parts += [f"d{c.slabs}"] if c.slabs else []
    parts += ["swap"] if c.swap_ab else []
    parts += [f"k{c.split_k}"] if c.one_tile else []
    parts += ["pp"] if c.ping_pong else []
    parts += [f"x{c.blocks_per_sm}"] if c.blocks_per_sm > 1 else []
    parts += [_SCALES_NAMED[p.b_scales]] if p.b_scales in _SCALES_NAMED else []
    parts += ["f32"] if p.out == "float32" else []
    parts += ["once"] if p.b_once else []
    parts += ["runs"] if p.runs > 1 else []
    parts += ["inside"] if p.batch_axes[2] == 1 else []
    parts += ["together"] if p.batches_together else []
    parts += ["acc" if p.reduces else "add"] if p.add_c else []
    parts += p.finish.words
    if not c.one_tile:
        parts += ["odd"] if p.columns % 2 else [] if tma_store(p, c) or p.swiglu else ["unaligned"]
    return "_".join(parts)


@dataclass(frozen=True)
class Side:
    """One operand as a kernel sees it."""

    name: str
    dtype: str
    k_major: bool
    scales: str

    @property
    def has_scale_map(self) -> bool:
        return self.scales != "none"

    @property
    def scale_map(self) -> str:
        return f"&{self.name}_scale_map" if self.has_scale_map else "nullptr"


def sides(p: GemmProblem) -> tuple[Side, Side]:
    """A and B."""
    of_a = "slices" if p.slices else "vector_32" if p.fine else "vector"
    a_scales = "none" if p.b_scales == "none" else of_a
    return Side("a", p.a, p.a_k_major, a_scales), Side("b", p.b, p.b_k_major, p.b_scales)


def config_text(
    p: GemmProblem,
    c: Sm90Config,
    rows: Side,
    cols: Side,
    *,
    mask_k: bool = False,
    whole_blocks: bool = False,
    halves: bool = False,
    by_index: str = "",
) -> str:
    """The kernel's configuration as a C++ struct.

    `halves`: whether the last tiles may be cut in two; their columns are multiplied in two passes.
    `by_index`: the side whose rows, or values of k, an index names; "": neither.
    """
    memory = shared_memory(p, c)
    return _CONFIG.format(
        out=out_type(p),
        rows=c.rows,
        cols=c.cols,
        block_k=p.block_k,
        stages=c.stages,
        passes=passes(p, c),
        across=c.across,
        halves=as_cpp(halves),
        warpgroups=c.warpgroups,
        swap_ab=as_cpp(c.swap_ab),
        ping_pong=as_cpp(c.ping_pong),
        gated=as_cpp(c.gated),
        splits=c.split_k,
        scale_slots=memory.scale_slots,
        slabs=c.slabs,
        staging=memory.staging,
        table=memory.table,
        shared=memory.total,
        registers=c.registers,
        producer_registers=c.producer_registers,
        rows_k_major=as_cpp(rows.k_major),
        cols_k_major=as_cpp(cols.k_major),
        mask_k=as_cpp(mask_k),
        runs=as_cpp(p.runs > 1),
        whole_blocks=as_cpp(whole_blocks),
        rows_once=as_cpp(p.b_once if c.swap_ab else p.batches_together),
        cols_once=as_cpp(p.batches_together if c.swap_ab else p.b_once),
        add=as_cpp(reads_c(p)),
        reduce=as_cpp(p.reduces),
        tma_store=as_cpp(tma_store(p, c)),
        even_n=as_cpp(p.columns % 2 == 0),
        batch_inside=as_cpp(p.batch_axes[2] == 1),
        batches_together=as_cpp(p.batches_together),
        rows_by_index=as_cpp(by_index == rows.name),
        cols_by_index=as_cpp(by_index == cols.name),
        row_scales=_SCALES[rows.scales],
        col_scales=_SCALES[cols.scales],
    )


def product(p: GemmProblem, c: Sm90Config, rows: Side, cols: Side) -> str:
    """The wgmma that the kernel issues."""
    width = c.cols // passes(p, c) // c.across
    return wgmma_wrapper(width, rows.dtype, cols.dtype, a_k_major=rows.k_major, b_k_major=cols.k_major)


def as_cpp(value: bool) -> str:
    return str(value).lower()


def finish_text(p: GemmProblem) -> str:
    """What the product becomes, as a C++ struct; none if nothing."""
    finish = p.finish
    if finish == AS_IT_IS:
        return ""
    gated = "kInHalves" if finish.apart else "kInPairs"
    form = "kNone" if finish.activation is None else "kEach" if finish.each else gated
    left, mid, right = finish.heads or (1, 0, 0)
    return _FINISH.format(
        act=activation_text(finish.activation or SILU),
        form=form,
        alpha=as_cpp(finish.alpha),
        bias=as_cpp(finish.bias),
        fill=as_cpp(finish.fill),
        quantized=as_cpp(finish.quantized),
        left=left,
        mid=mid,
        right=right,
    )


def finish_include(p: GemmProblem) -> str:
    return "" if p.finish == AS_IT_IS else "#include <jax_deepgemm/gemm/finish.cuh>\n"


def finish_argument(p: GemmProblem, batched: list[str]) -> str:
    """The last argument of a kernel whose product becomes something; what moves with a batch as given."""
    if p.finish == AS_IT_IS:
        return ""
    given = [name if getattr(p.finish, name) else "nullptr" for name in ("alpha", "bias")]
    given += [*batched, *(["values", "out_scales"] if p.finish.quantized else [])]
    return f", jdg::Finish<Finish>{{{', '.join(given)}}}"


def written(p: GemmProblem) -> str:
    """D as the kernel's argument; none where values and scales are written."""
    return f"static_cast<{out_type(p)}*>(nullptr)" if p.finish.quantized else "d"


def coefficients(p: GemmProblem) -> list[str]:
    """Parts whose numbers the product meets before it is stored."""
    return [name for name in ("alpha", "bias") if getattr(p.finish, name)]


def reads_c(p: GemmProblem) -> bool:
    """Whether C is an operand of the kernel."""
    return p.add_c and not p.reduces


def out_type(p: GemmProblem) -> str:
    return "float" if p.out == "float32" else "jdg::bf16"


def leading_parameters(p: GemmProblem, c: Sm90Config) -> list[str]:
    """Tensor maps and pointers, in the order in which a plan passes them."""
    map_type = "const __grid_constant__ jdg::TensorMap"
    a, b = sides(p)
    maps = [f"{map_type} {side.name}_map" for side in (a, b)]
    maps += [f"{map_type} {side.name}_scale_map" for side in (a, b) if side.has_scale_map]
    if p.swiglu:
        return [*maps, "jdg::u8* values", "float* act_scales", "const float* row_weights"]
    maps += [f"{map_type} d_map"] if tma_store(p, c) else []
    pointers = ["jdg::u8* values", "float* out_scales"] if p.finish.quantized else [f"{out_type(p)}* d"]
    pointers += [f"const {out_type(p)}* c"] if reads_c(p) else []
    pointers += [f"const float* {name}" for name in coefficients(p)]
    return maps + pointers


def described(p: object, c: Sm90Config) -> tuple[tuple[str, object], ...]:
    """What `explain` says of a kernel."""
    always = ("block_m", "block_n", "stages", "swap_ab", "split_k", "blocks_per_sm", "slabs", "ping_pong")
    shown = (*always, "gated") if c.gated else always
    return (("problem", str(p)), *((field, getattr(c, field)) for field in shown))


def kernel_source(p: GemmProblem, c: Sm90Config) -> KernelSource:
    """The source of the kernel that runs `c` on `p`; equal for all shapes whose D is aligned alike and whose
    B is equally `b_once`."""
    a, b = sides(p)
    rows, cols = (b, a) if c.swap_ab else (a, b)
    operands = [f"&{rows.name}_map", f"&{cols.name}_map", rows.scale_map, cols.scale_map, "k_blocks"]
    operands += [f"batched_{side.name}{of}" for of in ("", "_scales") for side in (rows, cols)]
    operands += ["run_blocks"] if p.runs > 1 else []
    name = kernel_name(p, c)
    batched = [f"batched_{name}" if getattr(p.finish, name) else "0" for name in ("alpha", "bias")]
    text = _TEXT.format(
        header="gemm_small_m" if c.one_tile else "gemm",
        include=finish_include(p),
        finish=finish_text(p),
        d=written(p),
        finished=finish_argument(p, batched),
        mma=product(p, c, rows, cols),
        config=config_text(p, c, rows, cols),
        d_map="&d_map" if tma_store(p, c) else "nullptr",
        threads=c.threads,
        blocks_per_sm=c.blocks_per_sm,
        name=name,
        parameters=", ".join([*leading_parameters(p, c), *(f"int {x}" for x in integers(p))]),
        operands=", ".join(operands),
        c="c" if reads_c(p) else "nullptr",
    )
    return KernelSource(name, text, described(p, c), shared_memory=shared_memory(p, c).total)


def integers(p: GemmProblem) -> tuple[str, ...]:
    """The kernel's last parameters."""
    batched = tuple(f"batched_{part}" for part in ("a", "b", "a_scales", "b_scales", "c", *coefficients(p)))
    return ("m", "n", "batches", "k_blocks", "stripe", *batched, *(("run_blocks",) if p.runs > 1 else ()))
