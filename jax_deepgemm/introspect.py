"""What a function will launch on a GPU, and why: found by tracing, with no GPU needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_deepgemm import config
from jax_deepgemm.cli.text import bytes_text, table
from jax_deepgemm.core import kernel_rule
from jax_deepgemm.core.op import Op, known_ops
from jax_deepgemm.sm90 import tuning
from jax_deepgemm.sm90.chip import H200, Chip, with_sms
from jax_deepgemm.sm90.config import GemmConfig
from jax_deepgemm.sm90.cost import Cost

SHOWN_CANDIDATES = 6


@dataclass(frozen=True)
class KernelFacts:
    """One launch of a call, as compiled.

    Attributes:
      name: of the kernel.
      digest: sha256 of its cubin.
      grid, block, cluster: of the launch.
      shared_memory: dynamic, in bytes.
      registers: per thread.
      spill_bytes, local_bytes: what did not fit in them; 0 in a good kernel.
      compile_seconds: what it cost to compile it, now or when it entered the cache.
      from_cache: whether it came from the cache.
    """

    name: str
    digest: str
    grid: tuple[int, int, int]
    block: int
    cluster: int
    shared_memory: int
    registers: int
    spill_bytes: int
    local_bytes: int
    compile_seconds: float
    from_cache: bool


@dataclass(frozen=True)
class ExplainedCall:
    """One custom call of a traced function.

    Attributes:
      op: the primitive's name.
      problem: what is to be computed, in words.
      config: the configuration chosen; None of ops that have only one.
      candidates: (configuration, cost) of every candidate, cheapest first; an op takes any as `config=`.
      stages: slots of the shared-memory ring.
      scratch_bytes: memory that XLA gives to the call besides its result.
      kernels: what is launched; empty where no compiler is installed, or XLA runs the call.
      note: why there are no kernels, and what to do about it, or "".
      origin: of the configuration: "given", "measured ... (FILE)" of a tuning file, or "cost model".
      flops: multiplications and additions of a product (a grouped one: if every row belongs to a group); 0 of
        others. XLA's `cost_analysis` has no number for custom calls.
    """

    op: str
    problem: str
    config: GemmConfig | None
    candidates: tuple[tuple[GemmConfig, Cost], ...]
    stages: int
    scratch_bytes: int
    kernels: tuple[KernelFacts, ...]
    note: str = ""
    origin: str = ""
    flops: int = 0

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.problem}"]
        if self.config is not None:
            lines += [f"  config   {self.config}, {self.origin}", f"  stages   {self.stages}"]
        if self.kernels or self.config is not None:
            lines.append(f"  scratch  {bytes_text(self.scratch_bytes)}")
        for one in self.kernels:
            origin = "from the cache" if one.from_cache else "compiled now"
            lines += [
                f"  kernel   {one.name}",
                f"           grid {'x'.join(map(str, one.grid))}, block {one.block}, cluster {one.cluster}, "
                f"shared memory {bytes_text(one.shared_memory)}",
                f"           {one.registers} registers, {one.spill_bytes} bytes spilled, "
                f"{one.local_bytes} bytes local",
                f"           cubin {one.digest[:16]}, {one.compile_seconds * 1e3:.0f} ms to compile, "
                f"{origin}",
            ]
        if self.note:
            lines.append(f"  note     {self.note}")
        shown = self.candidates[:SHOWN_CANDIDATES]
        if shown:
            lines.append(f"  {len(self.candidates)} candidates, the cheapest:")
            lines += ["    " + line for line in table(("config", "cost"), shown).splitlines()]
        return "\n".join(lines)


def explain(
    function: Callable[..., Any], *args: Any, chip: Chip | None = None, show: bool = True
) -> list[ExplainedCall]:
    """Says what a function will launch on a GPU: for each call its problem, configuration, candidates and
    kernels.

    The function is traced, not run, and needs no GPU. On a mesh the shapes are those of the whole arrays,
    not of a device's share.

    Args:
      function: plain or jitted; traced with `args`.
      args: arrays, or `jax.ShapeDtypeStruct`s.
      chip: the GPU to choose for: by default the one here, or an H200 where there is none.
      show: whether to print the explanation.

    Returns:
      one `ExplainedCall` for each call of an op of this package that launches kernels, or leaves to XLA what
      kernels could do of other operands (its note says why), in order of appearance.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_nt, explain
    >>> a = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)
    >>> [call] = explain(bf16_gemm_nt, a, a, show=False)
    >>> call.problem
    'bf16xbf16 nt m=4096 n=4096 k=2048 -> bfloat16'

    >>> call.flops == 2 * 4096 * 4096 * 2048
    True

    Another of the candidates is an op's `config=`:

    >>> second, _ = call.candidates[1]
    >>> [call] = explain(lambda a, b: bf16_gemm_nt(a, b, config=second), a, a, show=False)
    >>> call.config == second
    True
    """
    traced = jax.make_jaxpr(function)(*args)
    here = chip or _chip_here()
    calls = [_explained(op, avals, params, here) for op, avals, params in _op_calls(traced.jaxpr)]
    if show:
        print("\n\n".join(map(str, calls)) or "No op of jax_deepgemm in this function.")
    return calls


def kernel_names(function: Callable[..., Any], *args: Any) -> list[str]:
    """Returns the names of the kernels a function launches, without repetition."""
    calls = explain(function, *args, show=False)
    return list(dict.fromkeys(one.name for call in calls for one in call.kernels))


def problems(function: Callable[..., Any], *args: Any, chip: Chip = H200) -> list[tuple[Any, Chip]]:
    """Returns the problems of a function, as its kernels see them, each with the part of the chip it may use.

    Args:
      function, args: as in `explain`.
      chip: the whole GPU.

    Returns:
      (GemmProblem or GroupedProblem, chip) of each call that has configurations to choose from.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_nt
    >>> a = jax.ShapeDtypeStruct((64, 100), jnp.bfloat16)
    >>> [(problem, chip)] = problems(bf16_gemm_nt, a, a)
    >>> str(problem), chip.num_sms
    ('bf16xbf16 nt m=64 n=64 k=104 -> bfloat16', 132)
    """
    found = []
    for op, avals, params in _op_calls(jax.make_jaxpr(function)(*args).jaxpr):
        problem = _at_kernel(op, avals, params)[-1]
        if problem is not None:
            found.append((problem, with_sms(chip, params.get("num_sms"))))
    return found


def _chip_here() -> Chip:
    for device in jax.devices():
        if getattr(device, "compute_capability", None) == kernel_rule.COMPUTE_CAPABILITY:
            return kernel_rule.chip_of(device)
    return H200


def _op_calls(jaxpr: Any) -> Iterator[tuple[Op, list[Any], dict[str, Any]]]:
    """The calls of ops in a jaxpr and in those inside it: loops, branches, checkpoints, derivatives."""
    known = {primitive: op for primitive, op in known_ops().items() if op.kernel or op.without_kernel}

    def walk(one: Any) -> Iterator[tuple[Op, list[Any], dict[str, Any]]]:
        for equation in one.eqns:
            op = known.get(equation.primitive)
            if op is not None:
                yield op, [variable.aval for variable in equation.invars], dict(equation.params)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from walk(getattr(inner, "jaxpr", inner))

    yield from walk(jaxpr)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _explained(op: Op, avals: list[Any], params: dict[str, Any], chip: Chip) -> ExplainedCall:
    refusal = kernel_rule.symbolic_shapes(op, avals)
    if refusal:
        raise ValueError(refusal)
    if op.without_kernel is not None:
        return _without_kernel(op, avals, params)
    ins, outs, carried, problem = _at_kernel(op, avals, params)
    kernels, scratch, note = _compiled(op, ins, outs, carried, chip, params)
    ranked: list[tuple[GemmConfig, Cost]] = []
    chosen: GemmConfig | None = None
    origin = ""
    if problem is not None:
        usable = with_sms(chip, params.get("num_sms"))
        ranked = problem.ranked(usable)
        chosen, origin = _choice(problem, usable, params.get("config"), ranked)
        if not kernels:
            note = f"{note} Shared memory would be {bytes_text(problem.shared_bytes(chosen))}."
    return ExplainedCall(
        op=op.name,
        problem=_types(ins) if problem is None else str(problem),
        config=chosen,
        candidates=tuple(ranked),
        stages=chosen.stages if chosen else 0,
        scratch_bytes=scratch,
        kernels=kernels,
        note=note,
        origin=origin,
        flops=problem.flops if problem is not None else 0,
    )


def _types(avals: list[Any]) -> str:
    return ", ".join(f"{one.dtype.name}{list(one.shape)}" for one in avals)


def _without_kernel(op: Op, avals: list[Any], params: dict[str, Any]) -> ExplainedCall:
    assert op.without_kernel is not None
    note = op.without_kernel(avals, **params)
    return ExplainedCall(op.name, _types(avals), None, (), 0, 0, (), note)


def _choice(
    problem: Any, chip: Chip, given: GemmConfig | None, ranked: list[tuple[GemmConfig, Cost]]
) -> tuple[GemmConfig, str]:
    """What the call runs with, and where that is from; in the order of `choose`."""
    if given is not None:
        return given, "given"
    entry = tuning.lookup(problem, chip)
    if entry is not None:
        return entry.config, f"{entry} ({config.tuning_file(chip.name)})"
    return ranked[0][0], "cost model"


def _at_kernel(
    op: Op, avals: list[Any], params: dict[str, Any]
) -> tuple[list[Any], list[Any], Any, Any | None]:
    """Types and batch as the kernel sees them, and the problem that they make, if it has configurations.

    Leaves in `params` what the kernel takes.
    """
    batch = params.pop("batch")
    for machinery in ("out_sharding", "fallback", "reduce_dtype"):
        params.pop(machinery, None)
    ins, outs, carried = _kernel_types(op, avals, batch, params)
    describe = getattr(op.kernel, "problem", None)
    problem = describe(ins, outs, batch=carried, **params) if describe is not None else None
    return ins, outs, carried, problem


def _kernel_types(
    op: Op, avals: list[Any], batch: Any, params: dict[str, Any]
) -> tuple[list[Any], list[Any], Any]:
    """Types as the kernel sees them: vmap's levels in one dimension, rows padded."""

    def prepared(*arrays: jax.Array) -> list[jax.Array]:
        folded, _ = kernel_rule.fold(arrays, batch)
        return list(op.kernel_prepare(*folded, **params)) if op.kernel_prepare is not None else list(folded)

    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    ins = jax.eval_shape(prepared, *arguments)
    carried = tuple(any(on[i] for on in batch) for i in range(len(avals))) if batch else None
    size = next(ins[i].shape[0] for i in range(len(ins)) if carried[i]) if carried else None
    own = [one.shape[sum(level[i] for level in batch) :] for i, one in enumerate(arguments)]
    outs = [
        jax.ShapeDtypeStruct(((size, *shape) if size is not None else tuple(shape)), np.dtype(dtype))
        for shape, dtype in op.result(*own, **params)
    ]
    return ins, outs, carried


def _compiled(
    op: Op, ins: list[Any], outs: list[Any], carried: Any, chip: Chip, params: dict[str, Any]
) -> tuple[tuple[KernelFacts, ...], int, str]:
    from jax_deepgemm.jit.toolchain import CompilerNotFoundError

    assert op.kernel is not None
    try:
        plan = op.kernel(ins, outs, batch=carried, chip=chip, **params)
    except CompilerNotFoundError as error:
        return (), 0, f"Not compiled: {error}"
    facts = []
    for step in plan.steps:
        if not hasattr(step, "kernel"):
            continue
        report = step.kernel.report
        facts.append(
            KernelFacts(
                name=step.kernel.name,
                digest=step.kernel.digest,
                grid=step.grid,
                block=step.block,
                cluster=step.cluster,
                shared_memory=step.shared_memory,
                registers=report.registers,
                spill_bytes=report.spill_store_bytes + report.spill_load_bytes,
                local_bytes=report.local_bytes,
                compile_seconds=report.compile_seconds,
                from_cache=report.from_cache,
            )
        )
    return tuple(facts), sum(plan.scratch_bytes), ""
