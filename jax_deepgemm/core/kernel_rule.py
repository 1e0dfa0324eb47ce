"""The lowerings of an op on one device.

cuda: vmap folded, operands prepared, a kernel planned and emitted. Everything else: the reference, which
stands in for the kernel on a CPU, and elsewhere only where `config.fallback` allows it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_deepgemm.core import _private
from jax_deepgemm.core.sharding import Batch
from jax_deepgemm.log import logger
from jax_deepgemm.sm90.chip import H200, Chip

if TYPE_CHECKING:
    from jax_deepgemm.core.op import Op

COMPUTE_CAPABILITY = "9.0"


class LazyKernel:
    """A family's plan function, (avals_in, avals_out, *, batch, chip, **params) -> LaunchPlan, which is
    imported when CUDA first asks: what only CUDA needs costs others nothing.

    Args:
      module: full name of the module.
      name: of the function, or of an object that is called like one and may have `problem`.
      form: parameters that the op fixes.
    """

    def __init__(self, module: str, name: str, **form: Any) -> None:
        self._module, self._name, self._form = module, name, form

    def _function(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *avals: Any, **params: Any) -> Any:
        return self._function()(*avals, **self._form, **params)

    def problem(self, *avals: Any, **params: Any) -> Any | None:
        """What a configuration is chosen for; None of a kernel without configurations."""
        describe = getattr(self._function(), "problem", None)
        return None if describe is None else describe(*avals, **self._form, **params)


def make(op: Op) -> Callable[..., Any]:
    """The lowering rule for cuda."""
    primitive = _kernel_primitive(op)

    def rule(ctx: Any, *args: Any, batch: Batch, fallback: str = "error", **params: Any) -> Any:
        device = device_of(ctx)
        refusal = _other_gpu(op, device) or symbolic_shapes(op, ctx.avals_in)
        _stand_in(refusal, fallback)
        nothing = any(0 in aval.shape for aval in ctx.avals_in)  # nothing to compute: no kernel counts on it
        if refusal or nothing:
            reference = functools.partial(op.run_reference, batch=batch, **params)
            return mlir.lower_fun(reference, multiple_results=True)(ctx, *args)
        body = functools.partial(_body, op, primitive, chip_of(device), batch, params)
        return mlir.lower_fun(body, multiple_results=True)(ctx, *args)

    return rule


def make_reference(op: Op) -> Callable[..., Any]:
    """The lowering rule for every platform that has no other."""
    lower = mlir.lower_fun(op.run_reference, multiple_results=True)

    def rule(ctx: Any, *args: Any, **params: Any) -> Any:
        platforms = set(ctx.platforms or ctx.module_context.platforms)
        if op.kernel is not None:
            _stand_in(_other_platform(op, platforms - {"cpu"}), params.get("fallback", "error"))
        elif op.without_kernel is not None and "cuda" in platforms:
            _note(op.without_kernel(ctx.avals_in, **params))
        return lower(ctx, *args, **params)

    return rule


def _stand_in(refusal: str, fallback: str) -> None:
    """Whether the reference may run where a kernel cannot: if not, the refusal is raised."""
    if refusal and fallback != "reference":
        raise ValueError(refusal)
    if refusal:
        _private.log_once(f"{refusal} Running the reference.")


@functools.cache
def _note(message: str) -> None:
    logger.info("%s", message)


def device_of(ctx: Any) -> Any | None:
    """A CUDA device of the lowering, or None where it is made without one (export, `lowering_platforms=`)."""
    backend = ctx.module_context.backend
    if backend is None or not ctx.module_context.backend.devices():
        return None
    device = backend.devices()[0]
    return device if getattr(device, "compute_capability", None) is not None else None


def chip_of(device: Any | None) -> Chip:
    """What a plan must know about the device; an H200 where there is none."""
    if device is None:
        return H200
    return Chip(
        name=device.device_kind, arch=H200.arch, num_sms=device.core_count, smem_per_block=H200.smem_per_block
    )


def fold(arrays: Sequence[jax.Array], batch: Batch) -> tuple[list[jax.Array], tuple[bool, ...] | None]:
    """Merges vmap levels into one leading dimension.

    An operand without any level stays as it is (one copy serves the whole batch); one with some levels is
    repeated along the others.

    Returns:
      The arrays, and for each whether it has the leading dimension (None if there are no levels).
    """
    if not batch:
        return list(arrays), None
    levels = [
        next(x.shape[sum(on[i] for on in batch[:level])] for i, x in enumerate(arrays) if carried[i])
        for level, carried in enumerate(batch)
    ]
    folded = []
    for i, x in enumerate(arrays):
        carried_levels = [on[i] for on in batch]
        if any(carried_levels):
            own = x.shape[sum(carried_levels) :]
            x = jnp.expand_dims(x, [level for level, on in enumerate(carried_levels) if not on])
            x = jnp.broadcast_to(x, (*levels, *own)).reshape((math.prod(levels), *own))
        folded.append(x)
    return folded, tuple(any(on[i] for on in batch) for i in range(len(arrays)))


def _body(
    op: Op, primitive: Primitive, chip: Chip, batch: Batch, params: dict[str, Any], *arrays: jax.Array
) -> list[jax.Array]:
    types = op._result_types(arrays, batch, params)
    folded, carried = fold(arrays, batch)
    if op.kernel_prepare is not None:
        folded = list(op.kernel_prepare(*folded, **params))
    count = len(batch)
    kernel_types = tuple(
        ((math.prod(shape[:count]), *shape[count:]) if count else shape, dtype) for shape, dtype in types
    )
    results = primitive.bind(
        *folded, results=kernel_types, batch=carried, chip=chip, params=tuple(sorted(params.items()))
    )
    return [result.reshape(shape) for result, (shape, _) in zip(results, types, strict=True)]


def _kernel_primitive(op: Op) -> Primitive:
    """The kernel on folded, prepared operands: the one thing that becomes a custom call."""
    primitive = Primitive(f"{op.name}_kernel")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*avals: Any, results: Any, **_: Any) -> list[Any]:
        return [jax.core.ShapedArray(shape, dtype) for shape, dtype in results]

    def lower(ctx: Any, *args: Any, results: Any, batch: Any, chip: Chip, params: Any) -> Any:
        from jax_deepgemm.core import launch

        assert op.kernel is not None
        ins = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_in]
        outs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]
        plan = op.kernel(ins, outs, batch=batch, chip=chip, **dict(params))
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


def _other_gpu(op: Op, device: Any | None) -> str:
    capability = getattr(device, "compute_capability", None)
    if device is None or capability == COMPUTE_CAPABILITY:
        return ""
    return (
        f"{op.name}: {device.device_kind} has compute capability {capability}; the kernels are for "
        f"{COMPUTE_CAPABILITY} (Hopper). Run there, or let this GPU run {_PLAIN_FORM}"
    )


def _other_platform(op: Op, platforms: set[str]) -> str:
    if not platforms:
        return ""
    return (
        f"{op.name}: lowered for {', '.join(sorted(platforms))}; the kernels are for cuda, and on cpu plain "
        f"jnp stands in for them. Lower or export for those, platforms=['cuda', 'cpu'], or let it be "
        f"{_PLAIN_FORM}"
    )


def symbolic_shapes(op: Op, avals: Sequence[Any]) -> str:
    """Why a kernel cannot take operands of these types: a size is a symbol (`jax.export.symbolic_shape`)."""
    if all(isinstance(size, int) for aval in avals for size in aval.shape):
        return ""
    shapes = ", ".join(f"[{', '.join(map(str, aval.shape))}]" for aval in avals)
    return (
        f"{op.name}: operands {shapes} have symbolic sizes; the kernels need static shapes. Export one "
        f"program for each size, or for each of a few sizes to which rows are padded; for platforms=['cpu'] "
        f"symbolic sizes work. Or let the GPU run {_PLAIN_FORM}"
    )
