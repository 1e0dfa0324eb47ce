"""What a function will launch on a GPU, and why: found by tracing, with no GPU needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm import config
from jax_deepgemm.core.chip import H200, Chip, chip_of, with_knobs, with_sms
from jax_deepgemm.core.declaration import own
from jax_deepgemm.core.family import Cost
from jax_deepgemm.core.kernel_rule import on_kernel, symbolic_shapes
from jax_deepgemm.core.launch import Launch
from jax_deepgemm.core.op import Op, known_ops
from jax_deepgemm.jit.toolchain import CompilerNotFoundError
from jax_deepgemm.tools.registry import families
from jax_deepgemm.tools.text import bytes_text, table

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
      stages: slots of the shared-memory ring; 0 of kernels without one.
      scratch_bytes: memory that XLA gives to the call besides its result.
      kernels: what is launched; empty where no compiler is installed, or XLA runs the call.
      note: why there are no kernels, and what to do about it, or "".
      origin: of the configuration: "given", "measured ... (FILE)" of a tuning file, or "cost model".
      flops: multiplications and additions of a product (a grouped one: if every row belongs to a group); 0 of
        others. XLA's `cost_analysis` has no number for custom calls.
    """

    op: str
    problem: str
    config: Any | None
    candidates: tuple[tuple[Any, Cost], ...]
    stages: int
    scratch_bytes: int
    kernels: tuple[KernelFacts, ...]
    note: str = ""
    origin: str = ""
    flops: int = 0

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.problem}"]
        if self.config is not None:
            lines.append(f"  config   {self.config}, {self.origin}")
            lines += [f"  stages   {self.stages}"] if self.stages else []
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
      An `ExplainedCall` for each call of an op of this package that launches kernels, or leaves to XLA what
      kernels could do of other operands (its note says why), in order of appearance.

    Raises:
      ValueError, TypeError: what the function raises while it is traced; a `config=` that cannot run its
      call.

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
    here = chip or chip_here()
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
      (problem, chip) of each call that has configurations to choose from.

    >>> import jax, jax.numpy as jnp
    >>> from jax_deepgemm import bf16_gemm_nt
    >>> a = jax.ShapeDtypeStruct((64, 100), jnp.bfloat16)
    >>> [(problem, chip)] = problems(bf16_gemm_nt, a, a)
    >>> str(problem), chip.num_sms
    ('bf16xbf16 nt m=64 n=64 k=104 -> bfloat16', 132)
    """
    found = []
    for op, avals, params in _op_calls(jax.make_jaxpr(function)(*args).jaxpr):
        if op.kernel is None:
            continue
        view = _at_kernel(op, avals, params)
        if op.kernel.family.kernels_for(chip).config is not None:
            found.append((view.problem, _usable(chip, params)))
    return found


def chip_here() -> Chip:
    """Returns the first GPU here that a family has kernels for, or else an H200."""
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        if capability is not None and any(family.runs_on(capability) for family in families()):
            return chip_of(device)
    return H200


def _usable(chip: Chip, params: dict[str, Any]) -> Chip:
    """The part of the GPU that a call may use, as it may be used."""
    return with_sms(with_knobs(chip, params.get("knobs", ())), params.get("num_sms"))


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
    if op.kernel is None:
        return _without_kernel(op, avals, params)
    refusal = symbolic_shapes(op, avals)
    if refusal:
        raise ValueError(refusal)
    view, family, usable = (
        _at_kernel(op, avals, params),
        op.kernel.family,
        _usable(chip, params),
    )
    kernels, scratch, note = _compiled(op, view, with_knobs(chip, params.get("knobs", ())))
    choice = family.choose(view.problem, usable, params.get("config"))
    entry = family.measured(view.problem, usable)
    measured = entry is not None and choice.origin == str(entry)
    if choice.config is not None and not kernels:
        needed = family.kernels_for(usable).shared_bytes(view.problem, choice.config)
        note = f"{note} Shared memory would be {bytes_text(needed)}."
    return ExplainedCall(
        op=op.name,
        problem=str(view.problem),
        config=choice.config,
        candidates=tuple(family.ranked(view.problem, usable)),
        stages=getattr(choice.config, "stages", 0),
        scratch_bytes=scratch,
        kernels=kernels,
        note=note,
        origin=f"{choice.origin} ({config.tuning_file(usable.name)})" if measured else choice.origin,
        flops=view.problem.flops,
    )


def _without_kernel(op: Op, avals: list[Any], params: dict[str, Any]) -> ExplainedCall:
    assert op.without_kernel is not None
    own_params = {name: value for name, value in params.items() if name != "batch"}
    note = op.without_kernel(avals, **own_params)
    shapes = ", ".join(f"{one.dtype.name}{list(one.shape)}" for one in avals)
    return ExplainedCall(op.name, shapes, None, (), 0, 0, (), note)


class _View(NamedTuple):
    """A call as its kernel sees it: types of operands and results, which operands carry vmap's dimension, the
    family's parameters, and the problem."""

    ins: list[Any]
    outs: list[Any]
    carried: Any
    params: dict[str, Any]
    problem: Any


def _at_kernel(op: Op, avals: list[Any], params: dict[str, Any]) -> _View:
    """Traces the lowering of one device up to its kernel."""
    assert op.kernel is not None
    family_params, seen = own(params), []

    def call(arrays: list[jax.Array], results: Any, carried: Any) -> list[jax.Array]:
        ins = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        outs = [jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for shape, dtype in results]
        seen.append((ins, outs, carried))
        return [jnp.zeros(one.shape, one.dtype) for one in outs]

    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    jax.eval_shape(functools.partial(on_kernel, op, call, params["batch"], family_params), *arguments)
    ins, outs, carried = seen[0]
    return _View(
        ins, outs, carried, family_params, op.kernel.problem(ins, outs, batch=carried, **family_params)
    )


def _compiled(op: Op, view: _View, chip: Chip) -> tuple[tuple[KernelFacts, ...], int, str]:
    assert op.kernel is not None
    try:
        plan = op.kernel.plan(view.ins, view.outs, batch=view.carried, chip=chip, **view.params)
    except CompilerNotFoundError as error:
        return (), 0, f"Not compiled: {error}"
    facts = []
    for step in plan.steps:
        if not isinstance(step, Launch):
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
