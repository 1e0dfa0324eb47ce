"""The lowerings of an op on one device.

cuda: vmap folded, operands prepared, a kernel planned and emitted. Everything else: the reference, which
stands in for the kernel on a CPU, and elsewhere only where `config.fallback` allows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_deepgemm.core import _private, launch
from jax_deepgemm.core.batch import Carried, fold, without_batch
from jax_deepgemm.core.chain import in_turn
from jax_deepgemm.core.chip import Chip, Knobs, chip_of, with_knobs
from jax_deepgemm.core.declaration import Declaration, own
from jax_deepgemm.core.sharding import Batch
from jax_deepgemm.log import note_once

Types = tuple[tuple[tuple[int, ...], Any], ...]
"""Shape and dtype of each result."""


def make(op: Declaration) -> Callable[..., Any]:
    """The lowering rule for cuda."""
    primitive = _kernel_primitive(op)

    def rule(
        ctx: Any, *args: Any, batch: Batch, fallback: str = "error", knobs: Knobs = (), **params: Any
    ) -> Any:
        device = device_of(ctx)
        refusal = _other_gpu(op, device) or symbolic_shapes(op, ctx.avals_in)
        _stand_in(refusal, fallback)
        nothing = any(0 in aval.shape for aval in ctx.avals_in)  # nothing to compute: no kernel counts on it
        if refusal or nothing:
            reference = functools.partial(op.run_reference, batch=batch, **params)
            return mlir.lower_fun(reference, multiple_results=True)(ctx, *args)
        chip, family_params = with_knobs(chip_of(device), knobs), own(params)

        def call(arrays: list[jax.Array], results: Types, carried: Carried | None) -> list[jax.Array]:
            given = tuple(sorted(family_params.items()))
            overlap = dict(knobs).get("pdl", True)
            return primitive.bind(
                *arrays, results=results, batch=carried, chip=chip, overlap=overlap, params=given
            )

        body = functools.partial(on_kernel, op, call, batch, family_params)
        return mlir.lower_fun(body, multiple_results=True)(ctx, *args)

    return rule


def make_reference(op: Declaration) -> Callable[..., Any]:
    """The lowering rule for every platform that has no other."""
    lower = mlir.lower_fun(op.run_reference, multiple_results=True)

    def rule(ctx: Any, *args: Any, **params: Any) -> Any:
        platforms = set(ctx.platforms or ctx.module_context.platforms)
        if op.kernel is not None:
            _stand_in(_other_platform(op, platforms - {"cpu"}), params.get("fallback", "error"))
        elif op.without_kernel is not None and "cuda" in platforms:
            note_once(op.without_kernel(ctx.avals_in, **params))
        return lower(ctx, *args, **params)

    return rule


def _stand_in(refusal: str, fallback: str) -> None:
    """Whether the reference may run where a kernel cannot: if not, the refusal is raised."""
    if refusal and fallback != "reference":
        raise ValueError(refusal)
    if refusal:
        _private.log_once(f"{refusal} Running the reference.")


def device_of(ctx: Any) -> Any | None:
    """A CUDA device of the lowering, or None where it is made without one (export, `lowering_platforms=`)."""
    backend = ctx.module_context.backend
    if backend is None or not ctx.module_context.backend.devices():
        return None
    device = backend.devices()[0]
    return device if getattr(device, "compute_capability", None) is not None else None


def on_kernel(
    op: Declaration,
    call: Callable[..., list[jax.Array]],
    batch: Batch,
    params: dict[str, Any],
    *arrays: jax.Array,
) -> list[jax.Array]:
    """The op as calls of its kernel: vmap's levels folded, operands prepared.

    Args:
      op: has a kernel.
      call: (arrays, results, carried) -> arrays: the kernel on prepared operands, of which some carry a
        leading dimension of vmap (None: there is none); `results` are the types it gives.
      batch: the recorded levels.
      params: of the family.
      arrays: the operands, levels in front.
    """
    assert op.kernel is not None
    types = op.result_types(arrays, batch, params)
    folded, carried = fold(arrays, batch)
    if carried is None or op.kernel.takes(carried):
        count = next((x.shape[0] for x, on in zip(folded, carried or ()) if on), None)
        lead = () if count is None else (count,)
        one_level = tuple(((*lead, *shape[len(batch) :]), dtype) for shape, dtype in types)
        results = _call(op, call, params, folded, one_level, carried)
    else:
        results = without_batch(
            op.rule,
            lambda *one: _call(
                op, call, params, one, tuple(op.result(*(x.shape for x in one), **params)), None
            ),
            folded,
            carried,
            local=op.local,
        )
    return [result.reshape(shape) for result, (shape, _) in zip(results, types, strict=True)]


def _call(
    op: Declaration,
    call: Callable[..., list[jax.Array]],
    params: dict[str, Any],
    arrays: Sequence[jax.Array],
    results: Types,
    carried: Carried | None,
) -> list[jax.Array]:
    prepared = op.kernel_prepare(*arrays, **params) if op.kernel_prepare is not None else arrays
    return call(list(prepared), results, carried)


def _kernel_primitive(op: Declaration) -> Primitive:
    """The kernel on folded, prepared operands: the one thing that becomes a custom call."""
    primitive = Primitive(f"{op.name}_kernel")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*avals: Any, results: Any, **_: Any) -> list[Any]:
        return [jax.core.ShapedArray(shape, dtype) for shape, dtype in results]

    def lower(ctx: Any, *args: Any, results: Any, batch: Any, chip: Chip, overlap: bool, params: Any) -> Any:
        assert op.kernel is not None
        ins = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_in]
        outs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]
        plan = op.kernel.plan(ins, outs, batch=batch, chip=chip, **dict(params))
        plan = plan if overlap else in_turn(plan)
        aliases = {
            i: o
            for i, o in op.aliases.items()
            if (ins[i].shape, ins[i].dtype) == (outs[o].shape, outs[o].dtype)
        }
        return launch.emit(ctx, plan, args, aliases=aliases)

    mlir.register_lowering(primitive, lower, platform="cuda")
    return primitive


# Why no kernel can run: "" if one can

_PLAIN_FORM = "the plain jnp form, which is slow: jax_deepgemm.config.use(fallback='reference')."


def _other_gpu(op: Declaration, device: Any | None) -> str:
    if device is None:
        return ""
    assert op.kernel is not None
    capability, family = device.compute_capability, op.kernel.family
    if family.runs_on(capability):
        return ""
    return (
        f"{op.name}: {device.device_kind} has compute capability {capability}; {family.supported()}. "
        f"Run there, or let this GPU run {_PLAIN_FORM}"
    )


def _other_platform(op: Declaration, platforms: set[str]) -> str:
    if not platforms:
        return ""
    return (
        f"{op.name}: lowered for {', '.join(sorted(platforms))}; the kernels are for cuda, and on cpu plain "
        f"jnp stands in for them. Lower or export for those, platforms=['cuda', 'cpu'], or let it be "
        f"{_PLAIN_FORM}"
    )


def symbolic_shapes(op: Declaration, avals: Sequence[Any]) -> str:
    """Why a kernel cannot take operands of these types: a size is a symbol (`jax.export.symbolic_shape`)."""
    if all(isinstance(size, int) for aval in avals for size in aval.shape):
        return ""
    shapes = ", ".join(f"[{', '.join(map(str, aval.shape))}]" for aval in avals)
    return (
        f"{op.name}: operands {shapes} have symbolic sizes; the kernels need static shapes. Export one "
        f"program for each size, or for each of a few sizes to which rows are padded; for platforms=['cpu'] "
        f"symbolic sizes work. Or let the GPU run {_PLAIN_FORM}"
    )
